"""Asking for a row: what is sent again, what is waited for, and what is given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from fusionroute.engine import Draft, StepCall
from fusionroute.errors import (
    FusionRouteError,
    InternalFault,
    OutOfRoom,
    Reason,
    SessionStateError,
    Unavailable,
)
from router_service.asking import Answer, Patience, ask
from router_service.records import TokenRecord, TokenSource, pack, pack_prompt, unpack
from router_service.session_text import Text, Wanted

PATIENCE = Patience(20.0, attempt_seconds=1.0)


@dataclass
class FakeCache:
    """Answers with errors as long as it has some."""

    name: str = "a@1"
    epoch: int = 7
    errors: list[FusionRouteError] = field(default_factory=list)
    calls: list[StepCall] = field(default_factory=list)
    allowed_seconds: list[float] = field(default_factory=list)

    async def step(self, call: StepCall, deadline: float, top_logits: int = 0) -> Answer:
        self.calls.append(call)
        self.allowed_seconds.append(deadline - time.monotonic())
        if self.errors:
            raise self.errors.pop(0)
        return Answer(np.zeros((1, 3), np.float32), None, self.epoch, self.name, 0.0)


@dataclass
class FakeModel:
    """A slot with one cache at a time."""

    cache: FakeCache
    slot: str = "math"
    reports: list[Reason] = field(default_factory=list)
    on_report: Callable[[FakeModel], None] = lambda model: None

    async def locate(self, text: Text, deadline: float) -> FakeCache:
        return self.cache

    def another(self, text: Text, cache: object) -> None:
        return None

    def can_be_asked(self, text: Text) -> bool:
        return True

    def absent_seconds(self, text: Text) -> float:
        return 0.0

    def report(self, cache: object, error: FusionRouteError, began: float) -> None:
        self.reports.append(error.reason)
        self.on_report(self)

    def seconds_until_retry(self) -> float:
        return 0.0


def gone() -> Unavailable:
    return Unavailable(Reason.EXPERT_UNAVAILABLE, "refused")


def silent() -> Unavailable:
    return Unavailable(Reason.DEADLINE_PASSED, "too late")


async def test_only_what_the_cache_lacks_is_sent() -> None:
    model, text = FakeModel(FakeCache()), Text("s", 1, [4, 5, 6])
    await ask(model, text, PATIENCE)
    text.tokens += [7, 8]
    await ask(model, text, PATIENCE)
    sent = [(call.from_position, list(call.token_ids)) for call in model.cache.calls]
    assert sent == [(0, [4, 5, 6]), (3, [7, 8])]
    assert (text.num_replays, text.num_retries) == (0, 0)


async def test_a_lost_cache_is_sent_everything_without_a_pause_and_counted() -> None:
    model, text = FakeModel(FakeCache()), Text("s", 1, [4, 5])
    await ask(model, text, PATIENCE)
    model.cache.errors = [SessionStateError(Reason.SESSION_UNKNOWN, "evicted")]
    text.tokens.append(6)
    await ask(model, text, PATIENCE)
    assert [call.from_position for call in model.cache.calls] == [0, 2, 0]
    assert (text.num_replays, text.num_retries) == (1, 0)


async def test_going_on_with_another_instance_is_a_replay_and_coming_back_is_none() -> None:
    first, second = FakeCache("a@1"), FakeCache("b@1")
    model, text = FakeModel(first), Text("s", 1, [4, 5])
    await ask(model, text, PATIENCE)
    model.cache = second
    text.tokens.append(6)
    await ask(model, text, PATIENCE)
    model.cache = first
    text.tokens.append(7)
    await ask(model, text, PATIENCE)
    assert [call.from_position for call in first.calls] == [0, 2]
    assert text.num_replays == 1
    assert text.home("math") == "a@1"


async def test_an_instance_that_is_gone_is_asked_again_and_another_one_answers() -> None:
    model, text = FakeModel(FakeCache("a@1", errors=[gone() for _ in range(9)])), Text("s", 1, [4])

    def replace_after_two(model: FakeModel) -> None:
        if len(model.reports) == 2:
            model.cache = FakeCache("b@1")

    model.on_report = replace_after_two
    assert (await ask(model, text, PATIENCE)).cache == "b@1"
    assert text.num_retries == 2


async def test_attempts_after_silence_may_take_twice_as_long() -> None:
    model, text = FakeModel(FakeCache(errors=[silent(), silent()])), Text("s", 1, [4])
    await ask(model, text, PATIENCE)
    assert model.cache.allowed_seconds == pytest.approx([1.0, 2.0, 4.0], abs=0.2)


async def test_an_attempt_that_sends_many_tokens_may_take_longer() -> None:
    model, text = FakeModel(FakeCache()), Text("s", 1, [4] * 101)
    await ask(model, text, PATIENCE)
    assert model.cache.allowed_seconds == pytest.approx([3.0], abs=0.2)


async def test_an_internal_fault_is_tried_once_more_and_then_raised() -> None:
    fault = InternalFault(Reason.NON_FINITE_LOGITS, "NaN")
    model = FakeModel(FakeCache(errors=[fault]))
    await ask(model, Text("s", 1, [4]), PATIENCE)
    model = FakeModel(FakeCache(errors=[fault, fault, fault]))
    with pytest.raises(InternalFault):
        await ask(model, Text("s", 1, [4]), PATIENCE)
    assert len(model.cache.calls) == 2


async def test_what_the_caller_did_wrong_is_raised_at_once() -> None:
    stale = SessionStateError(Reason.STALE_FENCE, "fence 1 < 2")
    model = FakeModel(FakeCache(errors=[stale]))
    with pytest.raises(SessionStateError):
        await ask(model, Text("s", 1, [4]), PATIENCE)
    assert not model.reports


async def test_patience_for_one_that_is_absent_ends_before_that_for_one_that_is_full() -> None:
    less = PATIENCE.while_absent(0.1, 1.0)
    model = FakeModel(FakeCache(errors=[gone() for _ in range(999)]))
    with pytest.raises(Unavailable):
        await ask(model, Text("s", 1, [4]), less)
    full = OutOfRoom(Reason.KV_MEMORY_FULL, "full", retry_after_seconds=0.3)
    model = FakeModel(FakeCache(errors=[full, full]))
    await ask(model, Text("s", 1, [4]), less)
    assert len(model.cache.calls) == 3


def test_a_resumed_text_goes_on_above_the_epochs_of_its_latest_turn() -> None:
    records = unpack(
        pack_prompt([4, 5])
        + pack(
            [
                TokenRecord(6, 0.0, TokenSource.EXPERT, 1, 31),
                TokenRecord(7, 0.0, TokenSource.EXPERT, 0, 12, degraded=True),
                TokenRecord(8, 0.0, TokenSource.EXPERT, 1, 30),
                TokenRecord(9, 0.0, TokenSource.ROUTER),
            ]
        )
    )
    text = Text.resumed("s", 1, records, 2, ("math", "strings"))
    assert text.tokens == [4, 5, 6, 7, 8, 9]
    assert (text.floor("math"), text.floor("strings"), text.floor("format")) == (12, 31, 0)
    assert Text.resumed("s", 1, records, 5, ("math", "strings")).floor("strings") == 0


@dataclass
class Answering(FakeCache):
    """Answers what it was told to."""

    answer: Answer = field(default_factory=lambda: Answer(np.zeros((1, 3), np.float32), None, 7, "a@1", 0.0))

    async def step(self, call: StepCall, deadline: float, top_logits: int = 0) -> Answer:
        self.calls.append(call)
        return self.answer


async def test_what_a_cache_holds_beyond_the_text_counts_as_far_as_it_comes_true() -> None:
    rows = np.zeros((3, 9), np.float32)
    model = FakeModel(Answering(answer=Answer(rows, None, 7, "a@1", 0.0)))
    text = Text("s", 1, [4, 5])
    await ask(model, text, PATIENCE, Wanted([6, 7], range(3)))
    text.tokens += [6, 8]  # the second drafted token was another one
    model.cache = FakeCache()
    await ask(model, text, PATIENCE)
    assert text.cached_length("a@1") == 4
    assert [(c.from_position, list(c.token_ids)) for c in model.cache.calls] == [(3, [8])]


async def test_only_rows_asked_for_are_named_and_only_tokens_up_to_the_last_of_them_sent() -> None:
    text = Text("s", 1, [4, 5])
    call = text.call("a@1", 0.0, Wanted([6, 7, 8], [0, 2]))
    assert (call.token_ids, call.num_rows, list(call.row_indices)) == ([4, 5, 6, 7], 0, [1, 3])
    assert (call.from_position, call.end_position) == (0, 4)
    tail = text.call("a@1", 0.0, Wanted([6, 7, 8], [1, 2]))
    assert (tail.token_ids, tail.num_rows, list(tail.row_indices)) == ([4, 5, 6, 7], 2, [])


@pytest.mark.parametrize(
    "answer",
    [
        Answer(np.zeros((0, 3), np.float32), None, 7, "a@1", 0.0),
        Answer(np.zeros((2, 3), np.float32), None, 7, "a@1", 0.0, (1,)),
        Answer(np.zeros((4, 3), np.float32), None, 7, "a@1", 0.0, (1, 2, 3)),
        Answer(np.zeros((3, 3), np.float32), None, 7, "a@1", 0.0, (1, 3)),
    ],
)
async def test_an_answer_of_another_size_or_with_ids_that_do_not_exist_is_a_fault(answer: Answer) -> None:
    model, text = FakeModel(Answering(answer=answer)), Text("s", 1, [4, 5])
    wanted = Wanted(drafting=Draft(2)) if answer.drafted_ids != (1,) else Wanted()
    with pytest.raises(InternalFault, match=r"rows and .* drafted tokens"):
        await ask(model, text, PATIENCE, wanted)
    assert text.cached_length("a@1") == 0
