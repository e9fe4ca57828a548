"""A session, and a step of it: plain facts, without a tensor in sight."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from fusionroute.engine.digest import EMPTY, rolling
from fusionroute.engine.prefixes import PartUse
from fusionroute.fusion import Sampling


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens by which a model is to continue a session; they stay in its cache until a later step cuts them back.

    Attributes:
        num_tokens: at most so many.
        sampling: how each is chosen from the model's own row.
        min_probability: the draft ends before a token whose probability is lower.
        end_ids: the draft ends before one of these, behind which nothing follows.
    """

    num_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    min_probability: float = 0.0
    end_ids: frozenset[int] = frozenset()

    @property
    def least_logprob(self) -> float:
        """Natural log of `min_probability`."""
        return math.log(self.min_probability) if self.min_probability > 0.0 else -math.inf


@dataclass(frozen=True, slots=True)
class StepCall:
    """Tokens to feed to a session and the rows wanted of them.

    Attributes:
        session_id: whose tokens these are.
        from_position: position of the first token in the session.
        token_ids: at least one id, each in [0, logits width).
        num_rows: logits rows wanted, those of the last tokens; 0 to len(token_ids).
        expected_epoch: the epoch that must serve; 0 accepts any.
        fence: the caller's fencing token.
        prefix_digest: digest of the tokens before from_position; None is not checked.
        deadline: on the clock of time.monotonic(), in seconds; expired work is dropped before the forward.
        row_indices: instead of num_rows: ascending indices into token_ids whose rows are wanted.
        exact: rows are to be the same bits however steps are batched, chunked, repeated or drafted.
        draft: the model is to go on by itself.
        keep_rows: the same step is likely to be asked once more; what it gave is kept until the session goes on.
    """

    session_id: str
    from_position: int
    token_ids: Sequence[int]
    num_rows: int
    expected_epoch: int = 0
    fence: int = 0
    prefix_digest: int | None = None
    deadline: float | None = None
    row_indices: Sequence[int] = ()
    exact: bool = False
    draft: Draft | None = None
    keep_rows: bool = False

    @property
    def end_position(self) -> int:
        """Cached length after the step, drafted tokens apart."""
        return self.from_position + len(self.token_ids)

    @property
    def wanted(self) -> Sequence[int]:
        """Ascending indices into token_ids whose rows are wanted."""
        return self.row_indices or range(len(self.token_ids) - self.num_rows, len(self.token_ids))

    @property
    def num_spared(self) -> int:
        """Leading tokens that need not be computed where they are cached: nobody looks at their rows."""
        wanted, num_tokens = self.wanted, len(self.token_ids)
        return min(wanted[0] if wanted else num_tokens, num_tokens - (self.draft is not None))


@dataclass(slots=True, eq=False)
class Session:
    """A session's cached tokens and who may touch them.

    Attributes:
        reserved_tokens: key-value memory of its own, for the tokens beyond those that it shares.
        parts: what it shares with other sessions: its first tokens.
        num_indexed: blocks of tokens by which others can find it.
        leaves_nothing: when it is closed, its tokens are not kept for others.
        is_closed: nobody steps it any more; it stays for others to begin with.
    """

    session_id: str
    last_used: float
    fence: int = 0
    reserved_tokens: int = 0
    busy: bool = False
    close_when_idle: bool = False
    exact: bool = False
    leaves_nothing: bool = False
    is_closed: bool = False
    parts: tuple[PartUse, ...] = ()
    num_indexed: int = 0
    tokens: array[int] = field(default_factory=lambda: array("I"))
    digests: array[int] = field(default_factory=lambda: array("Q", [EMPTY]))

    @property
    def cached_length(self) -> int:
        """Tokens whose keys and values are cached."""
        return len(self.tokens)

    @property
    def num_shared(self) -> int:
        """Tokens that it shares with other sessions."""
        return self.parts[-1].stop if self.parts else 0

    @property
    def first_own(self) -> int:
        """Position of the first token that it does not share."""
        return self.num_shared

    def cut(self, length: int) -> None:
        """Forgets the tokens from position `length` on."""
        del self.tokens[length:]
        del self.digests[length + 1 :]

    def extend(self, token_ids: Sequence[int]) -> None:
        """Remembers tokens that have been fed."""
        self.digests.extend(rolling(token_ids, self.digests[-1]))
        self.tokens.extend(token_ids)

    def num_equal(self, from_position: int, token_ids: Sequence[int]) -> int:
        """How many of `token_ids` equal the cached tokens from `from_position` on."""
        cached = self.tokens[from_position : from_position + len(token_ids)]
        for count, (mine, theirs) in enumerate(zip(cached, token_ids, strict=False)):
            if mine != theirs:
                return count
        return len(cached)


@dataclass(frozen=True, slots=True)
class Closing:
    """A session to be forgotten.

    Attributes:
        fence: of whoever closes it.
        for_good: other sessions are not to begin with its tokens either.
    """

    session_id: str
    fence: int = 0
    for_good: bool = False


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as others see it."""

    session_id: str
    cached_length: int
    kv_tokens_reserved: int
    idle_seconds: float
    busy: bool
    fence: int
