"""The decode loop with models that answer as a test wants: what is waited for, and what an interruption reaches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusionroute.engine import StepCall
from fusionroute.fusion import CombineRule, ExpertChoice, HeadLayout
from fusionroute.sampling import Sampling
from fusionroute.short_rows import ShortRow
from router_service.asking import Answer, Patience
from router_service.drafting import Drafter, DraftingMode
from router_service.ensemble import Ensemble
from router_service.generation import TurnWriter, drafters_of, drafting_mode
from router_service.session_text import Text
from router_service.stored_session import FinishReason
from router_service.text import AnswerText
from router_service.turn_request import Turn, Wishes

WIDTH = 8
END = 1
HELD_SECONDS = 0.05


@dataclass
class FakeModel:
    """Its own and only cache: gives equal logits for all ids, of which the highest few leave every token open."""

    slot: str
    name: str = "a@1"
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    is_held: bool = False

    async def locate(self, text: Text, deadline: float) -> FakeModel:
        return self

    def another(self, text: Text, cache: Any) -> None:
        return None

    def can_be_asked(self, text: Text) -> bool:
        return True

    def absent_seconds(self, text: Text) -> float:
        return 0.0

    def report(self, *facts: object) -> None:
        raise AssertionError(facts)

    def seconds_until_retry(self) -> float:
        return 0.0

    async def step(self, call: StepCall, deadline: float, top_logits: int = 0) -> Answer:
        rows = np.zeros((1, WIDTH), np.float32)
        top: tuple[ShortRow, ...] = ()
        if top_logits:
            rows, top = rows[:0], (ShortRow(np.arange(2), np.zeros(2, np.float32), WIDTH),)
        elif self.slot:
            self.is_held = True
            await self.hold.wait()
        return Answer(rows, None if self.slot else np.zeros((1, 1), np.float32), 1, self.name, 0.0, top=top)


def writer_of(expert: FakeModel, is_cancelled: Callable[[], bool]) -> TurnWriter:
    """Of a turn of two tokens; a short reply never suffices, as unknown logits may be equal."""

    async def room() -> None:
        return

    log: Any = SimpleNamespace(room=room, append=lambda record: None, cancel_requested=False)
    patience = Patience(10.0)
    return TurnWriter(
        ensemble=Ensemble(
            router=FakeModel(""),
            experts=[expert],
            layout=HeadLayout(1),
            end_ids=frozenset({END}),
            max_context_tokens=64,
            router_patience=patience,
            expert_patience=patience,
            degrade_after_seconds=1.0,
            early=False,
            top_logits=2,
        ),
        turn=Turn(CombineRule.SUM, Sampling(logit_bias={5: 1.0}), 2, (), False, None, "c", ("math",)),
        wishes=Wishes(False, 0, DraftingMode.OFF),
        text=Text("s", 1, [3, 4]),
        answer_position=2,
        answer_text=AnswerText(lambda ids: "x" * len(ids)),
        log=log,
        is_cancelled=is_cancelled,
    )


async def write(writer: TurnWriter) -> list[int]:
    return [token.record.token_id async for token in writer.write()]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10.0):
        while not true():
            await asyncio.sleep(0.001)


async def test_a_cancellation_interrupts_asking_for_the_whole_row_after_a_short_reply() -> None:
    expert, cancelled = FakeModel("math"), False
    writer = writer_of(expert, lambda: cancelled)
    task = asyncio.create_task(write(writer))
    await until(lambda: expert.is_held)
    assert writer.is_asking
    cancelled = True
    task.cancel()
    assert await task == []
    assert writer.ending is not None
    assert writer.ending.reason is FinishReason.CANCELLED


async def test_only_who_cancels_the_turn_ends_it_so() -> None:
    expert = FakeModel("math")
    writer = writer_of(expert, lambda: False)
    task = asyncio.create_task(write(writer))
    await until(lambda: expert.is_held)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert writer.ending is None


async def test_waiting_for_the_whole_row_is_time_of_the_expert() -> None:
    expert = FakeModel("math")
    writer = writer_of(expert, lambda: False)
    task = asyncio.create_task(write(writer))
    await until(lambda: expert.is_held)
    await asyncio.sleep(HELD_SECONDS)
    assert writer.is_asking
    expert.hold.set()
    assert await task == [5, 5]
    assert writer.costs.expert_seconds >= HELD_SECONDS
    assert not writer.is_asking


@pytest.mark.parametrize(
    ("rule", "choice", "automatic", "drafters"),
    [
        (CombineRule.SUM, ExpertChoice.ROUTED, DraftingMode.AUTO, set(Drafter)),
        (CombineRule.SUM, ExpertChoice.RANDOM, DraftingMode.OFF, set(Drafter)),
        (CombineRule.PROXY, ExpertChoice.ROUTED, DraftingMode.OFF, set(Drafter)),
        (CombineRule.ENSEMBLE, ExpertChoice.ROUTED, DraftingMode.OFF, {Drafter.LOOKUP}),
    ],
)
def test_nobody_drafts_for_baselines_unless_named(
    rule: CombineRule, choice: ExpertChoice, automatic: DraftingMode, drafters: set[Drafter]
) -> None:
    turn = Turn(rule, Sampling(), 2, (), False, None, "c", ("math",), expert_choice=choice)
    assert drafting_mode(turn, Wishes()) is automatic
    assert set(drafters_of(turn)) == drafters
    for mode in DraftingMode:
        if mode is not DraftingMode.AUTO:
            assert drafting_mode(turn, Wishes(drafting=mode)) is mode
