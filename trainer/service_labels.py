"""Labels from the experts that serve: the `Score` streams of those that a router's registry lists."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fusionroute.background import end_task
from fusionroute.router_model import ExpertRecord
from fusionroute.v1.registry_pb2 import ExpertEntry
from trainer.frozen_models import check_same_vocabulary
from trainer.label_sources import Pending, check_context
from trainer.label_store import LabelStore, Span
from trainer.pace import Pace
from trainer.rows import Row, RowSet
from trainer.run_context import Stop, Stopped
from trainer.served_slot import ServedSlot

PATIENCE_SECONDS = 180.0
"""A slot that has answered nothing for so long ends the run."""
STOP_POLL_SECONDS = 0.2

Outcome = TypeVar("Outcome")


class ServiceLabels:
    """A `LabelSource` of running expert services.

    Args:
        slots: in order.
        router: HOST:PORT of the router whose registry is asked.
        concurrency: sequences that each service is asked about at a time.
        patience_seconds: how long a slot may answer nothing.
    """

    def __init__(
        self,
        slots: Sequence[str],
        router: str,
        concurrency: int,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._slots = tuple(slots)
        self._router = router
        self._concurrency = concurrency
        self._patience_seconds = patience_seconds
        self._records: dict[str, ExpertRecord] = {}

    def find_experts(self, stop: Stop) -> tuple[ExpertRecord, ...]:
        """Those that are ready now, waiting for missing ones within the patience."""
        entries = asyncio.run(_until_stopped(self._find_all(), stop))
        records = tuple(_record(entry) for entry in entries)
        for record in records:
            check_same_vocabulary(records[0], record)
        self._records = {record.slot: record for record in records}
        return records

    def label(self, rows: RowSet, pending: Pending, store: LabelStore, pace: Pace, stop: Stop) -> None:
        """All slots at the same time."""
        asyncio.run(_until_stopped(self._label(rows, pending, store, pace), stop))

    async def _find_all(self) -> list[ExpertEntry]:
        return await _all([self._slot(slot).find() for slot in self._slots])

    async def _label(self, rows: RowSet, pending: Pending, store: LabelStore, pace: Pace) -> None:
        async with AsyncExitStack() as stack:
            work = []
            for slot, spans in pending.items():
                if spans:
                    served = await stack.enter_async_context(self._slot(slot))
                    check_context(rows, slot, served.max_context_tokens)
                    work.append(self._label_slot(rows, spans, served, store, pace))
            await _all(work)

    def _slot(self, slot: str) -> ServedSlot:
        return ServedSlot(slot, self._router, self._records.get(slot), self._patience_seconds)

    async def _label_slot(
        self, rows: RowSet, spans: Sequence[Span], served: ServedSlot, store: LabelStore, pace: Pace
    ) -> None:
        for span in spans:
            gold = np.empty(span.num_targets, np.float32)
            argmax = np.empty(span.num_targets, np.int32)
            indices = iter(range(span.first, span.end))

            async def ask_next(
                gold: NDArray[np.float32] = gold,
                argmax: NDArray[np.int32] = argmax,
                span: Span = span,
                indices: Any = indices,
            ) -> None:
                for index in indices:
                    row = rows[index]
                    start = int(rows.target_starts[index]) - span.target_first
                    end = start + row.num_targets
                    if end > start:
                        gold[start:end], argmax[start:end] = await _ask(served, row)
                    pace.advance(end - start)

            await _all([ask_next() for _ in range(self._concurrency)])
            await asyncio.to_thread(store.put, served.slot, span, gold, argmax)


async def _ask(served: ServedSlot, row: Row) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Labels ``[t]`` of the targets of one row."""
    end = int(np.flatnonzero(row.supervised)[-1]) + 1
    scores = await served.score(row.ids[:end].tolist())
    before = row.supervised[1:end]
    return scores.gold_logprobs[before], scores.argmax_ids[before]


def _record(entry: ExpertEntry) -> ExpertRecord:
    model = entry.model
    return ExpertRecord(
        slot=entry.slot,
        name=model.name,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        logits_width=model.logits_width,
        weights_fingerprint=model.weights_fingerprint,
    )


async def _all(work: Sequence[Coroutine[Any, Any, Outcome]]) -> list[Outcome]:
    """Everything at the same time; the first failure ends the rest."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            await _end(task)


async def _until_stopped(work: Coroutine[Any, Any, Outcome], stop: Stop) -> Outcome:
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=STOP_POLL_SECONDS)
            if stop.requested:
                raise Stopped
        return task.result()
    finally:
        await _end(task)


async def _end(task: asyncio.Task[Any]) -> None:
    """Ends a task of whose failure nobody wants to hear: another failure has been told already."""
    await end_task(task)
    if not task.cancelled():
        task.exception()
