"""`fusionroute eval harness` with the real lm-evaluation-harness, on the trained demo family (`make judge-harness`).

The first run installs the harness (about 1 GB with its tokenizers, without torch) and trains the family; later ones
take less than a minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from evaluation.harness import environment
from evaluation.harness.results import collect
from evaluation.harness.running import AskedModel, HarnessPlan, run, sources_of
from evaluation.harness.server import Server
from fusionroute.v1.router_pb2 import CombineRule, GenerateRequest
from tests.served_stack import SLOTS, Family, Stack, served
from trainer.lab_family import build

pytestmark = [
    pytest.mark.judges,
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(1800),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    folder = (await asyncio.to_thread(build, "demo", seed=0)).folder
    family = Family(folder / "router", {slot: folder / "experts" / slot for slot in SLOTS})
    async with served(family, http_port=0) as stack:
        yield stack


@pytest.fixture(scope="module")
def python() -> Path:
    return environment.install(environment.default_folder())


async def told(
    stack: Stack, python: Path, folder: Path, task: str, asked: AskedModel, **plan: Any
) -> dict[str, Any]:
    """What the harness wrote."""
    assert stack.router.http_url is not None
    server = await asyncio.to_thread(Server.found_at, stack.router.http_url)
    assert asked.model in server.models
    (source,) = sources_of([task])
    wanted = HarnessPlan(server.url, max_length=server.max_context_tokens, timeout_seconds=300, **plan)
    return dict(await asyncio.to_thread(run, python, source, asked, wanted, folder / "o.json"))


def replies(found: dict[str, Any], task: str) -> dict[str, str]:
    """By question."""
    return {each["doc"]["question"]: each["resps"][0][0] for each in found["samples"][task]}


async def check_equal_grpc(stack: Stack, answered: dict[str, str], **options: Any) -> None:
    for prompt, reply in answered.items():
        request = GenerateRequest(text=prompt, **options)
        request.sampling.max_tokens = 20
        assert (await stack.answer(request)).text == reply


@pytest.mark.parametrize(
    ("model", "rule", "options"),
    [
        ("fusionroute", "", {}),
        ("fusionroute", "route", {"combine": CombineRule.COMBINE_RULE_ROUTE}),
        ("fusionroute/math", "", {"combine": CombineRule.COMBINE_RULE_ROUTE, "fixed_expert": "math"}),
    ],
)
async def test_the_harness_is_answered_as_grpc_is(stack, python, tmp_path, model, rule, options):
    found = await told(stack, python, tmp_path, "lab_numbers", AskedModel(model, rule), limit=20)
    answered = replies(found, "lab_numbers")
    assert len(answered) == 20
    await check_equal_grpc(stack, answered, **options)


async def test_numbers_are_taken_out_of_answers_and_scored(stack, python, tmp_path):
    found = collect(await told(stack, python, tmp_path, "lab_numbers", AskedModel("fusionroute")), "fused")
    rights = dict.fromkeys(("strict", "flexible"), 0.0)
    for outcome in found.outcomes:
        rights[outcome.question.task.rsplit("/", 1)[1]] += outcome.verdict.score
    assert len(found.outcomes) == 2 * found.num_documents["lab_numbers"] == 128
    assert rights["flexible"] >= rights["strict"] >= 0.6 * 64
    for outcome in found.outcomes:
        assert outcome.verdict.is_right == (outcome.answer.text == outcome.question.reference)


async def test_programs_are_scored_by_their_text_and_by_their_likelihood_with_either_tokenizer(
    stack, python, tmp_path
):
    asked = AskedModel("fusionroute/strings")
    remote = await told(stack, python, tmp_path, "lab_code", asked)
    local = await told(stack, python, tmp_path, "lab_code", asked, tokenizer=stack.family.experts["strings"])
    scores = remote["results"]
    assert scores == local["results"]
    assert scores["lab_code_choice"]["acc,none"] >= 0.9
    assert 0.3 <= scores["lab_code"]["exact_match,none"] < 0.9  # it knows no format
    pairs = zip(remote["samples"]["lab_code_choice"], local["samples"]["lab_code_choice"], strict=True)
    assert all(one["resps"] == other["resps"] for one, other in pairs)


async def test_chats_are_asked_by_the_checkpoints_template_which_for_the_lab_adds_nothing(
    stack, python, tmp_path
):
    found = await told(stack, python, tmp_path, "lab_numbers", AskedModel("fusionroute"), chat=True, limit=4)
    answered = replies(found, "lab_numbers")
    assert len(answered) == 4
    await check_equal_grpc(stack, answered)
