"""A turn as the events of the contract: what every API of the router tells of it, each in its own form."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict

from transformers import PreTrainedTokenizerBase

from fusionroute.fusion import Choice
from fusionroute.v1 import router_pb2
from router_service.costs import Costs
from router_service.generation import WrittenToken
from router_service.live_turn import LiveTurn
from router_service.scores import Candidates
from router_service.stored_session import FinishReason
from router_service.turn_request import DRAFTER_MESSAGES, POLICY_MESSAGES, RULE_MESSAGES, Turn

FINISH_MESSAGES = {
    FinishReason.EOS: router_pb2.FINISH_REASON_EOS,
    FinishReason.STOP: router_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: router_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: router_pb2.FINISH_REASON_CANCELLED,
    FinishReason.CONTEXT: router_pb2.FINISH_REASON_CONTEXT,
}


async def events_of(
    live: LiveTurn, from_token: int, tokenizer: PreTrainedTokenizerBase
) -> AsyncGenerator[router_pb2.GenerationEvent, None]:
    """Started, the tokens from number `from_token` on as they come, Finished.

    Args:
        tokenizer: says what candidates are in text; earlier checkpoints' have the same vocabulary.

    Raises:
        FusionRouteError: why the turn broke off.
    """
    yield router_pb2.GenerationEvent(started=_started(live))
    async with contextlib.aclosing(live.follow(from_token)) as tokens:
        async for token in tokens:
            yield router_pb2.GenerationEvent(token=_token(live.turn, token, tokenizer))
    yield router_pb2.GenerationEvent(finished=_finished(live))


def _started(live: LiveTurn) -> router_pb2.Started:
    return router_pb2.Started(
        session_id=live.session_id,
        num_prompt_tokens=live.answer_position,
        seed=live.turn.sampling.seed,
        combine=RULE_MESSAGES[live.turn.rule],
        checkpoint=live.turn.checkpoint,
        on_expert_unavailable=POLICY_MESSAGES[live.turn.on_expert_unavailable],
    )


def _finished(live: LiveTurn) -> router_pb2.Finished:
    ending = live.ending
    assert ending is not None
    return router_pb2.Finished(
        reason=FINISH_MESSAGES[ending.reason],
        text=ending.text,
        num_prompt_tokens=live.answer_position,
        num_generated_tokens=len(live.tokens),
        stop=ending.stop,
        statistics=_statistics(live.costs),
    )


def _token(turn: Turn, token: WrittenToken, tokenizer: PreTrainedTokenizerBase) -> router_pb2.Token:
    record = token.record
    by_expert = record.source is record.source.EXPERT
    message = router_pb2.Token(
        index=token.index,
        id=record.token_id,
        text=token.text,
        logprob=None if math.isnan(record.logprob) else record.logprob,
        expert=turn.slots[record.expert] if by_expert else "",
        expert_epoch=record.epoch if by_expert else 0,
        routing_weights=token.weights,
        degraded=record.degraded,
    )
    if token.top is not None:
        message.top.CopyFrom(top_message(token.top, tokenizer))
    return message


def top_message(top: Candidates, tokenizer: PreTrainedTokenizerBase) -> router_pb2.TopCandidates:
    """Candidates with their text."""

    def candidates(choices: Sequence[Choice]) -> list[router_pb2.Candidate]:
        return [
            router_pb2.Candidate(
                id=choice.token_id, text=tokenizer.decode([choice.token_id]), logprob=choice.logprob
            )
            for choice in choices
        ]

    return router_pb2.TopCandidates(
        fused=candidates(top.fused), expert=candidates(top.expert), router=candidates(top.router)
    )


def _statistics(costs: Costs | None) -> router_pb2.GenerationStatistics | None:
    if costs is None:
        return None
    return router_pb2.GenerationStatistics(
        num_router_forwards=costs.num_router_forwards,
        num_expert_calls=costs.num_expert_calls,
        num_replays=costs.num_replays,
        total_seconds=costs.total_seconds,
        first_token_seconds=costs.first_token_seconds,
        router_seconds=costs.router_seconds,
        router_forward_seconds=costs.router_forward_seconds,
        expert_seconds=costs.expert_seconds,
        expert_forward_seconds=costs.expert_forward_seconds,
        fuse_seconds=costs.fuse_seconds,
        store_seconds=costs.store_seconds,
        num_retries=costs.num_retries,
        num_degraded_tokens=costs.num_degraded_tokens,
        drafting=[
            router_pb2.DraftingStatistics(drafter=DRAFTER_MESSAGES[drafter], **asdict(counts))
            for drafter, counts in costs.drafts.items()
        ],
        num_early_asks=costs.num_early_asks,
        num_early_hits=costs.num_early_hits,
    )
