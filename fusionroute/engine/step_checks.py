"""What a step must be before it may touch its session: the truth table of `ExpertService.Step`."""

from __future__ import annotations

from itertools import pairwise

from fusionroute.engine.session import Session, StepCall
from fusionroute.errors import InvalidRequest, Reason, SessionStateError


def check_values(call: StepCall, longest_session_tokens: int, logits_width: int, epoch: int) -> None:
    """Rejects what no session could be fed.

    Args:
        longest_session_tokens: longest session that can be cached.
        logits_width: ids below this are known to the model.
        epoch: of the weights that serve.

    Raises:
        InvalidRequest: INVALID_FIELD, CONTEXT_FULL, TOKEN_OUT_OF_RANGE.
        SessionStateError: EPOCH_MISMATCH.
    """
    num_tokens = len(call.token_ids)
    if num_tokens == 0:
        raise _invalid("token_ids", "[]", "at least one token")
    if not 0 <= call.num_rows <= num_tokens:
        raise _invalid("num_rows", call.num_rows, f"0 to {num_tokens}, the number of token_ids")
    if call.row_indices:
        _check_row_indices(call)
    if call.draft is not None and call.draft.num_tokens < 1:
        raise _invalid("draft.num_tokens", call.draft.num_tokens, "1 or more")
    if call.from_position < 0:
        raise _invalid("from_position", call.from_position, "0 or more")
    if call.end_position > longest_session_tokens:
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"from_position {call.from_position} + {num_tokens} tokens = {call.end_position} is longer than"
            f" the longest session, {longest_session_tokens} tokens",
            metadata={"limit": str(longest_session_tokens)},
        )
    lowest, highest = min(call.token_ids), max(call.token_ids)
    if lowest < 0 or highest >= logits_width:
        bad = lowest if lowest < 0 else highest
        raise InvalidRequest(
            Reason.TOKEN_OUT_OF_RANGE,
            f"token_ids contains {bad}; ids go from 0 to {logits_width - 1}",
            metadata={"limit": str(logits_width - 1)},
        )
    if call.expected_epoch and call.expected_epoch != epoch:
        raise SessionStateError(
            Reason.EPOCH_MISMATCH,
            f"expected_epoch {call.expected_epoch} does not serve here, epoch {epoch} does",
            metadata={"epoch": str(epoch)},
        )


def check_state(call: StepCall, session: Session | None) -> None:
    """Rejects what this session cannot be fed now.

    Raises:
        SessionStateError: SESSION_UNKNOWN, STALE_FENCE, SESSION_BUSY, POSITION_AHEAD or DIGEST_MISMATCH.
    """
    if session is None:
        if call.from_position > 0:
            raise SessionStateError(
                Reason.SESSION_UNKNOWN,
                f"session {call.session_id!r} is not cached; send its tokens from position 0",
                metadata={"cached_length": "0"},
            )
        return
    check_fence(session, call.fence)
    if session.busy:
        raise SessionStateError(
            Reason.SESSION_BUSY,
            f"another step of session {call.session_id!r} is running",
            retry_after_seconds=0.05,
        )
    if call.from_position > session.cached_length:
        raise SessionStateError(
            Reason.POSITION_AHEAD,
            f"from_position {call.from_position} is ahead of the {session.cached_length} cached tokens of session"
            f" {call.session_id!r}",
            metadata={"cached_length": str(session.cached_length)},
        )
    if call.prefix_digest is not None and call.prefix_digest != session.digests[call.from_position]:
        raise _mismatch(
            session,
            f"the first {call.from_position} cached tokens of session {call.session_id!r} are not those of the"
            " caller; send the tokens from position 0",
        )
    if call.exact != session.exact and call.from_position > 0:
        raise _mismatch(
            session,
            f"exact = {call.exact}, but the cached tokens of session {call.session_id!r} were computed with exact ="
            f" {session.exact}; send the tokens from position 0",
        )


def check_fence(session: Session, fence: int) -> None:
    """Rejects the caller whom a newer owner has followed. Raises SessionStateError STALE_FENCE."""
    if fence < session.fence:
        raise SessionStateError(
            Reason.STALE_FENCE,
            f"fence {fence} is below {session.fence}: session {session.session_id!r} has a newer owner",
            metadata={"fence": str(session.fence)},
        )


def _check_row_indices(call: StepCall) -> None:
    indices, num_tokens = call.row_indices, len(call.token_ids)
    if call.num_rows:
        raise _invalid("num_rows", call.num_rows, "0 beside row_indices")
    is_ascending = all(before < after for before, after in pairwise(indices))
    if not is_ascending or indices[0] < 0 or indices[-1] >= num_tokens:
        raise _invalid("row_indices", list(indices[:8]), f"ascending, each from 0 to {num_tokens - 1}")


def _mismatch(session: Session, message: str) -> SessionStateError:
    metadata = {"cached_length": str(session.cached_length)}
    return SessionStateError(Reason.DIGEST_MISMATCH, message, metadata=metadata)


def _invalid(name: str, value: object, limit: str) -> InvalidRequest:
    return InvalidRequest(
        Reason.INVALID_FIELD, f"{name} = {value} is not allowed: {limit}", metadata={"field": name}
    )
