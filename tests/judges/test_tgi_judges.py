"""TGI's API before its own clients (`make judge-tgi`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.judges.environment import Judge, judge_stack, score_of
from tests.served_stack import Stack

pytestmark = [pytest.mark.judges, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]

HF_INFERENCE = Judge("hf-inference", ("huggingface_hub==2.4.0",), "hf_inference_client.py")
TEXT_GENERATION = Judge(
    "text-generation", ("text-generation==0.7.0", "huggingface-hub<1"), "text_generation_client.py"
)
EXPLAINED = {
    TEXT_GENERATION.name: {
        "chat: streamed": "the client reads [DONE], with which every server of OpenAI's API ends, as JSON, and wants"
        " role and tool_calls in each piece"
    }
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("judged")
    async with judge_stack(folder) as stack:
        yield stack


@pytest.mark.parametrize("judge", [HF_INFERENCE, TEXT_GENERATION], ids=lambda judge: judge.name)
async def test_a_client_of_tgi_loses_no_point_without_a_reason(stack: Stack, judge: Judge) -> None:
    assert stack.router.http_url is not None
    verdict = await score_of(judge, stack.router.http_url)
    explained = EXPLAINED.get(judge.name, {})
    assert verdict.lost(explained) == []
    assert verdict.num_won == verdict.num_points - len(explained)
