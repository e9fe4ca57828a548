"""Answers of a router in plain Python: tokens, completions, experts, sessions, scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum

from fusionroute.v1 import router_pb2
from fusionroute.v1.registry_pb2 import ExpertEntry, ExpertState


class FinishReason(StrEnum):
    """Why an answer ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    CONTEXT = "context"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that might have been chosen; the log-probability is of the model in whose list it stands."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best ones by the fused scores, by the expert alone, and by the router alone (the complement)."""

    fused: tuple[Candidate, ...] = ()
    expert: tuple[Candidate, ...] = ()
    complement: tuple[Candidate, ...] = ()

    @classmethod
    def of(cls, message: router_pb2.TopCandidates) -> Candidates:
        """From the wire."""

        def some(candidates: Iterable[router_pb2.Candidate]) -> tuple[Candidate, ...]:
            return tuple(Candidate(each.id, each.text, each.logprob) for each in candidates)

        return cls(some(message.fused), some(message.expert), some(message.router))


@dataclass(frozen=True, slots=True)
class AnswerToken:
    """A token of an answer.

    Attributes:
        text: what it adds; empty while a character or a possible stop string is incomplete.
        logprob: in the fused distribution; None where it is not known.
        expert: slot of the expert that took part; None = the router alone.
        expert_epoch: of that expert's slot; 0 without one.
        degraded: the expert that was routed to was not there.
        routing_weights: by slot in the checkpoint's order, on request.
        top: on request.
    """

    index: int
    id: int
    text: str
    logprob: float | None
    expert: str | None
    expert_epoch: int = 0
    degraded: bool = False
    routing_weights: tuple[float, ...] = ()
    top: Candidates = Candidates()

    @classmethod
    def of(cls, token: router_pb2.Token) -> AnswerToken:
        """From the wire."""
        return cls(
            index=token.index,
            id=token.id,
            text=token.text,
            logprob=token.logprob if token.HasField("logprob") else None,
            expert=token.expert or None,
            expert_epoch=token.expert_epoch,
            degraded=token.degraded,
            routing_weights=tuple(token.routing_weights),
            top=Candidates.of(token.top),
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an answer cost; all zero of one that was only read back. As GenerationStatistics of the contract."""

    num_router_forwards: int = 0
    num_expert_calls: int = 0
    num_replays: int = 0
    num_retries: int = 0
    num_degraded_tokens: int = 0
    num_early_asks: int = 0
    num_early_hits: int = 0
    total_seconds: float = 0.0
    first_token_seconds: float = 0.0
    router_seconds: float = 0.0
    router_forward_seconds: float = 0.0
    expert_seconds: float = 0.0
    expert_forward_seconds: float = 0.0
    fuse_seconds: float = 0.0
    store_seconds: float = 0.0

    @classmethod
    def of(cls, message: router_pb2.GenerationStatistics) -> Statistics:
        """From the wire."""
        return cls(**{each.name: getattr(message, each.name) for each in fields(cls)})


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer.

    Attributes:
        tokens: all of them; of a stream that was followed from a later token on, those from there.
        text: what `tokens` add up to.
        stop: the stop string that ended it, if one did.
        num_prompt_tokens: of the session before the answer.
        combine: the rule that fused the scores.
        checkpoint: fingerprint of the router's.
    """

    text: str
    tokens: tuple[AnswerToken, ...]
    finish_reason: FinishReason
    stop: str | None
    session_id: str
    num_prompt_tokens: int
    seed: int
    combine: str
    checkpoint: str
    statistics: Statistics = field(repr=False)

    @classmethod
    def of(
        cls, started: router_pb2.Started, tokens: Sequence[AnswerToken], finished: router_pb2.Finished
    ) -> Completion:
        """From what a stream has brought."""
        return cls(
            text="".join(token.text for token in tokens) + finished.text,
            tokens=tuple(tokens),
            finish_reason=FinishReason(_word(router_pb2.FinishReason, finished.reason)),
            stop=finished.stop or None,
            session_id=started.session_id,
            num_prompt_tokens=finished.num_prompt_tokens,
            seed=started.seed,
            combine=_word(router_pb2.CombineRule, started.combine),
            checkpoint=started.checkpoint,
            statistics=Statistics.of(finished.statistics),
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """A token of a prompt as one way to write sees it: `best_id` is what it would have written there, greedily."""

    logprob: float
    best_id: int
    expert: str | None


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a prompt; `logprob` is None of the first one, which nothing predicts.

    Attributes:
        judgements: one for each further way that was asked for, in their order; none for the first token.
    """

    position: int
    id: int
    text: str
    logprob: float | None
    expert: str | None
    top: Candidates = Candidates()
    judgements: tuple[Judgement, ...] = ()

    @classmethod
    def of(cls, token: router_pb2.PromptToken) -> ScoredToken:
        """From the wire."""
        logprob = token.logprob if token.HasField("logprob") else None
        top = Candidates.of(token.top)
        judgements = tuple(Judgement(each.logprob, each.best_id, each.expert or None) for each in token.judgements)
        return cls(token.position, token.id, token.text, logprob, token.expert or None, top, judgements)


@dataclass(frozen=True, slots=True)
class Expert:
    """An expert that a router knows.

    Attributes:
        state: "ready", "draining" or "unspecified".
        epoch: of its slot, as tokens name it.
        queue_depth: steps that wait for a forward.
    """

    slot: str
    instance_id: str
    address: str
    state: str
    model: str
    epoch: int
    num_sessions: int
    queue_depth: int
    kv_tokens_used: int
    kv_tokens_limit: int

    @classmethod
    def of(cls, entry: ExpertEntry) -> Expert:
        """From the wire."""
        return cls(
            slot=entry.slot,
            instance_id=entry.instance_id,
            address=entry.address,
            state=_word(ExpertState, entry.state),
            model=entry.model.name,
            epoch=entry.epoch,
            num_sessions=entry.load.num_sessions,
            queue_depth=entry.load.queue_depth,
            kv_tokens_used=entry.load.kv_tokens_used,
            kv_tokens_limit=entry.load.kv_tokens_limit,
        )


@dataclass(frozen=True, slots=True)
class Session:
    """What is stored of a session.

    Attributes:
        state: "running" or "finished".
        answer_position: where the latest answer begins in `token_ids`.
        finish_reason: of the latest answer; None while it is written.
    """

    session_id: str
    state: str
    token_ids: tuple[int, ...]
    answer_position: int
    answer_text: str
    finish_reason: FinishReason | None
    seed: int
    expires_in_seconds: float

    @classmethod
    def of(cls, message: router_pb2.GetSessionResponse) -> Session:
        """From the wire."""
        reason = message.finish_reason
        return cls(
            session_id=message.session_id,
            state=_word(router_pb2.SessionState, message.state),
            token_ids=tuple(message.token_ids),
            answer_position=message.answer_position,
            answer_text=message.answer_text,
            finish_reason=FinishReason(_word(router_pb2.FinishReason, reason)) if reason else None,
            seed=message.seed,
            expires_in_seconds=message.expires_in_seconds,
        )


def _word(enum: object, number: int) -> str:
    """ "length" for FINISH_REASON_LENGTH: the name without what all names begin with."""
    prefix: str = enum.Name(0).removesuffix("UNSPECIFIED")  # type: ignore[attr-defined]
    name: str = enum.Name(number)  # type: ignore[attr-defined]
    return name.removeprefix(prefix).lower()
