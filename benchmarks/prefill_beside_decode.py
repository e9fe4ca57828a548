"""Token latency of decoding sessions with and without a long prompt beside them, bounded prefills against unbounded.

python benchmarks/prefill_beside_decode.py --decoding 4 --prompt-tokens 4000

Both ways run in turn, several times, on one engine each with the same random weights.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import torch

from benchmarks.random_llama import WIDTH, random_llama
from fusionroute.engine import Engine, EngineLimits, LoadedModel, StepCall, prepare_model
from tests.tiny_models import word_tokenizer

UNBOUNDED_SECONDS = 1e9


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    latencies: dict[tuple[str, str], list[float]] = {}
    prefills: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, seconds in (("unbounded", UNBOUNDED_SECONDS), ("bounded", arguments.mixed_forward_seconds)):
            alone, beside, prefill = asyncio.run(_measure(arguments, seconds))
            latencies.setdefault((name, "alone"), []).extend(alone)
            latencies.setdefault((name, "beside the prompt"), []).extend(beside)
            prefills.setdefault(name, []).append(prefill)
    print(f"{arguments.decoding} sessions decode; the prompt has {arguments.prompt_tokens} tokens")
    print(f"{'prefills':12}{'decoding':20}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'prefill s':>11}")
    for (name, when), values in latencies.items():
        ordered = sorted(values)
        shown = [ordered[int(share * (len(ordered) - 1))] * 1000 for share in (0.5, 0.99, 1.0)]
        took = f"{statistics.median(prefills[name]):11.2f}" if when != "alone" else ""
        print(f"{name:12}{when:20}" + "".join(f"{value:9.1f}" for value in shown) + took)


async def _measure(arguments: argparse.Namespace, seconds: float) -> tuple[list[float], list[float], float]:
    """Latencies alone, latencies beside the prompt, and how long the prompt took."""
    limits = EngineLimits(mixed_forward_seconds=seconds)
    async with Engine(_model(arguments), limits) as engine:
        alone: list[float] = []
        beside: list[float] = []
        current = alone
        stop = asyncio.Event()

        async def decode(name: str) -> None:
            await engine.step(StepCall(name, 0, [3] * 20, 1))
            position = 20
            while not stop.is_set():
                started = time.perf_counter()
                await engine.step(StepCall(name, position, [4], 1))
                current.append(time.perf_counter() - started)
                position += 1

        decoding = [asyncio.create_task(decode(f"d{index}")) for index in range(arguments.decoding)]
        await asyncio.sleep(arguments.seconds_alone)
        current = beside
        started = time.perf_counter()
        prompt = [2 + index % 50 for index in range(arguments.prompt_tokens)]
        await engine.step(StepCall("prompt", 0, prompt, 1))
        prefill = time.perf_counter() - started
        stop.set()
        await asyncio.gather(*decoding)
        return alone, beside, prefill


def _model(arguments: argparse.Namespace) -> LoadedModel:
    model = random_llama(
        hidden=arguments.hidden,
        layers=arguments.layers,
        intermediate=3 * arguments.hidden,
        max_tokens=8192,
    )
    return prepare_model(model, word_tokenizer(WIDTH), name="bench", epoch=1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--decoding", type=int, default=4, help="sessions that decode")
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds-alone", type=float, default=2.0)
    parser.add_argument("--mixed-forward-seconds", type=float, default=EngineLimits().mixed_forward_seconds)
    parser.add_argument("--hidden", type=int, default=256, help="of the random model")
    parser.add_argument("--layers", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
