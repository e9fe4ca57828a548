"""What a cell of the matrix has shown: counted, held against the undisturbed run, and judged without mercy."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fusionroute.client import RouterClient
from fusionroute.errors import FusionRouteError
from fusionroute.v1.router_pb2 import SESSION_STATE_FINISHED
from tests.chaos.faults import Cell, Hit
from tests.chaos.load import Stream
from tests.chaos.stack import ChaosStack
from tests.equivalence import Case, Verdict
from tests.reference import ReferenceToken

MOST_PROBLEMS = 12
TOLD_SECONDS = 5.0
"""Until an expert that was away has heard of deletions."""


@dataclass(slots=True)
class Judgement:
    """The numbers of one cell.

    Attributes:
        num_hit: generations that were in flight and dependent on the victim when the fault struck.
        num_equal: ids as in the undisturbed run.
        num_ties: as far as a float tie, where candidates are closer than the arithmetic's noise.
        num_broken: streams with a missing, repeated or changed token.
        num_epochs_back: streams in which a slot's epoch went back.
        num_degraded: tokens that another than the routed expert wrote.
        num_stored_different: sessions whose stored tokens are not the stream's.
        longest_pause_seconds: that any client saw between two tokens.
        num_reconnects: streams that clients have taken up again.
        left_behind: keys, leases or sessions that should be gone.
        problems: why the cell fails, for people.
    """

    cell: str
    num_generations: int
    num_hit: int = 0
    num_complete: int = 0
    num_equal: int = 0
    num_ties: int = 0
    num_broken: int = 0
    num_epochs_back: int = 0
    num_degraded: int = 0
    num_stored_different: int = 0
    longest_pause_seconds: float = 0.0
    median_longest_pause_seconds: float = 0.0
    num_reconnects: int = 0
    num_replays: int = 0
    seconds: float = 0.0
    victim: str = ""
    note: str = ""
    left_behind: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    log_excerpt: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Nothing is wrong, and something was tried."""
        return not self.problems and self.num_generations > 0

    def fail(self, problem: str) -> None:
        """Something is wrong."""
        self.problems.append(problem)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


def undisturbed_cases(cases: Sequence[Case], streams: Sequence[Stream]) -> list[Case]:
    """The cases with the undisturbed run's tokens as the wanted ones, with the reference's margins.

    After a float tie the reference has gone another way, so its margins say nothing any more: they count as none.
    """
    expected = []
    for case, stream in zip(cases, streams, strict=True):
        wanted, is_same_way = [], True
        for index, token in enumerate(stream.tokens):
            reference = case.wanted[index] if index < len(case.wanted) else None
            margin = reference.margin if reference is not None and is_same_way else 1.0
            is_same_way = is_same_way and reference is not None and reference.id == token.id
            wanted.append(ReferenceToken(token.id, None, token.logprob, margin))
        expected.append(replace(case, wanted=wanted))
    return expected


def judge_streams(
    cell: Cell, hit: Hit | None, streams: Sequence[Stream], expected: Sequence[Case]
) -> Judgement:
    """All that the clients' streams can show."""
    judgement = Judgement(str(cell), len(streams), num_hit=len(hit.streams) if hit else 0)
    if hit is not None:
        judgement.victim, judgement.note = hit.victim, hit.note
    verdict = Verdict()
    for stream, case in zip(streams, expected, strict=True):
        _judge_stream(judgement, stream)
        if stream.finished is not None:
            verdict.count(case, stream.answer())
    judgement.num_equal, judgement.num_ties = verdict.num_equal, verdict.num_ties
    for difference in verdict.different:
        judgement.fail(f"other tokens: {difference[:400]}")
    pauses = [stream.longest_pause_seconds for stream in streams]
    judgement.longest_pause_seconds = max(pauses, default=0.0)
    judgement.median_longest_pause_seconds = statistics.median(pauses) if pauses else 0.0
    return judgement


def _judge_stream(judgement: Judgement, stream: Stream) -> None:
    name = stream.session_id
    judgement.num_reconnects += len(stream.breaks) + stream.has_left
    judgement.num_degraded += sum(token.degraded for token in stream.tokens)
    if stream.finished is None:
        judgement.fail(f"{name} is not complete ({len(stream.tokens)} tokens): {stream.failure}")
    else:
        judgement.num_complete += 1
        judgement.num_replays += stream.finished.statistics.num_replays
    if [token.index for token in stream.tokens] != list(range(len(stream.tokens))) and not stream.faults:
        stream.faults.append("indexes are not contiguous")
    if stream.faults:
        judgement.num_broken += 1
        judgement.fail(f"{name}: {'; '.join(stream.faults[:3])}")
    if steps_back := epochs_back(stream):
        judgement.num_epochs_back += 1
        judgement.fail(f"{name}: epochs went back: {steps_back[0]}")
    if any(token.degraded for token in stream.tokens):
        judgement.fail(f"{name} has degraded tokens although it asked to wait")


def epochs_back(stream: Stream) -> list[str]:
    """Where a slot's epoch is lower than before."""
    highest: dict[str, int] = {}
    found = []
    for token in stream.tokens:
        if token.expert:
            before = highest.get(token.expert, 0)
            if token.expert_epoch < before:
                found.append(f"{token.expert} at token {token.index}: {before} -> {token.expert_epoch}")
            highest[token.expert] = max(before, token.expert_epoch)
    return found


async def judge_stored(judgement: Judgement, client: RouterClient, streams: Sequence[Stream]) -> None:
    """The stored session is the stream, token by token and in its text."""
    for stream in streams:
        if stream.finished is None:
            continue
        try:
            stored = await client.get_session(stream.session_id)
        except FusionRouteError as error:
            judgement.num_stored_different += 1
            judgement.fail(f"{stream.session_id} cannot be read: {error.reason.value}: {error.message}")
            continue
        ids = list(stored.token_ids[stored.answer_position :])
        prompt = list(stored.token_ids[: stored.answer_position])
        wrong = [
            what
            for what, is_wrong in {
                f"ids {ids} instead of {[t.id for t in stream.tokens]}": ids != [t.id for t in stream.tokens],
                "prompt": prompt != stream.case.prompt,
                "text": stored.answer_text != stream.answer().text,
                f"state {stored.state}": stored.state != SESSION_STATE_FINISHED,
                "no end of life": stored.expires_in_seconds <= 0,
            }.items()
            if is_wrong
        ]
        if wrong:
            judgement.num_stored_different += 1
            judgement.fail(f"{stream.session_id} is stored otherwise: {', '.join(wrong)[:400]}")


async def judge_remains(
    judgement: Judgement, stack: ChaosStack, client: RouterClient, streams: Sequence[Stream]
) -> None:
    """Nothing of the sessions is left: first leases and keys without an end of life, then, deleted, anything at all."""
    left = await _keys(stack, streams, only_wrong=True)
    for stream in streams:
        try:
            await client.delete_session(stream.session_id)
        except FusionRouteError as error:
            left.append(f"{stream.session_id} cannot be deleted: {error.reason.value}")
    left += [f"{key} after deletion" for key in await _keys(stack, streams, only_wrong=False)]
    left += await _cached_sessions(stack, {stream.session_id for stream in streams})
    judgement.left_behind = left
    if left:
        judgement.fail(f"left behind: {', '.join(left[:3])} ({len(left)} in all)")


async def _keys(stack: ChaosStack, streams: Sequence[Stream], *, only_wrong: bool) -> list[str]:
    """Keys of the sessions; with `only_wrong` the leases and those that would stay for ever."""
    names = {f"{{{stream.session_id}}}" for stream in streams}
    found = []
    async with stack.store() as redis:
        async for raw in redis.scan_iter("fr:*", count=1000):
            key = raw.decode()
            ttl_ms = await redis.pttl(raw)
            if ttl_ms == -1:
                found.append(f"{key} (for ever)")
            elif key.split(":")[1] in names:
                part = key.rpartition(":")[2]
                if part == "lease" or (not only_wrong and part in ("meta", "tok")):
                    found.append(key)
    return found


async def _cached_sessions(stack: ChaosStack, names: set[str]) -> list[str]:
    """Sessions that an expert holds although they were deleted, or cannot forget.

    One that was away when they were is told once the router knows it again.
    """
    give_up = time.monotonic() + TOLD_SECONDS
    while await _held(stack, names) and time.monotonic() < give_up:
        await asyncio.sleep(0.2)
    left = []
    for node in stack.experts:
        for session in await stack.sessions(node):
            if session.session_id not in names:
                continue
            is_closed = await stack.close_session(node, session)
            left.append(
                f"{session.session_id} in {node.process.name} after deletion"
                f" ({'closable' if is_closed else 'not closable'})"
            )
    return left


async def _held(stack: ChaosStack, names: set[str]) -> bool:
    for node in stack.experts:
        if any(each.session_id in names for each in await stack.sessions(node)):
            return True
    return False


def excerpt(logs: Mapping[str, str], most_lines: int = 40) -> list[str]:
    """The warnings and errors of the processes' logs."""
    lines = []
    for name, text in logs.items():
        wanted = [
            line
            for line in text.splitlines()
            if '"level": "info"' not in line and '"level":"info"' not in line and line.strip()
        ]
        lines += [f"{name}: {line[:500]}" for line in wanted[-most_lines:]]
    return lines
