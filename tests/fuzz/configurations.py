"""Configurations of jobs that say impossible things, as JSON, in messages that are otherwise well."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from typing import Any

import grpc

from fusionroute.v1 import trainer_pb2, trainer_pb2_grpc
from tests.fuzz.fuzzing import HANGING_SECONDS, USUAL_TIMEOUT_SECONDS, Tally

LABEL = "a configuration of wild values"
TEXTS = (
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 10_000,
    "nul",
    "NaN",
    '"' + "x" * 900_000,
    "\ufeff{}",
    '{"experts": {}, "experts": {}}',
    "x" * 1_000_001,
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    float("nan"),
    float("inf"),
    1e-320,
    "",
    "a\0b",
    "\ud800",
    "x" * 100_000,
    "checkpoint:",
    "checkpoint:\0",
    "checkpoint:../..",
    "checkpoint:\ud800",
    "checkpoint:" + "a" * 200,
    "checkpoint:first-sft-1",
    "~nobody/x",
    "http://127.0.0.1:1",
    [],
    [[]] * 300,
    ["x"] * 2000,
    {},
    {"": ""},
    {"\ud800": "x"},
    {"a\nb\0": 1},
    {"x" * 5000: "x"},
    {f"slot-{number}": "x" for number in range(500)},
)
KEYS = ("name", "router", "experts", "data", "training", "seed", "\ud800", "x" * 9000, "", "a\0b\n")


def wild(rng: random.Random, valid: str) -> str:
    """The text of a configuration."""
    if rng.random() < 0.1:
        return rng.choice(TEXTS)
    content = json.loads(valid)
    if rng.random() < 0.3:
        return json.dumps(
            content | {"router": rng.choice([value for value in VALUES if isinstance(value, str)])}
        )
    for _ in range(rng.randint(1, 2)):
        _set_wild(rng, content)
    return json.dumps(content)  # escapes what UTF-8 cannot carry


def _set_wild(rng: random.Random, content: dict[str, Any]) -> None:
    inner = [key for key, value in content.items() if isinstance(value, dict) and value]
    if inner and rng.random() < 0.6:
        _set_wild(rng, content[rng.choice(inner)])
        return
    key = rng.choice([*content, *content, rng.choice(KEYS)])
    content[key] = copy.deepcopy(rng.choice(VALUES))


async def fuzz_configurations(
    channel: grpc.aio.Channel, valid: str, count: int, seed: int, tally: Tally
) -> None:
    """Submits `count` jobs one after the other and counts the answers in `tally`."""
    rng, trainer = random.Random(seed), trainer_pb2_grpc.TrainerServiceStub(channel)
    kinds = [*trainer_pb2.JobKind.values(), *[trainer_pb2.JobKind.JOB_KIND_SFT] * 20]
    for number in range(count):
        request = trainer_pb2.SubmitJobRequest(
            kind=rng.choice(kinds), config=wild(rng, valid), idempotency_key=f"wild-{seed}-{number}"
        )
        call = trainer.SubmitJob(request, timeout=USUAL_TIMEOUT_SECONDS)
        try:
            async with asyncio.timeout(HANGING_SECONDS):
                status = (await call.code()).name
        except TimeoutError:
            tally.num_hanging += 1
            continue
        words = str(await call.details() or "")
        tally.count(LABEL, "SubmitJob (wild configuration)", status, words, request.SerializeToString())
