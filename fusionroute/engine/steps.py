"""A step on its way through the engine, and what an engine may use and has used."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fusionroute.engine.session import Session, StepCall
from fusionroute.errors import InternalFault, Reason


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine may use.

    Attributes:
        kv_tokens: tokens for which there is key-value memory, all sessions together.
        max_batch_tokens: tokens in one forward.
        prefill_chunk_tokens: tokens of one session in one forward.
        max_queue: steps waiting or running.
        max_sessions: sessions cached at a time.
        room_wait_seconds: how long a step waits for running sessions to give room.
        share_prefixes: whether sessions whose prompts begin alike share the memory and the work of what they have in
            common, closed sessions included.
        shortest_shared_tokens: shorter beginnings are not shared.
        await_others: whether a forward is put off for a moment when sessions that were just answered are about to step
            again and one forward for all is worth it.
        in_groups: whether sessions that go to and fro between this model and others do so in two groups where that is
            faster, so that one group is here while the other is elsewhere.
        quick_seconds: a forward that takes less, and has nobody to share it with, is run by the caller's event loop: it
            is held up by that less than by a second thread beside it. 0 = all are run by the worker's thread.
        mixed_forward_seconds: how long a forward may take, roughly, that prefills share with decoding sessions.
    """

    kv_tokens: int = 65536
    max_batch_tokens: int = 2048
    prefill_chunk_tokens: int = 512
    max_queue: int = 256
    max_sessions: int = 4096
    room_wait_seconds: float = 2.0
    mixed_forward_seconds: float = 0.05
    await_others: bool = True
    in_groups: bool = False
    quick_seconds: float = 0.001
    share_prefixes: bool = True
    shortest_shared_tokens: int = 64


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How busy an engine is; `Load` on the wire."""

    num_sessions: int
    queue_depth: int
    queue_limit: int
    kv_tokens_used: int
    kv_tokens_limit: int
    num_forwards: int
    num_evictions: int


@dataclass(slots=True)
class StepOutcome:
    """What a step gave.

    Attributes:
        rows: logits [n, logits width] of the tokens asked for, then of each drafted one; on the CPU, in the model's
            number format.
        head_scores: scores of a router's heads [num_rows, k], float32.
        position: cached length after the step.
        num_computed_tokens: tokens that were fed, the others being cached already.
        queue_seconds: from arrival to the first forward.
        forward_seconds: within forwards.
        num_forwards: forwards that computed this step.
        max_batch_sessions: most sessions that shared one of them.
        drafted_ids: by which the model has continued.
    """

    rows: Tensor
    head_scores: Tensor | None
    position: int
    num_computed_tokens: int
    queue_seconds: float
    forward_seconds: float
    num_forwards: int
    max_batch_sessions: int
    drafted_ids: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Job:
    """A step on its way through the worker."""

    call: StepCall
    arrived: float
    future: Future[StepOutcome]
    session: Session | None = None
    num_cached: int = 0
    num_fed: int = 0
    started: float | None = None
    forward_seconds: float = 0.0
    num_forwards: int = 0
    max_batch_sessions: int = 0
    rows: list[Tensor] = field(default_factory=list)
    head_scores: list[Tensor] = field(default_factory=list)
    token_ids: Sequence[int] = field(init=False)
    """To be fed: the call's, then those drafted."""
    drafted_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token_ids = self.call.token_ids

    @property
    def num_left(self) -> int:
        """Tokens still to be fed."""
        return len(self.token_ids) - self.num_fed

    @property
    def is_drafting(self) -> bool:
        """Whether all that the caller sent has been fed."""
        return self.num_fed >= len(self.call.token_ids)

    def go_on(self, token_id: int) -> None:
        """The model's own next token is to be fed."""
        self.drafted_ids.append(token_id)
        self.token_ids = [*self.call.token_ids, *self.drafted_ids]

    def end_draft(self) -> None:
        """Forgets what was drafted and could not be fed."""
        del self.drafted_ids[self.num_fed - len(self.call.token_ids) :]
        self.token_ids = [*self.call.token_ids, *self.drafted_ids]


@dataclass(slots=True)
class Chunk:
    """The part of a job that goes into one forward.

    Attributes:
        wanted: indices into the job's tokens whose rows are computed.
        num_hidden: of these, the last ones that the caller did not ask for: a draft starts from them.
    """

    job: Job
    start: int
    stop: int
    wanted: list[int] = field(init=False)
    num_hidden: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        call, num_given = self.job.call, len(self.job.call.token_ids)
        if self.start >= num_given:
            self.wanted = list(range(self.start, self.stop))
            return
        self.wanted = [index for index in call.wanted if self.start <= index < self.stop]
        is_start_of_draft = call.draft is not None and self.stop == num_given
        if is_start_of_draft and (not self.wanted or self.wanted[-1] != num_given - 1):
            self.wanted.append(num_given - 1)
            self.num_hidden = 1

    @property
    def num_tokens(self) -> int:
        """Tokens to feed."""
        return self.stop - self.start


def not_finite(job: Job) -> InternalFault:
    """Why a step fails whose rows are not finite."""
    session = job.session
    assert session is not None
    return InternalFault(
        Reason.NON_FINITE_LOGITS,
        f"the model gave logits that are not finite for session {session.session_id!r} at position"
        f" {session.cached_length}; nothing was cached of this step",
    )
