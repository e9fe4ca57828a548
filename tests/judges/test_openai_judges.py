"""The OpenAI API before clients and checkers of other people (`make judge-openai`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.judges import judges_of_openai as judges
from tests.judges.environment import Judge, score_of
from tests.judges.talking_models import talking_stack
from tests.served_stack import Stack

pytestmark = [pytest.mark.judges, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("judged")
    async with talking_stack(folder) as stack:
        yield stack


@pytest.mark.parametrize("judge", judges.OF_TALKING, ids=lambda judge: judge.name)
async def test_a_judge_of_openais_api_takes_no_point_without_a_reason(
    stack: Stack, judge: Judge, capsys: pytest.CaptureFixture[str]
) -> None:
    await _judged(stack, judge, capsys)


async def test_lm_eval_scores_an_expert_over_http_as_it_scores_its_weights(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {
        "JUDGED_MODEL": "fusionroute/math",
        "JUDGED_WEIGHTS": str(stack.family.experts["math"]),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
    }
    await _judged(stack, replace(judges.LM_EVAL, variables=facts), capsys)


async def _judged(stack: Stack, judge: Judge, capsys: pytest.CaptureFixture[str]) -> None:
    assert stack.router.http_url is not None
    verdict = await score_of(judge, stack.router.http_url)
    with capsys.disabled():
        print(f"\n--- {', '.join(judge.requirements + judge.packages)}\n{verdict.output}")
    explained = judges.EXPLAINED.get(judge.name, {})
    assert verdict.lost(explained) == []
    assert verdict.num_won >= verdict.num_points - len(explained)
