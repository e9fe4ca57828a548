"""What becomes of a token whose expert is not there: wait, the next best one, the router alone, or an error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.fusion import CombineRule, Decision, OnExpertUnavailable, next_best, without_expert
from router_service import metrics
from router_service.asking import ABSENT, Answer, Model, Patience, ask
from router_service.session_text import NEXT_ROW, Text, Wanted

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.1
"""How often to look, while no expert is there at all, whether one has come back."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a turn asks for its experts' rows.

    Attributes:
        rule: by which the expert was picked.
        on_unavailable: what to do while that one is not there.
        degrade_after_seconds: how long it may not be there, or not answer for one token sent, before that is done.
    """

    rule: CombineRule
    on_unavailable: OnExpertUnavailable
    degrade_after_seconds: float


async def ask_expert(
    experts: Sequence[Model],
    text: Text,
    decision: Decision,
    policy: Policy,
    patience: Patience,
    wanted: Wanted = NEXT_ROW,
) -> tuple[Decision, Answer | None]:
    """Rows of the picked expert, or the next row of who stands in for it; with the decision as it was carried out.

    Raises:
        FusionRouteError: as `ask`; EXPERT_UNAVAILABLE when the policy knows nobody who could stand in.
    """
    assert decision.expert is not None
    picked = experts[decision.expert]
    if policy.on_unavailable is OnExpertUnavailable.WAIT:
        return decision, await ask(picked, text, patience, wanted)
    deadline = time.monotonic() + patience.row_seconds
    # Counted from when the slot was first seen down: only the first token waits, those that follow go on at once.
    absent_seconds = policy.degrade_after_seconds - picked.absent_seconds(text)
    missing: FusionRouteError | None = None
    if absent_seconds > 0:
        try:
            less = patience.while_absent(absent_seconds, policy.degrade_after_seconds)
            return decision, await ask(picked, text, less, wanted)
        except FusionRouteError as error:
            if error.reason not in ABSENT:
                raise
            missing = error
    match policy.on_unavailable:
        case OnExpertUnavailable.ROUTER_ONLY:
            found: tuple[Decision, Answer | None] = without_expert(decision), None
        case OnExpertUnavailable.NEXT_BEST:
            alone = Wanted(exact=wanted.exact)
            found = await _ask_next_best(experts, text, decision, policy, patience, deadline, alone)
        case _:
            raise _unavailable(picked.slot) from missing
    if found[0].expert != decision.expert:
        metrics.DEGRADED_TOKENS.labels(slot=picked.slot, policy=policy.on_unavailable.value).inc()
    return found


async def _ask_next_best(
    experts: Sequence[Model],
    text: Text,
    decision: Decision,
    policy: Policy,
    patience: Patience,
    deadline: float,
    wanted: Wanted,
) -> tuple[Decision, Answer | None]:
    """Asks one after the other by weight; where nobody is left, waits for any of them to come back."""
    failed = {decision.expert}
    while True:
        found = next_best(
            policy.rule,
            decision,
            lambda index: index not in failed and experts[index].can_be_asked(text),
        )
        if found is None:
            assert decision.expert is not None
            if time.monotonic() + LOOK_SECONDS >= deadline:
                raise _unavailable(experts[decision.expert].slot)
            await asyncio.sleep(LOOK_SECONDS)
            failed.clear()  # the picked one may be the first to come back
            continue
        if found.expert is None:
            return found, None
        after = policy.degrade_after_seconds
        less = replace(patience.while_absent(after, after), row_seconds=deadline - time.monotonic())
        try:
            return found, await ask(experts[found.expert], text, less, wanted)
        except FusionRouteError as error:
            if error.reason not in ABSENT or time.monotonic() >= deadline:
                raise
            failed.add(found.expert)


def _unavailable(slot: str) -> Unavailable:
    return Unavailable(
        Reason.EXPERT_UNAVAILABLE,
        f"the expert of slot {slot!r} is not there, and nobody may stand in for it",
        metadata={"slot": slot},
        retry_after_seconds=1.0,
    )
