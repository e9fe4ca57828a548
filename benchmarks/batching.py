"""Tokens per second of sessions that step with a jitter, with and without waiting a moment for each other.

python benchmarks/batching.py --sessions 16 --gap-ms 3 --jitter-ms 3

Between an answer and the next step of a session lie the gap and a random jitter. Both ways run in turn, several times,
each on an engine of its own with the same weights; trust the ratios. One session alone must not be slowed.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.random_llama import random_llama
from fusionroute.engine import Engine, EngineLimits, StepCall, prepare_model
from tests.tiny_models import word_tokenizer

PROMPT = [3] * 20


@dataclass(frozen=True)
class Run:
    """One way, once."""

    sessions: int
    await_others: bool
    tokens_per_second: float
    tokens_per_forward: float
    latency_p50_ms: float
    latency_p95_ms: float
    cpu_ms_per_token: float


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    model = random_llama(
        hidden=arguments.hidden,
        layers=arguments.layers,
        intermediate=2 * arguments.hidden,
        max_tokens=len(PROMPT) + 2 * arguments.tokens,
        dtype=arguments.dtype,
    )
    runs: list[Run] = []
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", flush=True)
        for sessions in sorted({1, arguments.sessions}):
            for await_others in (False, True):
                runs.append(asyncio.run(_measure(arguments, model, sessions, await_others, seed=number)))
    print(json.dumps(vars(arguments)))
    _print_table(runs)
    if arguments.output:
        document = {"configuration": vars(arguments), "runs": [asdict(run) for run in runs]}
        Path(arguments.output).write_text(json.dumps(document, indent=1))


async def _measure(
    arguments: argparse.Namespace, model: PreTrainedModel, sessions: int, await_others: bool, seed: int
) -> Run:
    loaded = prepare_model(copy.deepcopy(model), word_tokenizer(), name="random", epoch=1)
    latencies: list[float] = []
    async with Engine(loaded, EngineLimits(await_others=await_others, share_prefixes=False)) as engine:

        async def decode(number: int, num_tokens: int, position: int) -> None:
            draw = random.Random(seed * 1000 + number)  # noqa: S311 - a jitter
            for offset in range(num_tokens):
                started = time.perf_counter()
                await engine.step(StepCall(f"s{number}", position + offset, [4], 1))
                latencies.append(time.perf_counter() - started)
                await asyncio.sleep((arguments.gap_ms + draw.expovariate(1.0) * arguments.jitter_ms) / 1000)

        async def decode_all(num_tokens: int, position: int) -> None:
            await asyncio.gather(*(decode(number, num_tokens, position) for number in range(sessions)))

        await asyncio.gather(*(engine.step(StepCall(f"s{n}", 0, PROMPT, 1)) for n in range(sessions)))
        await decode_all(arguments.tokens // 4, len(PROMPT))  # rhythms and costs are learned
        latencies.clear()
        forwards, cpu, began = engine.load().num_forwards, time.process_time(), time.perf_counter()
        await decode_all(arguments.tokens, len(PROMPT) + arguments.tokens // 4)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        forwards = engine.load().num_forwards - forwards
    total, ordered = sessions * arguments.tokens, sorted(latencies)
    return Run(
        sessions=sessions,
        await_others=await_others,
        tokens_per_second=total / seconds,
        tokens_per_forward=total / forwards,
        latency_p50_ms=ordered[len(ordered) // 2] * 1000,
        latency_p95_ms=ordered[int(len(ordered) * 0.95)] * 1000,
        cpu_ms_per_token=cpu / total * 1000,
    )


def _print_table(runs: list[Run]) -> None:
    names = (
        "tokens_per_second",
        "tokens_per_forward",
        "latency_p50_ms",
        "latency_p95_ms",
        "cpu_ms_per_token",
    )
    print(f"{'sessions':>8} {'waits':>6}" + "".join(f"{name:>20}" for name in names))
    for sessions in sorted({run.sessions for run in runs}):
        medians: dict[bool, list[float]] = {}
        for waits in (False, True):
            mine = [run for run in runs if (run.sessions, run.await_others) == (sessions, waits)]
            medians[waits] = [statistics.median(getattr(run, name) for run in mine) for name in names]
            print(
                f"{sessions:>8} {'yes' if waits else 'no':>6}" + "".join(f"{m:20.2f}" for m in medians[waits])
            )
        ratios = [new / old for new, old in zip(medians[True], medians[False], strict=True)]
        print(f"{sessions:>8} {'ratio':>6}" + "".join(f"{ratio:20.2f}" for ratio in ratios))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=60, help="of each session")
    parser.add_argument("--gap-ms", type=float, default=3.0, help="from an answer to the next step, at least")
    parser.add_argument("--jitter-ms", type=float, default=3.0, help="mean of what comes on top")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
