"""How long a token takes: one model by `generate`, the fused reference in one process, the served stack.

All three take turns, run after run, so that a slow minute of the machine hits all of them. The served stack
also says where its time goes.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from evaluation.bench_reference import CachedFusion, generate_with_one, load_causal_lm, seconds_of
from fusionroute.client import RouterClient
from fusionroute.v1.router_pb2 import (
    CombineRule,
    GenerateRequest,
    GenerationStatistics,
    TokenIds,
)

NUM_WARMUP_RUNS = 2
REFERENCE = "in-process fused reference, cached"
SERVED = "served stack, as the client sees it"


@dataclass(frozen=True, slots=True)
class Speed:
    """Milliseconds per token over several runs."""

    name: str
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the runs."""
        return statistics.median(self.runs)


@dataclass(frozen=True, slots=True)
class Report:
    """What one benchmark run found.

    Attributes:
        configuration: machine, versions, sizes.
        speeds: ms per token of each way to decode.
        shares: ms per token of the served stack by where it went, of the run with the median total.
        num_equal_ids: how many of the served ids equal those of the reference.
    """

    configuration: Mapping[str, Any]
    speeds: tuple[Speed, ...]
    shares: Mapping[str, float]
    num_equal_ids: int

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        speeds = [{**asdict(speed), "median": speed.median} for speed in self.speeds]
        return {
            "configuration": dict(self.configuration),
            "ms_per_token": speeds,
            "served_ms_per_token_by_part": dict(self.shares),
            "served_ids_equal_to_reference": self.num_equal_ids,
        }


@dataclass(slots=True)
class Served:
    """A running stack, asked over one connection."""

    router: RouterClient
    prompt_ids: Sequence[int]
    num_tokens: int
    statistics: list[GenerationStatistics] = field(default_factory=list)

    async def generate(self) -> list[int]:
        """Greedy plain sum, `num_tokens` new ids in a new session."""
        request = GenerateRequest(
            token_ids=TokenIds(ids=self.prompt_ids), combine=CombineRule.COMBINE_RULE_SUM
        )
        request.sampling.max_tokens = self.num_tokens
        request.sampling.ignore_eos = True
        ids: list[int] = []
        session_id = ""
        async with aclosing(self.router.generate(request)) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "started":
                    session_id = event.started.session_id
                elif kind == "token":
                    ids.append(event.token.id)
                else:
                    self.statistics.append(event.finished.statistics)
        await self.router.delete_session(session_id)
        return ids


async def measure(
    router: RouterClient,
    checkpoint: str | Path,
    experts: Mapping[str, str | Path],
    prompt_ids: Sequence[int],
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    on_run: Callable[[int], None] = lambda number: None,
) -> Report:
    """Measures all three ways on the same prompt.

    Args:
        router: a client of the running stack.
        checkpoint: the router checkpoint that the stack serves.
        experts: the folders of its experts by slot.
        prompt_ids: the prompt.
        num_tokens: new tokens of each run.
        num_runs: measured runs of each way, after `NUM_WARMUP_RUNS` that are not.
        threads: of torch in this process; give the services as many.
        on_run: told the number of each run that ends, warm-up included.
    """
    import torch

    torch.set_num_threads(threads)
    fusion = CachedFusion.load(checkpoint, experts)
    slot, folder = next(iter(experts.items()))
    single = load_causal_lm(folder)
    served = Served(router, prompt_ids, num_tokens)
    times: dict[str, list[float]] = {f"HF generate, expert {slot} alone": [], REFERENCE: [], SERVED: []}
    alone = next(iter(times))
    for number in range(NUM_WARMUP_RUNS + num_runs):
        seconds, _ = seconds_of(lambda: generate_with_one(single, prompt_ids, num_tokens))
        times[alone].append(seconds)
        seconds, reference_ids = seconds_of(lambda: fusion.generate(prompt_ids, num_tokens))
        times[REFERENCE].append(seconds)
        started_at = time.perf_counter()
        served_ids = await served.generate()
        times[SERVED].append(time.perf_counter() - started_at)
        on_run(number)
    speeds = tuple(
        Speed(name, tuple(1000 * each / num_tokens for each in seconds[NUM_WARMUP_RUNS:]))
        for name, seconds in times.items()
    )
    return Report(
        configuration=configuration(single, fusion, prompt_ids, num_tokens, num_runs, threads),
        speeds=speeds,
        shares=shares(served.statistics[NUM_WARMUP_RUNS:], num_tokens),
        num_equal_ids=sum(a == b for a, b in zip(served_ids, reference_ids, strict=True)),
    )


def shares(turns: Sequence[GenerationStatistics], num_tokens: int) -> dict[str, float]:
    """Milliseconds per token by where they went, of the turn with the median total.

    "wire" is what waiting for experts took beyond their forwards: queue, serialising, sockets. "rest" is what
    the router's total holds beyond all parts.
    """
    turn = sorted(turns, key=lambda each: each.total_seconds)[len(turns) // 2]
    parts = {
        "router forward": turn.router_seconds,
        "expert forward": turn.expert_forward_seconds,
        "wire": turn.expert_seconds - turn.expert_forward_seconds,
        "fuse": turn.fuse_seconds,
        "redis": turn.store_seconds,
    }
    parts["rest"] = turn.total_seconds - sum(parts.values())
    parts["total"] = turn.total_seconds
    return {name: 1000 * seconds / num_tokens for name, seconds in parts.items()}


def configuration(
    model: Any, fusion: CachedFusion, prompt_ids: Sequence[int], num_tokens: int, num_runs: int, threads: int
) -> dict[str, Any]:
    """Everything without which the numbers mean nothing."""
    config = model.config
    num_switches = sum(a != b for a, b in zip(fusion.chosen, fusion.chosen[1:], strict=False))
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_process": threads,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "grpcio", "fusionroute")},
        "model": config.model_type,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "experts": len(fusion.experts),
        "prompt_tokens": len(prompt_ids),
        "new_tokens": num_tokens,
        "runs": num_runs,
        "warmup_runs": NUM_WARMUP_RUNS,
        "combine": "sum",
        "expert_switches": num_switches,
    }


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
