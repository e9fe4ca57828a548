"""What a person does on the page, and what the page then does, over an API that does as told."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.browser.fake_api import SLOTS, FakeApi
from tests.browser.page import Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

WIDTHS = {"phone": (390, 844), "desktop": (1440, 900)}
PARTS = ("#top", "#settings", "#experts", "#conversation", "#composer", "#token")


@pytest.fixture(autouse=True)
def keys():
    """Names of keys, which only an environment with Selenium has."""
    return pytest.importorskip("selenium.webdriver.common.keys").Keys


def test_tokens_come_one_by_one_and_each_bears_the_signs_of_its_expert(page: Page, fake: FakeApi):
    fake.pause_seconds = 0.1
    page.open().ask("What is the sum?")
    counts = set()

    def look() -> bool:
        counts.add(page.num_tokens)
        return not page.is_writing

    page.wait(look, "answered")
    assert len(counts & set(range(1, fake.num_tokens))) > 5
    assert page.num_tokens == fake.num_tokens
    tokens = page.js(
        "return [...document.querySelectorAll('.token')].map(t => ["
        "t.textContent, t.getAttribute('aria-label'), getComputedStyle(t).textDecorationStyle,"
        "getComputedStyle(t).backgroundColor])"
    )
    looks: dict[str | None, set[tuple[str, str]]] = {}
    for index, (text, label, line, colour) in enumerate(tokens):
        told = fake.token(index)
        assert text == told["text"]
        assert (told["expert"] or "router alone") in label
        assert ("not the expert's own choice" in label) == (
            told["top"]["expert"][:1] not in ([], told["top"]["fused"][:1])
        )
        looks.setdefault(told["expert"], set()).add((line, colour))
    assert looks.keys() == {*SLOTS, None}
    assert all(len(each) == 1 for each in looks.values())
    assert len(set.union(*looks.values())) == len(looks)
    assert "math" in page.text(".share-list")
    assert "40 tokens" in page.text(".facts")
    assert "6 of 9 drafts accepted" in page.text(".facts")


def test_what_was_asked_is_what_was_chosen_and_a_kept_seed_is_sent_again(page: Page, fake: FakeApi):
    fake.num_tokens = 3
    page.open().ask("one")
    page.until_answered()
    assert fake.asked[0]["fusionroute"].items() >= {"combine": "sum", "details": True}.items()
    assert fake.asked[0]["temperature"] == 0
    assert fake.asked[0]["messages"] == [{"role": "user", "content": "one"}]
    page.choose("#mode", "expert:strings")
    page.click("input[value=sampled]")
    page.click("#keep-seed")
    page.ask("two")
    page.until_answered()
    assert fake.asked[1]["fusionroute"].items() >= {"combine": "route", "expert": "strings"}.items()
    assert fake.asked[1]["temperature"] == 1
    assert fake.asked[1]["seed"] == fake.asked[0]["seed"]
    assert [message["role"] for message in fake.asked[1]["messages"]] == ["user", "assistant", "user"]
    page.choose("#mode", "route")
    page.click("#regenerate")
    page.wait(lambda: len(fake.asked) == 3, "asked again")
    page.until_answered()
    assert "expert" not in fake.asked[2]["fusionroute"]
    assert fake.asked[2]["messages"] == fake.asked[1]["messages"]
    for mode, rule in (("router", "router"), ("fused:mixture", "mixture")):
        page.choose("#mode", mode)
        page.ask("more")
        page.until_answered()
        assert fake.asked[-1]["fusionroute"]["combine"] == rule


def test_without_a_chat_template_each_prompt_is_continued_by_itself(page: Page, fake: FakeApi):
    fake.has_chat_template, fake.num_tokens = False, 3
    page.open()
    for prompt in ("one", "two"):
        page.ask(prompt)
        page.until_answered()
    assert [body["prompt"] for body in fake.asked] == ["one", "two"]
    assert all("messages" not in body for body in fake.asked)


def test_details_are_reached_and_left_by_keyboard(page: Page, fake: FakeApi, keys):
    page.open().ask("go")
    page.until_answered()
    page.js("document.getElementById('conversation').focus()")
    page.press(keys.TAB)
    assert page.js("return document.activeElement.dataset.index") == "0"
    assert page.js("return document.activeElement.matches(':focus-visible')")
    page.press(*[keys.ARROW_RIGHT] * 5, keys.ARROW_LEFT)
    told = page.text("#token")
    for part in (
        "no. 4",
        "strings",
        "The complement overruled the expert",
        "Expert",
        "Complement",
        "Sum",
        "✓ written",
    ):
        assert part in told
    weights = page.js("return [...document.querySelectorAll('.weights .fill')].map(f => f.style.inlineSize)")
    assert weights == ["10%", "70%", "10%", "10%"]
    page.press(keys.ARROW_DOWN)
    assert int(page.js("return document.activeElement.dataset.index")) > 7
    page.press(keys.END)
    assert page.js("return document.activeElement.dataset.index") == str(fake.num_tokens - 1)
    page.press(keys.HOME, keys.ESCAPE)
    assert page.js("return 'empty' in document.getElementById('token').dataset")
    page.press(keys.TAB)
    assert page.js("return document.activeElement.className") == "differing"
    page.press(keys.ENTER)
    assert page.js("return document.activeElement.dataset.index") == "4"


def test_an_answer_can_be_stopped_and_what_was_written_stays(page: Page, fake: FakeApi, keys):
    fake.pause_seconds, fake.num_tokens = 0.05, 2000
    page.open().ask("go")
    page.wait(lambda: page.num_tokens > 3, "writing")
    page.press(keys.ESCAPE)
    page.until_answered()
    stayed = page.num_tokens
    assert 3 < stayed < 2000
    page.wait(lambda: fake.num_left == 1, "left by the page")
    assert page.text(".turn-note") == "Stopped."
    page.wait(lambda: len(fake.forgotten) == 1, "ended at the server")
    assert fake.forgotten == [fake.asked[0]["fusionroute"]["session_id"]]
    assert page.num_tokens == stayed


def test_a_cut_connection_goes_on_where_it_broke_without_a_token_twice(page: Page, fake: FakeApi):
    fake.cut_at = 11
    page.open().ask("go")
    page.until_answered()
    assert fake.resumed_from == ["s:11"]
    indexes = page.js("return [...document.querySelectorAll('.token')].map(t => Number(t.dataset.index))")
    assert indexes == list(range(fake.num_tokens))


def test_a_reload_keeps_the_conversation_and_goes_on_with_an_answer_under_way(page: Page, fake: FakeApi):
    fake.pause_seconds = 0.1
    page.open()
    page.choose("#mode", "route")
    page.ask("first")
    page.wait(lambda: page.num_tokens >= 5, "writing")
    page.open()
    page.until_answered()
    assert page.num_tokens == fake.num_tokens
    assert len(fake.resumed_from) == 1
    assert int(fake.resumed_from[0].rpartition(":")[2]) >= 5
    page.open()
    assert page.num_tokens == fake.num_tokens
    assert page.text(".prompt") == "first"
    assert page.js("return document.getElementById('mode').value") == "route"
    page.click("#clear")
    page.open()
    assert page.num_tokens == 0


def test_where_there_is_no_room_the_oldest_answers_lose_their_candidates_first(page: Page):
    page.open()
    kept = page.driver.execute_async_script("""
        const done = arguments[arguments.length - 1];
        const turn = (prompt) => ({prompt, tokens: [{text: prompt, top: "x".repeat(2_000_000)}]});
        import("/playground/keeping.js").then(({keep, recall}) => {
            keep(["a", "b", "c", "d"].map(turn));
            done(recall().map(({prompt, tokens}) => [prompt, tokens[0].text, "top" in tokens[0]]));
        });
    """)
    assert [(prompt, text) for prompt, text, _ in kept] == [(each, each) for each in "abcd"]
    has_candidates = [each[2] for each in kept]
    assert has_candidates == sorted(has_candidates)
    assert set(has_candidates) == {False, True}


def test_a_swap_within_an_answer_is_marked_where_it_happened(page: Page, fake: FakeApi):
    fake.swap_at = 20
    page.open().ask("go")
    page.until_answered()
    marks = page.js("return [...document.querySelectorAll('.swap')].map(m => [m.textContent,"
                    "Number(m.nextElementSibling.dataset.index)])")  # fmt: skip
    assert len(marks) == 1
    assert "math" in marks[0][0]
    first = next(i for i in range(20, 40) if fake.token(i)["expert"] == "math")
    assert marks[0][1] == first


def test_the_panel_of_experts_tells_what_has_changed(page: Page, fake: FakeApi):
    page.open()
    page.wait(lambda: page.text("#slots").count("ready") == len(SLOTS), "all ready")
    fake.ready = False
    page.wait(lambda: "math: not there" in page.text("#changes"), "told that math has gone")
    fake.ready = True
    page.wait(lambda: "math: ready" in page.text("#changes"), "told that math is back")
    fake.epoch += 5000
    page.wait(lambda: "math: swapped" in page.text("#changes"), "told of the swap")
    page.click("#experts summary")  # folded away, as on a phone
    fake.ready = False
    spoken = "return document.querySelector('#news[role=status]').textContent"
    page.wait(lambda: page.js(spoken) == "math: not there", "said to those who hear")


@pytest.mark.parametrize(
    ("status", "message", "words"),
    [
        (
            429,
            "256 turns are being written",
            "The router is busy: 256 turns are being written. Try again in 3 s.",
        ),
        (503, "nobody serves math", "Somebody is not there: nobody serves math."),
        (400, "max_tokens = 0; 1 or more", "max_tokens = 0; 1 or more."),
    ],
)
def test_errors_are_told_in_words(page: Page, fake: FakeApi, status, message, words):
    page.open()
    fake.refusal = (status, message)
    page.ask("go")
    page.until_answered()
    assert words in page.text(".turn-note")
    assert page.js("return document.querySelector('.turn-note').getAttribute('role')") == "alert"


def test_a_key_is_asked_for_where_one_is_needed_and_kept_in_this_tab_only(page: Page, fake: FakeApi, keys):
    fake.key, fake.num_tokens = "k" * 30, 3
    page.driver.get(page.url)
    page.wait(lambda: page.js("return document.activeElement.id") == "key", "asked for a key")
    assert "An API key is needed" in page.text("#model")
    page.press(fake.key, keys.ENTER)
    page.wait(lambda: page.js("return !document.getElementById('send').disabled"), "connected")
    page.ask("go")
    page.until_answered()
    assert page.num_tokens == 3
    assert page.js("return JSON.stringify(localStorage) + document.cookie") == "{}"
    assert fake.key in page.js("return JSON.stringify(sessionStorage)")


def test_nothing_is_asked_of_anybody_else_and_nothing_is_refused_by_the_policy(page: Page, fake: FakeApi):
    page.open().ask("go")
    page.until_answered()
    page.js("document.querySelector('.token').focus()")
    urls = page.requested_urls()
    assert any(url.endswith("v1/chat/completions") for url in urls)
    assert {urlsplit(url).netloc for url in urls} == {urlsplit(page.url).netloc}
    assert page.logs() == []


def test_appending_touches_nothing_that_stands(page: Page, fake: FakeApi):
    fake.pause_seconds, fake.num_tokens = 0, 3000
    page.open()
    page.js("document.getElementById('max-tokens').value = 3000")
    page.js("""
        window.added = 0; window.removed = 0;
        new MutationObserver(records => { for (const r of records) {
            if (!r.target.closest?.('.tokens')) continue;
            window.added += r.addedNodes.length; window.removed += r.removedNodes.length;
            if (r.type !== 'childList') window.removed += 1;
        }}).observe(document.getElementById('turns'),
            {childList: true, subtree: true, characterData: true, attributes: true});
    """)
    page.ask("many")
    page.wait(lambda: page.num_tokens == 3000 and not page.is_writing, "answered", 90)
    assert page.js("return [window.added, window.removed]") == [3000, 0]


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_or_is_cut(page: Page, fake: FakeApi, width, colours, pictures: Path):
    page.size(*WIDTHS[width])
    page.emulate(prefers_color_scheme=colours, prefers_reduced_motion="reduce")
    fake.swap_at = 20
    page.open().ask("What is the sum of the digits of a number that is rather long? " * 4)
    page.until_answered()
    assert cut(page) == []
    page.save_picture(pictures / f"{width}-{colours}.png")
    page.js("document.querySelectorAll('.token')[4].focus()")
    if width == "phone":
        page.click("#experts summary")
    page.wait(lambda: page.text("#slots").count("ready") == len(SLOTS), "experts shown")
    assert overlapping(page) == []
    assert cut(page) == []
    page.save_picture(pictures / f"{width}-{colours}-token.png")
    if width == "phone":
        page.click("#close-token")
        page.click("#experts summary")
        page.click("#settings summary")
        assert overlapping(page) == []
        assert cut(page) == []
        page.save_picture(pictures / f"{width}-{colours}-settings.png")
    if colours == "dark":
        assert (
            page.js("return getComputedStyle(document.body.parentElement).backgroundColor")
            == "rgb(22, 23, 26)"
        )
    assert page.js("return getComputedStyle(document.querySelector('.token')).transitionDuration") == "0s"


def overlapping(page: Page) -> list[tuple[str, str]]:
    """Pairs of the page's main parts that lie over each other."""
    boxes = page.js(
        "return arguments[0].map(s => { const b = document.querySelector(s).getBoundingClientRect();"
        "return [s, b.left, b.top, b.right, b.bottom] })",
        PARTS,
    )
    boxes = [box for box in boxes if box[3] > box[1] and box[4] > box[2]]
    assert len(boxes) >= 5
    return [
        (one[0], other[0])
        for number, one in enumerate(boxes)
        for other in boxes[number + 1 :]
        if one[1] < other[3] - 1 and other[1] < one[3] - 1 and one[2] < other[4] - 1 and other[2] < one[4] - 1
    ]


def cut(page: Page) -> list[str]:
    """Elements whose content is wider than they are, or that stand beyond the window's edge."""
    return page.js("""
        const unseen = e => e.closest('.unseen') || !e.checkVisibility();
        return [...document.querySelectorAll('html, body, body *')]
            .filter(e => !unseen(e) && e.tagName !== 'OPTION' && e.tagName !== 'OPTGROUP')
            .filter(e => (e.clientWidth && e.scrollWidth > e.clientWidth + 1)
                || e.getBoundingClientRect().right > innerWidth + 1)
            .map(e => `${e.tagName}#${e.id}.${e.className}: ${e.textContent.slice(0, 40)}`);
    """)
