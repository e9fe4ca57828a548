"""The page over real services: a router and its experts, whose answers are slow enough to be watched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Elsewhere, in_a_thread
from tests.browser.page import Page
from tests.served_stack import SLOTS, Family, Stack, make_family, served
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

DELAY_SECONDS = 0.02
"""Of each message on the way to an expert and back."""


async def slow_experts(stack: Stack) -> None:
    for slot in SLOTS:
        await stack.start_expert(slot, linked=True)
        stack.links[slot].base_delay_seconds = DELAY_SECONDS


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Iterator[Elsewhere[Stack]]:
    """A stack with tiny models of random weights."""
    family = make_family(tmp_path_factory.mktemp("family"))
    with in_a_thread(served(family, http_port=0, start=False, drafting="off")) as there:
        there.run(slow_experts(there.value))
        yield there


@pytest.fixture
def page(driver: Any, there: Elsewhere[Stack]) -> Iterator[Page]:
    page = page_of(driver, there.value)
    yield page
    page.close()


def page_of(driver: Any, stack: Stack) -> Page:
    assert stack.router.http_url is not None
    page = Page(driver, stack.router.http_url.rstrip("/") + "/")
    page.size(1440, 900)
    return page


def test_the_text_is_that_of_the_internal_api_whoever_writes(page: Page, there: Elsewhere[Stack]):
    from fusionroute.v1.router_pb2 import CombineRule, GenerateRequest

    page.open()
    for mode, request in (
        ("fused", GenerateRequest()),
        ("route", GenerateRequest(combine=CombineRule.COMBINE_RULE_ROUTE)),
        ("router", GenerateRequest(combine=CombineRule.COMBINE_RULE_ROUTER)),
        ("expert:strings", GenerateRequest(combine=CombineRule.COMBINE_RULE_ROUTE, fixed_expert="strings")),
    ):
        page.choose("#mode", mode)
        page.js("document.getElementById('max-tokens').value = 20")
        page.ask("w3 w4 w5")
        page.until_answered()
        request.text, request.sampling.max_tokens = "w3 w4 w5", 20
        answer = there.run(there.value.answer(request))
        last = page.js("""
            const tokens = [...document.querySelectorAll('.turn:last-child .token')];
            return [tokens.map(t => t.textContent).join(''), tokens.map(t => t.getAttribute('aria-label'))];
        """)
        assert last[0] == "".join(token.text for token in answer.tokens), mode
        names = [token.expert or "router alone" for token in answer.tokens]
        assert all(name in label for name, label in zip(names, last[1], strict=True)), mode


def test_tokens_come_one_by_one_and_stop_ends_the_turn_at_the_router(page: Page, there: Elsewhere[Stack]):
    page.open().ask("w3 w4")
    counts = [page.wait(lambda: page.num_tokens, "writing")]
    page.wait(lambda: page.num_tokens >= counts[0] + 3, "more of it")
    assert there.value.router.keeper.num_running == 1
    page.click("#stop")
    page.wait(lambda: there.value.router.keeper.num_running == 0, "ended")
    page.until_answered()
    assert page.text(".turn-note") == "Stopped."


def test_a_swap_is_watched_while_the_answer_goes_on(page: Page, there: Elsewhere[Stack], tmp_path):
    newer = save_tiny_model(tmp_path / "newer", "gemma2", seed=77)
    page.open()
    page.choose("#mode", "expert:format")
    page.js("document.getElementById('max-tokens').value = 80")
    page.ask("w3 w4")
    page.wait(lambda: page.num_tokens > 3, "writing")
    there.run(there.value.start_expert("format", "newer", model=str(newer)))
    page.wait(lambda: "format" in page.text(".swap"), "marked in the answer")
    page.wait(lambda: "format: swapped" in page.text("#changes"), "told in the panel")
    page.until_answered()
    epochs = page.js("""
        return [...document.querySelectorAll('.swap')].map(mark => [mark.previousElementSibling,
            mark.nextElementSibling].map(t => t.closest('.answer').answer.turn.tokens[t.dataset.index].expert_epoch));
    """)
    assert len(epochs) == 1
    assert epochs[0][0] < epochs[0][1]


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_trained_family_shows_who_knows_what(driver: Any, pictures: Path):
    """Also takes the picture of docs/playground.md, which is this test's `playground.png`."""
    from trainer.lab_family import build, shown

    with shown() as progress:
        folder = build("demo", seed=0, progress=progress).folder
    family = Family(folder / "router", {slot: folder / "experts" / slot for slot in SLOTS})
    prompts = ["box: 4+4; rev jbef=", "pls 4+3="]
    with in_a_thread(served(family, http_port=0)) as there:
        page = page_of(driver, there.value)
        page.size(1280, 840)
        page.open()
        for prompt in prompts:
            page.ask(prompt)
            page.until_answered()
        texts = page.js("return [...document.querySelectorAll('.answer')].map(e => e.answer.text)")
        assert texts[0] == "[8; febj]"
        signs = page.js(
            "return [...document.querySelectorAll('.turn:first-child .token')].map(t => t.className)"
        )
        looks = {sign.split()[1] for sign in signs}
        assert len(looks) == 3
        page.js("(document.querySelector('.token.differs') ?? document.querySelector('.token')).focus()")
        page.save_picture(pictures / "playground.png")
        page.close()
