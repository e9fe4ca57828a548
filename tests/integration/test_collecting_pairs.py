"""Pairs from a router that serves: real services, random tiny models, which are wrong nearly always."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, InvalidRequest, Reason
from fusionroute.v1.router_pb2 import CombineRule, GenerateRequest
from tests.served_stack import Family, Stack, make_family, served
from tests.tiny_models import word_tokenizer
from trainer.config import DataTable, PairsJob
from trainer.pairs import collect_pairs
from trainer.run_context import RunContext, RunResult


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


def write_data(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    lines = [{"prompt": f"w{n} w{n + 1} w7", "completion": " w9 w8"} for n in range(2, 10)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job(folder: Path, stack: Stack, **changes) -> PairsJob:
    return PairsJob(
        data=DataTable(files=(write_data(folder),)),
        output=folder / "pairs.jsonl",
        router=stack.client.address,
        max_new_tokens=6,
        concurrency=4,
        **changes,
    )


async def collect(config: PairsJob, folder: Path) -> RunResult:
    return await asyncio.to_thread(collect_pairs, config, RunContext(folder / "run"))


async def test_rejected_answers_are_the_routers_own_and_are_not_kept_as_sessions(
    family: Family, redis_url: str, redis_client: Redis, tmp_path: Path
):
    tokenizer = word_tokenizer()
    async with served(family, redis_url=redis_url) as stack:
        result = await collect(job(tmp_path, stack), tmp_path)
        left = await redis_client.keys("fr:{pairs-*")
        assert [key for key in left if not key.endswith(b":gone")] == []  # that they were deleted is kept for a while
        rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        assert result.metrics["pairs"] == len(rows) == 8
        for row in rows:
            request = GenerateRequest()
            request.token_ids.ids.extend(tokenizer.encode(row["prompt"]))
            request.sampling.max_tokens = 6
            request.combine = CombineRule.COMBINE_RULE_SUM
            answer = await stack.answer(request)
            assert answer.text == row["rejected"]
            assert row["chosen"] == " w9 w8"
            assert row.get("rejected_ended", True) == (len(answer.ids) < 6 or answer.ids[-1] == 1)
        assert (await collect(job(tmp_path, stack), tmp_path)).metrics == result.metrics


async def test_with_the_experts_the_bias_is_told_too(
    family: Family, redis_url: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("FUSIONROUTE_CACHE_DIR", str(tmp_path / "cache"))
    experts = {slot: str(path) for slot, path in family.experts.items()}
    async with served(family, redis_url=redis_url) as stack:
        result = await collect(job(tmp_path, stack, experts=experts), tmp_path)
        told = json.loads((tmp_path / "run" / "bias.json").read_text())
        assert told["num_pairs"] == result.metrics["pairs"] == sum(told["bias_histogram"]["counts"])
        assert result.metrics["bias"]["mean"] == pytest.approx(told["mean"])
        other_order = dict(reversed(experts.items()))
        with pytest.raises(FusionRouteError, match="in this order") as caught:
            await collect(job(tmp_path, stack, experts=other_order), tmp_path)
        assert caught.value.reason is Reason.EXPERTS_MISMATCH


async def test_a_file_that_exists_is_refused_before_anyone_is_asked(
    family: Family, redis_url: str, tmp_path: Path
):
    (tmp_path / "pairs.jsonl").write_text("precious\n")
    async with served(family, redis_url=redis_url, start=False) as stack:
        with pytest.raises(InvalidRequest, match="exists already"):
            await collect(job(tmp_path, stack), tmp_path)
    assert (tmp_path / "pairs.jsonl").read_text() == "precious\n"


async def test_a_checkpoint_that_is_not_readable_here_is_named(
    family: Family, redis_url: str, tmp_path: Path
):
    async with served(family, redis_url=redis_url, start=False) as stack:
        with pytest.raises(InvalidRequest, match="readable here"):
            await collect(job(tmp_path, stack, checkpoint=str(tmp_path / "elsewhere")), tmp_path)
