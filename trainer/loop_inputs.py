"""What a training loop is given, in files, so that other processes can read it and a later attempt finds it again.

inputs/
    job.json           kind, configuration, what training starts from
    sft/, pairs/       rows, experts' labels; of pairs also what the reference and the router of phase I say
    COMPLETE           written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusionroute.errors import Reason, TrainingFailed
from trainer.config import JOBS, CdpoJob, JobKind, SftJob
from trainer.rows import Labels, PairSet, RowSet
from trainer.training_state import COMPLETE_FILE, publish, storage_errors

if TYPE_CHECKING:
    from trainer.router_module import RouterModule

REFERENCE_BATCH_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class SftLesson:
    """Texts to learn, and what the experts say about their T targets."""

    rows: RowSet
    labels: Labels

    def __post_init__(self) -> None:
        _check_shapes("sft", self.rows, self.labels)


@dataclass(frozen=True, slots=True)
class PairLesson:
    """Preference pairs to learn from.

    Attributes:
        pairs: N of them.
        labels: of the experts, about the T targets of all 2 N rows.
        reference_logprobs: ``[2 N]`` float32, log-probability of each row's targets under the router of phase I.
        phase_one_routes: ``[T]`` int32, the expert that the router of phase I chooses at each target.
    """

    pairs: PairSet
    labels: Labels
    reference_logprobs: NDArray[np.float32]
    phase_one_routes: NDArray[np.int32]

    def __post_init__(self) -> None:
        rows = self.pairs.rows
        _check_shapes("pairs", rows, self.labels)
        if self.reference_logprobs.shape != (len(rows),) or self.phase_one_routes.shape != (
            rows.num_targets,
        ):
            raise ValueError(
                f"{len(rows)} rows with {rows.num_targets} targets, but reference {self.reference_logprobs.shape} "
                f"and routes {self.phase_one_routes.shape}"
            )


@dataclass(frozen=True, slots=True)
class LoopInputs:
    """All that the loop reads.

    Attributes:
        config: of the job.
        router: folder or hub id of what training starts from; for phase II a checkpoint, with its routing head.
        sft: texts, or None.
        pairs: pairs, or None.
    """

    config: SftJob | CdpoJob
    router: str
    sft: SftLesson | None = None
    pairs: PairLesson | None = None

    def save(self, folder: Path) -> None:
        """Writes everything beside `folder` and moves it there once it is whole, replacing what was there.

        Raises:
            TrainingFailed: STORAGE_FULL.
        """
        staged = folder.with_name(f".{folder.name}-staged")
        shutil.rmtree(staged, ignore_errors=True)
        with storage_errors(folder):
            staged.mkdir(parents=True)
            job = {
                "kind": self.config.kind,
                "config": self.config.model_dump(mode="json"),
                "router": self.router,
            }
            (staged / "job.json").write_text(json.dumps(job), encoding="utf-8")
            if self.sft is not None:
                _save_rows(staged / "sft", self.sft.rows, self.sft.labels)
            if self.pairs is not None:
                _save_rows(staged / "pairs", self.pairs.pairs.rows, self.pairs.labels)
                _save(staged / "pairs" / "reference_logprobs.npy", self.pairs.reference_logprobs)
                _save(staged / "pairs" / "phase_one_routes.npy", self.pairs.phase_one_routes)
            shutil.rmtree(folder, ignore_errors=True)
            publish(staged, folder)

    @classmethod
    def load(cls, folder: Path) -> LoopInputs:
        """What `save` wrote; arrays are memory-mapped.

        Raises:
            TrainingFailed: STATE_BROKEN, the folder is not there or not whole, naming it.
        """
        if not (folder / COMPLETE_FILE).is_file():
            raise TrainingFailed(
                Reason.STATE_BROKEN, f"inputs of the training loop in {folder} are not complete"
            )
        try:
            job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
            config = JOBS[JobKind(job["kind"])].model_validate(job["config"])
            assert isinstance(config, (SftJob, CdpoJob))
            sft = SftLesson(*_load_rows(folder / "sft")) if (folder / "sft").is_dir() else None
            pairs = None
            if (folder / "pairs").is_dir():
                rows, labels = _load_rows(folder / "pairs")
                reference = _load(folder / "pairs" / "reference_logprobs.npy")
                pairs = PairLesson(
                    PairSet(rows), labels, reference, _load(folder / "pairs" / "phase_one_routes.npy")
                )
        except (OSError, ValueError, KeyError) as error:
            raise TrainingFailed(
                Reason.STATE_BROKEN, f"inputs of the training loop in {folder}: {error}"
            ) from error
        return cls(config, job["router"], sft, pairs)


def measure_reference(
    router: RouterModule,
    pairs: PairSet,
    chunk_tokens: int = 1024,
    advance: Callable[[int], None] = lambda num_rows: None,
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """What the router, as it stands, says about pairs: the reference of phase II (method section 3).

    Args:
        router: of phase I, in the precision that phase II will train it in; put into evaluation mode meanwhile.
        pairs: N of them, with T targets.
        chunk_tokens: vocabulary rows that exist at a time.
        advance: told how many more rows are done; what it raises ends the measurement.

    Returns:
        ``[2 N]`` float32, summed log-probability of each row's targets; ``[T]`` int32, the expert routed to at each.
    """
    from trainer.batches import pad

    rows = pairs.rows
    logprobs = np.zeros(len(rows), dtype=np.float32)
    routes = np.zeros(rows.num_targets, dtype=np.int32)
    for batch in _by_length(rows.lengths, REFERENCE_BATCH_TOKENS):
        padded = pad(rows, batch)
        of_targets, of_routes = router.gold_logprobs_and_routes(padded, chunk_tokens)
        counts = np.diff(rows.target_starts)[batch]
        owners = np.repeat(np.arange(len(batch)), counts)
        logprobs[batch] = np.bincount(owners, weights=of_targets.double().cpu().numpy(), minlength=len(batch))
        routes[padded.targets] = of_routes.cpu().numpy()
        advance(len(batch))
    return logprobs, routes


def _by_length(lengths: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Row indices, like lengths together, at most `batch_tokens` padded tokens in each part (or one row)."""
    order = np.argsort(-lengths, kind="stable")
    batches: list[NDArray[np.int64]] = []
    first = 0
    while first < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[first]])))
        batches.append(order[first : first + size])
        first += size
    return batches


def _check_shapes(name: str, rows: RowSet, labels: Labels) -> None:
    shape = labels.gold_logprobs.shape
    if len(shape) != 2 or shape != labels.argmax_ids.shape or shape[0] != rows.num_targets:
        raise ValueError(
            f"{name}: {rows.num_targets} targets, but labels {shape} and {labels.argmax_ids.shape}"
        )


def _save_rows(folder: Path, rows: RowSet, labels: Labels) -> None:
    rows.save(folder)
    _save(folder / "gold_logprobs.npy", labels.gold_logprobs)
    _save(folder / "argmax_ids.npy", labels.argmax_ids)


def _load_rows(folder: Path) -> tuple[RowSet, Labels]:
    return RowSet.load(folder), Labels(_load(folder / "gold_logprobs.npy"), _load(folder / "argmax_ids.npy"))


def _save(path: Path, array: NDArray[Any]) -> None:
    np.save(path, array, allow_pickle=False)


def _load(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
