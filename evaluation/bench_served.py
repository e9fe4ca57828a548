"""A running stack as the benchmarks ask it: whole turns with the arrival of each token, many at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise

from fusionroute.client import RouterClient
from fusionroute.v1.router_pb2 import (
    CombineRule,
    Drafting,
    GenerateRequest,
    GenerationStatistics,
    TokenIds,
)


@dataclass(slots=True)
class ServedTurn:
    """What one turn brought.

    Attributes:
        arrived: of each token, seconds after the request was sent.
        experts: slot that took part in each token; "" = none.
        num_prompt_tokens: of the session before the answer.
        seconds: until the stream ended.
    """

    session_id: str = ""
    ids: list[int] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    seconds: float = 0.0
    statistics: GenerationStatistics = field(default_factory=GenerationStatistics)

    @property
    def gaps(self) -> list[float]:
        """Seconds from each token to the next, one fewer than there are tokens."""
        return [after - before for before, after in pairwise(self.arrived)]

    def familiar_gaps(self, *, changed: bool | None = None) -> list[float]:
        """Those gaps whose token's expert had written in this turn before: without the prefill of an expert.

        Args:
            changed: only those whose expert is another one than that of the token before, or only those where it is
                the same; None = both.
        """
        seen: set[str] = set(self.experts[:1])
        kept: list[float] = []
        for gap, (before, expert) in zip(self.gaps, pairwise(self.experts), strict=True):
            if expert in seen and changed in (None, before != expert):
                kept.append(gap)
            seen.add(expert)
        return kept


@dataclass(slots=True)
class ServedStack:
    """A stack that runs.

    Attributes:
        checkpoint: of its router.
        experts: folders by slot.
        pids: by process name, with what each has started.
        addresses: by process name.
        http_urls: by process name, of those that speak HTTP.
    """

    router: RouterClient
    checkpoint: str
    experts: Mapping[str, str]
    pids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)
    http_urls: Mapping[str, str] = field(default_factory=dict)
    _finished: list[str] = field(default_factory=list)

    @property
    def all_pids(self) -> list[int]:
        """Of every process of the stack."""
        return [pid for of_process in self.pids.values() for pid in of_process]

    async def turn(self, request: GenerateRequest) -> ServedTurn:
        """One turn to its end; its session stays until `tidy`."""
        turn, started = ServedTurn(), time.perf_counter()
        async with aclosing(self.router.generate(request)) as events:
            async for event in events:
                kind = event.WhichOneof("event")
                if kind == "token":
                    turn.arrived.append(time.perf_counter() - started)
                    turn.ids.append(event.token.id)
                    turn.experts.append(event.token.expert)
                elif kind == "started":
                    turn.session_id = event.started.session_id
                    turn.num_prompt_tokens = event.started.num_prompt_tokens
                else:
                    turn.statistics = event.finished.statistics
        turn.seconds = time.perf_counter() - started
        self._finished.append(turn.session_id)
        return turn

    async def turns(self, requests: Sequence[GenerateRequest]) -> list[ServedTurn]:
        """Several turns at a time, in the order of the requests."""
        return await asyncio.gather(*(self.turn(request) for request in requests))

    async def tidy(self) -> None:
        """Forgets the sessions of all turns that have ended."""
        sessions, self._finished = self._finished, []
        for session_id in sessions:
            await self.router.delete_session(session_id)


def request_for(
    prompt_ids: Sequence[int],
    num_tokens: int,
    *,
    drafting: Drafting.ValueType = Drafting.DRAFTING_OFF,
    combine: CombineRule.ValueType = CombineRule.COMBINE_RULE_SUM,
    fixed_expert: str = "",
    temperature: float = 0.0,
    seed: int = 1,
    ignore_eos: bool = True,
) -> GenerateRequest:
    """`num_tokens` new tokens after a prompt, fewer only where its end counts; greedy where the temperature is 0."""
    request = GenerateRequest(
        token_ids=TokenIds(ids=prompt_ids), combine=combine, fixed_expert=fixed_expert, drafting=drafting
    )
    request.sampling.max_tokens = num_tokens
    request.sampling.ignore_eos = ignore_eos
    request.sampling.temperature = temperature
    request.sampling.seed = seed
    return request
