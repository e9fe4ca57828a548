"""A stream over routers that break at any point: every token once, in order, and Finished once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.errors import FusionRouteError, OutOfRoom, Reason, SessionStateError, Unavailable
from fusionroute.unbroken import Patience, identified, unbroken
from fusionroute.v1.router_pb2 import Finished, GenerateRequest, GenerationEvent, Started, Token

PASSING: list[FusionRouteError] = [
    Unavailable(Reason.EXPERT_UNAVAILABLE, "connection reset", metadata={"transport": "UNAVAILABLE"}),
    Unavailable(Reason.DRAINING, "the router stops"),
    Unavailable(Reason.STORE_UNAVAILABLE, "Redis is away", retry_after_seconds=0.001),
    SessionStateError(Reason.LEASE_LOST, "overtaken"),
    SessionStateError(Reason.SESSION_BUSY, "busy"),
]
BRIEF = Patience(total_seconds=20.0, stall_seconds=5.0, silent_seconds=0.05)


@dataclass
class Break:
    """After how many events a stream breaks, and how: an error, its end, or silence."""

    num_events: int
    how: FusionRouteError | str


@dataclass
class FakeRouters:
    """Routers of one turn of known tokens, whose streams break as planned; afterwards they do not."""

    ids: list[int]
    breaks: list[Break] = field(default_factory=list)
    turns: dict[tuple[str, str], Started] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    num_turned: int = 0

    async def generate(
        self, request: GenerateRequest, timeout_seconds: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        plan = self._plan()
        self.asked.append("generate")
        started = Started(session_id=request.session_id, num_prompt_tokens=3, seed=request.sampling.seed)
        if plan is None or plan.num_events:
            started = self.turns.setdefault((request.session_id, request.request_id), started)
        async for event in self._events(started, 0, plan):
            yield event

    async def resume(
        self, session_id: str, from_token: int, timeout_seconds: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        plan = self._plan()
        self.asked.append(f"resume {from_token}")
        [started] = [turn for (session, _), turn in self.turns.items() if session == session_id]
        async for event in self._events(started, from_token, plan):
            yield event

    def turn_to_next(self) -> None:
        self.num_turned += 1

    def _plan(self) -> Break | None:
        return self.breaks.pop(0) if self.breaks else None

    async def _events(
        self, started: Started, from_token: int, plan: Break | None
    ) -> AsyncGenerator[GenerationEvent, None]:
        events = [GenerationEvent(started=started)]
        events += [
            GenerationEvent(token=Token(index=index, id=self.ids[index]))
            for index in range(from_token, len(self.ids))
        ]
        events.append(GenerationEvent(finished=Finished(num_generated_tokens=len(self.ids))))
        for number, event in enumerate(events):
            if plan is not None and number == plan.num_events:
                break
            yield event
        if plan is None:
            return
        if isinstance(plan.how, FusionRouteError):
            raise plan.how
        if plan.how == "silence":
            await asyncio.sleep(60)


async def read(routers: FakeRouters, request: GenerateRequest | None = None) -> tuple[list[int], int, int]:
    """The ids, and how often Started and Finished came."""
    ids: list[int] = []
    num_started = num_finished = 0
    async with aclosing(unbroken(routers, request or GenerateRequest(text="x"), BRIEF)) as events:
        async for event in events:
            match event.WhichOneof("event"):
                case "started":
                    num_started += 1
                case "token":
                    assert event.token.index == len(ids)
                    ids.append(event.token.id)
                case "finished":
                    num_finished += 1
    return ids, num_started, num_finished


BREAKS = st.builds(
    Break, st.integers(0, 12), st.one_of(st.sampled_from(PASSING), st.sampled_from(["end", "end", "silence"]))
)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 99), max_size=9), breaks=st.lists(BREAKS, max_size=4))
def test_breaks_at_any_point_neither_lose_nor_repeat_a_token(ids: list[int], breaks: list[Break]) -> None:
    routers = FakeRouters(ids, list(breaks))
    assert asyncio.run(read(routers)) == (ids, 1, 1)
    assert len(routers.turns) == 1
    assert routers.num_turned <= len(breaks)


async def test_a_break_is_mended_at_the_next_token_by_another_router() -> None:
    routers = FakeRouters([7, 8, 9], [Break(3, PASSING[0]), Break(1, PASSING[2])])
    assert await read(routers) == ([7, 8, 9], 1, 1)
    assert routers.asked == ["generate", "resume 2", "resume 2"]
    assert routers.num_turned == 2


async def test_a_request_without_ids_is_the_same_one_each_time() -> None:
    first = identified(GenerateRequest(text="x"))
    assert first.session_id and first.request_id and first.sampling.HasField("seed")
    assert identified(first) == first


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (SessionStateError(Reason.SESSION_UNKNOWN, "deleted", metadata={"deleted": "true"}), 2),
        (SessionStateError(Reason.CHECKPOINT_CHANGED, "other"), 2),
        (SessionStateError(Reason.SESSION_UNKNOWN, "never begun"), 0),
        (OutOfRoom(Reason.QUEUE_FULL, "full"), 0),
    ],
)
async def test_what_going_on_cannot_mend_is_told_at_once(error: FusionRouteError, after: int) -> None:
    routers = FakeRouters([7, 8, 9], [Break(after, error)])
    with pytest.raises(FusionRouteError) as caught:
        await read(routers)
    assert caught.value is error
    assert len(routers.asked) == 1


async def test_a_session_that_redis_lost_is_awaited() -> None:
    lost = SessionStateError(Reason.SESSION_UNKNOWN, "never begun, deleted or expired")
    routers = FakeRouters([7, 8, 9], [Break(2, PASSING[0]), Break(0, lost), Break(0, lost)])
    assert await read(routers) == ([7, 8, 9], 1, 1)


async def test_who_asked_to_fail_without_an_expert_is_told_so() -> None:
    error = Unavailable(Reason.EXPERT_UNAVAILABLE, "nobody serves math")
    request = GenerateRequest(text="x", on_expert_unavailable="ON_EXPERT_UNAVAILABLE_FAIL")
    with pytest.raises(Unavailable):
        await read(FakeRouters([7], [Break(1, error)]), request)
    assert (await read(FakeRouters([7], [Break(1, PASSING[0])]), request))[0] == [7]


async def test_an_answer_that_goes_on_differently_is_refused() -> None:
    class Forking(FakeRouters):
        def turn_to_next(self) -> None:
            self.ids = self.ids[:1]

    with pytest.raises(SessionStateError) as caught:
        await read(Forking([7, 8, 9], [Break(3, PASSING[0])]))
    assert caught.value.reason is Reason.TURN_FORKED


async def test_routers_that_never_get_anywhere_are_given_up() -> None:
    routers = FakeRouters([7, 8], [Break(2, PASSING[1]) for _ in range(1)] + [Break(1, PASSING[1])] * 1000)
    brief = Patience(total_seconds=30.0, stall_seconds=0.4, silent_seconds=0.1)
    async with asyncio.timeout(20):
        with pytest.raises(Unavailable):
            async for _ in unbroken(routers, GenerateRequest(text="x"), brief):
                pass
    assert len(routers.asked) > 2
