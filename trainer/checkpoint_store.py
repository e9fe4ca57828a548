"""The folder of published checkpoints: only complete ones count. Weights are not looked at here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusionroute.errors import ModelRejected, Reason, SessionStateError
from fusionroute.manifest import COMPLETE_FILE, MANIFEST_FILE, Manifest, written_fingerprint
from fusionroute.promotions import check_checkpoint_id


@dataclass(frozen=True, slots=True)
class PublishedCheckpoint:
    """A checkpoint as the store knows it without loading its weights.

    Attributes:
        job_id: of the job that made it.
        fingerprint: of weights, heads and manifest in the number format of the files; empty when its writer was an
            older version.
        manifest: the text of `fusionroute.json`.
        created_at_seconds: since 1970, UTC.
    """

    checkpoint_id: str
    job_id: str
    folder: Path
    fingerprint: str
    manifest: str
    created_at_seconds: float


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """Published checkpoints, one folder each, named by their ids."""

    folder: Path

    def list(self, limit: int) -> list[PublishedCheckpoint]:
        """The newest ones first. Folders that are no complete checkpoints are left out."""
        found = sorted(self._complete(), key=lambda each: each.created_at_seconds, reverse=True)
        return found[:limit]

    def get(self, checkpoint_id: str) -> PublishedCheckpoint:
        """One of them, its manifest checked.

        Raises:
            InvalidRequest: the id cannot be one.
            SessionStateError: CHECKPOINT_UNKNOWN.
            ModelRejected: it is there, and broken.
        """
        folder = self.folder / check_checkpoint_id(checkpoint_id)
        if not (folder / COMPLETE_FILE).is_file():
            raise SessionStateError(
                Reason.CHECKPOINT_UNKNOWN, f"no checkpoint {checkpoint_id!r} is published in {self.folder}"
            )
        try:
            found = _read(folder)
            Manifest.from_json(found.manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelRejected(
                Reason.MODEL_BROKEN,
                f"checkpoint {checkpoint_id!r}: {MANIFEST_FILE}: {type(error).__name__}: {error}",
            ) from error
        return found

    def _complete(self) -> Iterator[PublishedCheckpoint]:
        if not self.folder.is_dir():
            return
        for folder in self.folder.iterdir():
            if folder.name.startswith(".") or not (folder / COMPLETE_FILE).is_file():
                continue
            try:
                yield _read(folder)
            except OSError:
                continue  # being removed, or no checkpoint of ours


def _read(folder: Path) -> PublishedCheckpoint:
    return PublishedCheckpoint(
        checkpoint_id=folder.name,
        job_id=folder.name.rpartition("-")[2],
        folder=folder,
        fingerprint=written_fingerprint(folder),
        manifest=(folder / MANIFEST_FILE).read_text(encoding="utf-8"),
        created_at_seconds=(folder / COMPLETE_FILE).stat().st_mtime,
    )
