"""Labels on disk: written shard by shard, so that a killed run loses little; one memory-mapped table in the end.

folder/
    key.json                            of which rows and which experts
    shards/<slot>-<first>-<end>.safetensors     of rows first to end - 1; gone once everything is there
    gold_logprobs.npy, argmax_ids.npy   [T, n]
    COMPLETE                            written last
    lock                                held by whoever labels
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fusionroute.errors import InternalFault, Reason, TrainingFailed
from trainer.label_key import LabelKey
from trainer.rows import Labels, RowSet

KEY_FILE, COMPLETE_FILE, LOCK_FILE, SHARDS = "key.json", "COMPLETE", "lock", "shards"
LOCK_SECONDS = 24 * 3600.0
LOCK_POLL_SECONDS = 0.2

_DTYPES: dict[str, Any] = {"gold_logprobs": np.float32, "argmax_ids": np.int32}


@dataclass(frozen=True, slots=True)
class Span:
    """Rows first to end - 1 of a RowSet, whose targets are target_first to target_end - 1."""

    first: int
    end: int
    target_first: int
    target_end: int

    @property
    def num_targets(self) -> int:
        """Targets of these rows."""
        return self.target_end - self.target_first


class LabelStore:
    """The labels of one key.

    Args:
        folder: made when it does not exist.
        key: of the labels.
        rows: that are labelled.
        rows_per_shard: rows whose labels are written at a time.

    Raises:
        TrainingFailed: LABELS_STALE, the folder holds labels of something else; says what differs.
    """

    def __init__(self, folder: Path, key: LabelKey, rows: RowSet, rows_per_shard: int) -> None:
        self.folder = folder
        self.key = key
        bounds = [*range(0, len(rows), rows_per_shard), len(rows)]
        self.spans = [
            Span(first, end, int(rows.target_starts[first]), int(rows.target_starts[end]))
            for first, end in pairwise(bounds)
        ]
        self._check_key()

    @property
    def is_complete(self) -> bool:
        """Whether all labels are there."""
        return (self.folder / COMPLETE_FILE).is_file()

    @contextmanager
    def locked(
        self, check_stop: Callable[[], None] = lambda: None, wait_seconds: float = LOCK_SECONDS
    ) -> Iterator[None]:
        """Held by one process at a time; the system frees it when its holder dies.

        Args:
            check_stop: called while waiting; may raise.
            wait_seconds: patience with another process that labels into the same folder.

        Raises:
            TrainingFailed: JOB_STATE, the other one was not done in time.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + wait_seconds
        with (self.folder / LOCK_FILE).open("a") as lock:
            while not _try_lock(lock.fileno()):
                check_stop()
                if time.monotonic() >= deadline:
                    raise TrainingFailed(
                        Reason.JOB_STATE,
                        f"another process labels into {self.folder} and was not done after {wait_seconds:.0f} s",
                    )
                time.sleep(LOCK_POLL_SECONDS)
            yield

    def begin(self) -> None:
        """Writes the key, unless it is there."""
        (self.folder / SHARDS).mkdir(parents=True, exist_ok=True)
        self._check_key()
        if not (self.folder / KEY_FILE).is_file():
            _write(self.folder / KEY_FILE, lambda path: path.write_text(self.key.to_json(), encoding="utf-8"))

    def pending(self, slot: str) -> list[Span]:
        """The spans that no shard covers yet."""
        return [span for span in self.spans if not self._shard(slot, span).is_file()]

    def put(
        self, slot: str, span: Span, gold_logprobs: NDArray[np.float32], argmax_ids: NDArray[np.int32]
    ) -> None:
        """Keeps what one expert says about the targets ``[t]`` of a span.

        Raises:
            InternalFault: NON_FINITE_LOGITS, naming the expert and the rows.
        """
        assert gold_logprobs.shape == argmax_ids.shape == (span.num_targets,)
        if not np.isfinite(gold_logprobs).all():
            raise InternalFault(
                Reason.NON_FINITE_LOGITS,
                f"expert {slot!r} gives targets of rows {span.first} to {span.end - 1} log-probabilities that "
                "are not finite",
            )
        columns = {"gold_logprobs": gold_logprobs, "argmax_ids": argmax_ids}
        tensors = {name: np.ascontiguousarray(columns[name], dtype) for name, dtype in _DTYPES.items()}
        _write(self._shard(slot, span), lambda path: save_file(tensors, path))

    def finish(self) -> None:
        """Makes one table of all shards. Raises TrainingFailed (STATE_BROKEN) naming a shard that cannot be read."""
        shape = (self.key.num_targets, len(self.key.experts))

        def merge(name: str, path: Path) -> None:
            table = open_memmap(path, mode="w+", dtype=_DTYPES[name], shape=shape)
            for column, slot in enumerate(self.key.slots):
                for span in self.spans:
                    values = self._read(slot, span, name)
                    table[span.target_first : span.target_end, column] = values
            table.flush()

        for name in _DTYPES:
            _write(self.folder / f"{name}.npy", partial(merge, name))
        _write(self.folder / COMPLETE_FILE, lambda path: path.touch())
        for path in (self.folder / SHARDS).iterdir():
            path.unlink()
        (self.folder / SHARDS).rmdir()

    def read(self) -> Labels:
        """The labels ``[T, n]``, memory-mapped, read-only."""
        gold, argmax = (
            np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _DTYPES
        )
        return Labels(gold, argmax)

    def _shard(self, slot: str, span: Span) -> Path:
        return self.folder / SHARDS / f"{slot}-{span.first}-{span.end}.safetensors"

    def _read(self, slot: str, span: Span, name: str) -> NDArray[Any]:
        path = self._shard(slot, span)
        try:
            values: NDArray[Any] = load_file(path)[name]
        except (OSError, SafetensorError, KeyError) as error:
            raise TrainingFailed(
                Reason.STATE_BROKEN, f"labels in {path} cannot be read ({error}); delete the file"
            ) from error
        return values

    def _check_key(self) -> None:
        path = self.folder / KEY_FILE
        if not path.is_file():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            found = {"format": f"unreadable ({error})"}
        if differences := self.key.differences(found if isinstance(found, dict) else {}):
            raise TrainingFailed(
                Reason.LABELS_STALE,
                f"the labels in {self.folder} are of something else: {'; '.join(differences)}; "
                "delete the folder or name another",
                metadata={"folder": str(self.folder)},
            )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    """A file that is either whole or not there, whatever happens meanwhile."""
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        fill(staged)
        _sync(staged)
        staged.rename(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
