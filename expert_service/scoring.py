"""Scoring whole sequences: gold log-probs and argmax ids by chunks, several sequences at work at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from typing import cast
from uuid import uuid4

import torch

from expert_service import metrics
from expert_service.checks import MESSAGE_MARGIN_BYTES, wire_dtype
from fusionroute.engine import Engine, ModelFacts, StepCall
from fusionroute.errors import FusionRouteError, OutOfRoom, Reason, SessionStateError
from fusionroute.v1 import expert_pb2
from fusionroute.wire import bytes_per_number, rows_to_matrix

MAX_CHUNK_TOKENS = 256
# A chunk's logits in float32 stay below 32 MiB, and so do the temporaries of its log-softmax.
MAX_CHUNK_NUMBERS = 8 * 2**20
# Sequences that are computed while the client reads; their forwards share one batch.
MAX_SEQUENCES_AT_WORK = 8
MAX_CHUNKS_AHEAD = 2
# Scoring gives way to generation for so long before it fails for want of room.
PATIENCE_SECONDS = 60.0

_Queue = asyncio.Queue["expert_pb2.ScoreResponse | BaseException | None"]


def chunk_tokens(request: expert_pb2.ScoreRequest, facts: ModelFacts, max_message_bytes: int) -> int:
    """Positions in one answer: bounded by memory and, with rows, by the size of a message."""
    most = min(MAX_CHUNK_TOKENS, MAX_CHUNK_NUMBERS // facts.logits_width)
    if request.output == expert_pb2.SCORE_OUTPUT_ROWS:
        row_bytes = facts.logits_width * bytes_per_number(wire_dtype(request.dtype, facts))
        most = min(most, (max_message_bytes - MESSAGE_MARGIN_BYTES) // row_bytes)
    return max(1, most)


async def score_sequences(
    engine: Engine, request: expert_pb2.ScoreRequest, max_message_bytes: int
) -> AsyncIterator[expert_pb2.ScoreResponse]:
    """Answers in order of sequence and position.

    Args:
        engine: computes.
        request: checked already.
        max_message_bytes: no answer is larger.

    Raises:
        FusionRouteError: as the engine's steps do; the answers before it stand.
    """
    size = chunk_tokens(request, engine.facts, max_message_bytes)
    queues: list[_Queue] = [asyncio.Queue(MAX_CHUNKS_AHEAD) for _ in request.sequences]
    workers: list[asyncio.Task[None]] = []
    try:
        for index, queue in enumerate(queues):
            while len(workers) < min(index + MAX_SEQUENCES_AT_WORK, len(queues)):
                next_index = len(workers)
                produce = _produce(engine, request, next_index, size, queues[next_index])
                workers.append(asyncio.create_task(produce))
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _produce(
    engine: Engine, request: expert_pb2.ScoreRequest, index: int, size: int, queue: _Queue
) -> None:
    """Puts the answers for one sequence into its queue, then None; or what went wrong."""
    token_ids = list(request.sequences[index].token_ids)
    last: BaseException | None = None
    try:
        async with aclosing(_chunks(engine, token_ids[:-1], size)) as chunks:
            async for from_position, rows in chunks:
                gold = token_ids[from_position + 1 : from_position + 1 + len(rows)]
                response = await asyncio.to_thread(_answer, rows, gold, request)
                response.sequence_index = index
                response.from_position = from_position
                response.epoch = engine.facts.epoch
                metrics.SCORED_TOKENS.inc(len(rows))
                await queue.put(response)
    except Exception as error:
        last = error
    await queue.put(last)


async def _chunks(
    engine: Engine, token_ids: Sequence[int], size: int
) -> AsyncGenerator[tuple[int, torch.Tensor], None]:
    """(first position, rows [n, V]) of a whole sequence, in a session of its own that ends with it."""
    session_id = f"score:{uuid4().hex}"
    try:
        for start in range(0, len(token_ids), size):
            yield start, await _rows(engine, session_id, token_ids[: start + size], start)
    finally:
        with suppress(FusionRouteError):  # a stopping engine forgets by itself
            # The client may leave while this runs; the session must go all the same.
            await asyncio.shield(engine.close_session(session_id))


async def _rows(engine: Engine, session_id: str, token_ids: Sequence[int], start: int) -> torch.Tensor:
    """Rows of the tokens from `start` on; patient while there is no room, and replays after an eviction."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    from_position = start
    while True:
        call = StepCall(session_id, from_position, token_ids[from_position:], len(token_ids) - start)
        try:
            return (await engine.step(call)).rows
        except SessionStateError as error:
            if error.reason is not Reason.SESSION_UNKNOWN or from_position == 0:
                raise
            from_position = 0
        except OutOfRoom as error:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(error.retry_after_seconds or 0.1)


@torch.inference_mode()
def _answer(
    rows: torch.Tensor, gold: Sequence[int], request: expert_pb2.ScoreRequest
) -> expert_pb2.ScoreResponse:
    """Scores of n positions from their logits [n, V]; runs outside the event loop."""
    logits = rows.float()
    picked = logits.gather(1, torch.tensor(gold).unsqueeze(1)).squeeze(1)
    log_probs = picked - logits.logsumexp(dim=1)
    response = expert_pb2.ScoreResponse(
        gold_log_probs=log_probs.numpy().astype("<f4").tobytes(),
        argmax_ids=cast(list[int], logits.argmax(dim=1).tolist()),
    )
    if request.output == expert_pb2.SCORE_OUTPUT_ROWS:
        response.rows.CopyFrom(rows_to_matrix(rows, request.dtype))
    return response
