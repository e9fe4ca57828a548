"""What a request must be before the engine sees it; the state of sessions is the engine's to judge."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from fusionroute.engine import ModelFacts
from fusionroute.errors import InvalidRequest, Reason, invalid
from fusionroute.v1 import common_pb2, expert_pb2
from fusionroute.wire import bytes_per_number, dtype_of

MAX_DRAFT_TOKENS = 64
MAX_END_IDS = 256
MAX_TOP_LOGITS = 1024
HIGHEST_TEMPERATURE = 100.0
MAX_BATCH_STEPS = 256
MAX_SEQUENCES = 256
DEFAULT_LIST_LIMIT = 1000
MOST_LISTED = 10_000
MAX_BATCH_TOKENS = 1_048_576
"""In one StepBatch, StepStream or Score message, over all steps or sequences."""
MAX_STREAM_CANCELLED = 4096
MAX_STREAM_CLOSINGS = 4096
LONGEST_TIMEOUT_SECONDS = 86_400.0
MAX_CALLER_CHARACTERS = 256
"""Of a streamed step's request_id and traceparent."""
# Room in a message for everything that is not rows.
MESSAGE_MARGIN_BYTES = 16384

_SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def check_session_id(session_id: str) -> None:
    """Raises InvalidRequest unless the id is 1 to 128 characters of A-Z a-z 0-9 . _ : -"""
    if _SESSION_ID.fullmatch(session_id) is None:
        shown = session_id if len(session_id) <= 140 else session_id[:140] + "..."
        raise invalid("session_id", shown, "1 to 128 characters of A-Z a-z 0-9 . _ : -")


def wire_dtype(dtype: common_pb2.Dtype.ValueType, facts: ModelFacts) -> common_pb2.Dtype.ValueType:
    """The number format for the rows: what was asked for, else the model's own."""
    if dtype == common_pb2.DTYPE_UNSPECIFIED:
        return dtype_of(facts.dtype)
    bytes_per_number(dtype)
    return dtype


def check_step(request: expert_pb2.StepRequest, facts: ModelFacts) -> None:
    """Raises InvalidRequest for what the engine does not look at: session id, dtype, drafting, kind of answer."""
    check_session_id(request.session_id)
    wire_dtype(request.dtype, facts)
    if request.draft_tokens > MAX_DRAFT_TOKENS:
        raise invalid("draft_tokens", request.draft_tokens, f"at most {MAX_DRAFT_TOKENS}")
    if request.HasField("draft_choice"):
        _check_draft_choice(request.draft_choice)
    if request.top_logits > min(MAX_TOP_LOGITS, facts.logits_width):
        raise invalid("top_logits", request.top_logits, f"at most {min(MAX_TOP_LOGITS, facts.logits_width)}")
    if len(request.token_ids) > facts.max_context_tokens:
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"{len(request.token_ids)} token_ids are more than the model's {facts.max_context_tokens} tokens",
            metadata={"field": "token_ids", "limit": str(facts.max_context_tokens)},
        )
    if len(request.row_indices) > len(request.token_ids):
        raise invalid(
            "row_indices",
            f"{len(request.row_indices)} indices",
            f"at most one for each of {len(request.token_ids)} token_ids",
        )
    end = request.from_position + len(request.token_ids) + request.draft_tokens
    if request.draft_tokens and end > facts.max_context_tokens:
        raise InvalidRequest(
            Reason.CONTEXT_FULL,
            f"from_position {request.from_position} + {len(request.token_ids)} tokens + draft_tokens "
            f"{request.draft_tokens} = {end} is longer than the model's {facts.max_context_tokens} tokens",
            metadata={"limit": str(facts.max_context_tokens)},
        )


def _check_draft_choice(choice: expert_pb2.DraftChoice) -> None:
    if not 0.0 <= choice.temperature <= HIGHEST_TEMPERATURE:
        raise invalid("draft_choice.temperature", choice.temperature, f"from 0 to {HIGHEST_TEMPERATURE:.0f}")
    for name in ("top_p", "min_p", "min_probability"):
        value = getattr(choice, name)
        if not 0.0 <= value <= 1.0:
            raise invalid(f"draft_choice.{name}", value, "from 0 to 1")
    if len(choice.end_ids) > MAX_END_IDS:
        raise invalid("draft_choice.end_ids", f"{len(choice.end_ids)} ids", f"at most {MAX_END_IDS}")


def num_rows_of(request: expert_pb2.StepRequest) -> int:
    """Rows of the longest answer to a step."""
    return (len(request.row_indices) or request.num_rows) + request.draft_tokens


def _answer_bytes(request: expert_pb2.StepRequest, facts: ModelFacts) -> int:
    itemsize = bytes_per_number(wire_dtype(request.dtype, facts))
    if request.top_logits:
        return num_rows_of(request) * request.top_logits * (4 + itemsize)
    return num_rows_of(request) * facts.logits_width * itemsize


def check_answer_size(
    requests: Sequence[expert_pb2.StepRequest], facts: ModelFacts, max_message_bytes: int
) -> None:
    """Raises InvalidRequest when the rows asked for cannot be sent in one message."""
    num_bytes = sum(_answer_bytes(request, facts) for request in requests)
    if num_bytes + MESSAGE_MARGIN_BYTES > max_message_bytes:
        rows = sum(num_rows_of(request) for request in requests)
        raise invalid(
            "num_rows",
            rows,
            f"{rows} rows of {facts.logits_width} numbers are {num_bytes} bytes, too many for a message of "
            f"max_message_bytes = {max_message_bytes}; ask for fewer rows or raise it on both ends",
        )


def check_batch(request: expert_pb2.StepBatchRequest) -> None:
    """Raises InvalidRequest unless there are 1 to 256 steps of different sessions."""
    if not 1 <= len(request.steps) <= MAX_BATCH_STEPS:
        raise invalid("steps", f"{len(request.steps)} steps", f"1 to {MAX_BATCH_STEPS} steps")
    _check_num_tokens("steps", sum(len(step.token_ids) for step in request.steps))
    session_id, count = Counter(step.session_id for step in request.steps).most_common(1)[0]
    if count > 1:
        raise invalid("steps", f"{count} steps of session {session_id[:140]!r}", "one step for each session")


def check_streamed(request: expert_pb2.StepStreamRequest) -> None:
    """Raises InvalidRequest for a message that is larger than one may be."""
    if len(request.steps) > MAX_BATCH_STEPS:
        raise invalid(
            "steps", f"{len(request.steps)} steps", f"at most {MAX_BATCH_STEPS} steps in one message"
        )
    if len(request.cancelled) > MAX_STREAM_CANCELLED:
        raise invalid(
            "cancelled", f"{len(request.cancelled)} ids", f"at most {MAX_STREAM_CANCELLED} ids in one message"
        )
    if len(request.closings) > MAX_STREAM_CLOSINGS:
        raise invalid(
            "closings",
            f"{len(request.closings)} sessions",
            f"at most {MAX_STREAM_CLOSINGS} sessions in one message",
        )
    for closing in request.closings:
        check_session_id(closing.session_id)
    _check_num_tokens("steps", sum(len(streamed.step.token_ids) for streamed in request.steps))


def check_streamed_step(streamed: expert_pb2.StreamedStep) -> None:
    """Raises InvalidRequest for what a step on a stream says besides the step itself."""
    if not 0.0 <= streamed.timeout_seconds <= LONGEST_TIMEOUT_SECONDS:
        raise invalid(
            "timeout_seconds", streamed.timeout_seconds, f"from 0 to {LONGEST_TIMEOUT_SECONDS:.0f} seconds"
        )
    for name in ("request_id", "traceparent"):
        value = getattr(streamed, name)
        if len(value) > MAX_CALLER_CHARACTERS:
            raise invalid(name, value, f"at most {MAX_CALLER_CHARACTERS} characters")


def _check_num_tokens(field: str, num_tokens: int) -> None:
    if num_tokens > MAX_BATCH_TOKENS:
        raise invalid(field, f"{num_tokens} tokens", f"at most {MAX_BATCH_TOKENS} tokens in one message")


def check_score(request: expert_pb2.ScoreRequest, facts: ModelFacts) -> None:
    """Raises InvalidRequest unless every sequence can be scored; nothing has been sent by then."""
    if not 1 <= len(request.sequences) <= MAX_SEQUENCES:
        raise invalid("sequences", f"{len(request.sequences)} sequences", f"1 to {MAX_SEQUENCES} sequences")
    if request.output not in expert_pb2.ScoreOutput.values():
        raise invalid("output", request.output, "LOG_PROBS or ROWS")
    wire_dtype(request.dtype, facts)
    _check_num_tokens("sequences", sum(len(sequence.token_ids) for sequence in request.sequences))
    for index, sequence in enumerate(request.sequences):
        name = f"sequences[{index}].token_ids"
        num_tokens = len(sequence.token_ids)
        if num_tokens < 2:
            raise invalid(name, f"{num_tokens} tokens", "at least two tokens")
        if num_tokens - 1 > facts.max_context_tokens:
            raise InvalidRequest(
                Reason.CONTEXT_FULL,
                f"{name} has {num_tokens} tokens, the model's context is {facts.max_context_tokens}",
                metadata={"field": name, "limit": str(facts.max_context_tokens)},
            )
        highest = max(sequence.token_ids)
        if highest >= facts.logits_width:
            raise InvalidRequest(
                Reason.TOKEN_OUT_OF_RANGE,
                f"{name} contains {highest}; ids go from 0 to {facts.logits_width - 1}",
                metadata={"field": name, "limit": str(facts.logits_width - 1)},
            )
