"""All ways in turn, run after run, the served stack among them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Report
from evaluation.bench_runs import OnRun, take_turns
from evaluation.bench_runs import Way as Turn
from evaluation.bench_served import ServedStack
from evaluation.peers.findings import Ids, report
from evaluation.peers.genlm import GenlmProduct, PeerFailed
from evaluation.peers.in_process import Prompts
from evaluation.peers.ways import InProcess, Maker, Way, genlm_ways, served_ways

NUM_WARMUPS = 1
NUM_SESSIONS = (1, 8)
HOW_TO_INSTALL = (
    "it is not installed; --install-peers does it, or name the Python of its environment by --genlm-python"
)
LEFT_OUT = "it was left out of this run"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        prompts: token ids, one for each session.
        num_sessions: how many at a time, each number at most that of the prompts.
        threads: of torch in this process and in genlm-control's; give the services as many.
        log: for what genlm-control's process has to say.
        genlm_python: None = it is not measured.
        without_genlm: why, where it is not.
    """

    prompts: Prompts
    num_tokens: int
    num_runs: int
    threads: int
    log: Path
    genlm_python: Path | None = None
    without_genlm: str = HOW_TO_INSTALL
    num_sessions: Sequence[int] = NUM_SESSIONS


async def measure(stack: ServedStack, plan: Plan, on_run: OnRun = lambda done, total: None) -> Report:
    """Measures every way that is there; who is not, or fails, is named with the reason.

    Args:
        stack: with the models that all ways use, two experts or more.
        on_run: told after each run.
    """
    import torch

    torch.set_num_threads(plan.threads)
    models = InProcess.load(stack.checkpoint, stack.experts)
    reference = models.reference(plan.prompts[: max(plan.num_sessions)], plan.num_tokens)
    not_measured: dict[Maker, str] = {}
    written: dict[str, Ids] = {}
    async with AsyncExitStack() as peers:
        try:
            genlm = await _open_genlm(peers, stack, plan)
        except PeerFailed as error:
            genlm, not_measured[Maker.GENLM] = None, str(error)
        ways = _ways(stack, plan, models, genlm)
        runs = await take_turns(
            {way.name: _turn(way, written, not_measured) for way in ways},
            num_runs=plan.num_runs,
            num_warmups=NUM_WARMUPS,
            pids=[*stack.all_pids, *([genlm.process.pid] if genlm is not None else ())],
            tidy=stack.tidy,
            on_run=on_run,
        )
    configuration = _configuration(stack, plan, models) | {"genlm": dict(genlm.versions) if genlm else None}
    kept = [way for way in ways if way.maker not in not_measured]
    kept_runs = {way.name: runs[way.name] for way in kept}
    return report(configuration, kept, kept_runs, written, reference, not_measured)


async def _open_genlm(peers: AsyncExitStack, stack: ServedStack, plan: Plan) -> GenlmProduct:
    if plan.genlm_python is None:
        raise PeerFailed(plan.without_genlm)
    models = (stack.checkpoint, next(iter(stack.experts.values())))
    opened = GenlmProduct.open(plan.genlm_python, models, plan.prompts, threads=plan.threads, log=plan.log)
    return await peers.enter_async_context(opened)


def _ways(stack: ServedStack, plan: Plan, models: InProcess, genlm: GenlmProduct | None) -> list[Way]:
    ways: list[Way] = []
    for number in plan.num_sessions:
        ways += models.ways(plan.prompts, number, plan.num_tokens)
        if genlm is not None:
            ways += genlm_ways(genlm, number, plan.num_tokens)
        ways += served_ways(stack, plan.prompts, number, plan.num_tokens)
    return ways


def _turn(way: Way, written: dict[str, Ids], not_measured: dict[Maker, str]) -> Turn:
    """The way as something that takes turns; one that has failed lets its further turns pass."""

    async def turn(number: int) -> int:
        if way.maker not in not_measured:
            try:
                written[way.name] = await way.write()
            except PeerFailed as error:
                not_measured[way.maker] = str(error)
        return sum(map(len, written.get(way.name, ((0,),))))

    return turn


def _configuration(stack: ServedStack, plan: Plan, models: InProcess) -> dict[str, Any]:
    """Everything without which the numbers mean nothing."""
    chosen = models.fusion.chosen
    return {
        **machine(plan.threads),
        **sizes(next(iter(stack.experts.values()))),
        "router": sizes(stack.checkpoint),
        "experts": len(stack.experts),
        "prompt_tokens": [len(each) for each in plan.prompts],
        "new_tokens": plan.num_tokens,
        "runs": plan.num_runs,
        "warmup_runs": NUM_WARMUPS,
        "combine": "sum",
        "expert_switches": sum(a != b for a, b in pairwise(chosen)),
    }
