"""A job's folder and the place where checkpoints are published: whole or not at all, once."""

from __future__ import annotations

import errno
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusionroute.errors import Reason
from trainer.config import JobKind
from trainer.jobs.folder import Assignment, Broken, Done, FolderBusy, JobFolder, StoppedEarly, reason_of
from trainer.jobs.leftovers import MARK, end_processes, processes_of
from trainer.jobs.publishing import publish
from trainer.run_context import RunProgress


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path / "job")
    made.path.mkdir()
    return made


def checkpoint(path: Path, text: str = "weights") -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "weights").write_text(text)
    (path / "COMPLETE").touch()
    return path


@pytest.fixture
def other_file_system() -> Iterator[Path]:
    place = Path("/dev/shm")  # noqa: S108 - a second file system on Linux
    if not place.is_dir() or place.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("needs two file systems")
    with tempfile.TemporaryDirectory(dir=place) as made:
        yield Path(made)


@pytest.mark.parametrize(
    "outcome", [StoppedEarly(), Broken(Reason.LOSS_NOT_FINITE, "step 3"), Done(Path("/elsewhere"), False)]
)
def test_an_outcome_is_read_as_it_was_written(folder: JobFolder, outcome) -> None:
    assert folder.read_outcome() is None
    folder.write_outcome(outcome)
    assert folder.read_outcome() == outcome
    folder.forget_outcome()
    assert folder.read_outcome() is None


def test_an_artifact_in_the_folder_is_found_where_the_folder_is_mounted_elsewhere(folder: JobFolder) -> None:
    folder.write_outcome(Done(folder.path / "made" / "router", True))
    moved = JobFolder(folder.path.rename(folder.path.with_name("moved")))
    assert moved.read_outcome() == Done(moved.path / "made" / "router", True)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"outcome": "done"}', '{"outcome": "broken", "reason": "?"}']
)
def test_an_outcome_that_cannot_be_read_is_none(folder: JobFolder, text: str) -> None:
    (folder.path / "outcome.json").write_text(text)
    assert folder.read_outcome() is None


def test_progress_and_assignment_are_read_as_they_were_written(folder: JobFolder) -> None:
    progress = RunProgress("training", 1, 2, loss=0.5, metrics={"a": 1.0}, remaining_seconds=3.0)
    folder.write_progress(progress)
    assert folder.read_progress() == progress
    (folder.path / "progress.json").write_text("{")
    assert folder.read_progress() is None
    assignment = Assignment(JobKind.SFT, '{"name": "run"}', 7.0)
    folder.write_assignment(assignment)
    assert folder.read_assignment() == assignment
    assert sorted(path.name for path in folder.path.iterdir()) == ["job.json", "progress.json"]


def test_numbers_of_numpy_may_be_reported(folder: JobFolder) -> None:
    import numpy as np

    folder.write_progress(RunProgress("training", 1, 2, loss=np.float32(0.5), metrics={"a": np.float64(2)}))
    progress = folder.read_progress()
    assert progress is not None and (progress.loss, progress.metrics) == (0.5, {"a": 2.0})


def test_a_folder_is_held_by_one_process(folder: JobFolder) -> None:
    with folder.held(0.0), pytest.raises(FolderBusy), folder.held(0.2):
        pass
    with folder.held(0.0):
        pass


def test_a_full_disk_has_a_reason_of_its_own() -> None:
    assert reason_of(OSError(errno.ENOSPC, "full")) is Reason.STORAGE_FULL
    assert reason_of(OSError(errno.EDQUOT, "full")) is Reason.STORAGE_FULL
    assert reason_of(PermissionError(errno.EACCES, "no")) is Reason.INTERNAL


def test_a_checkpoint_is_moved_once_and_never_over_another(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "run-sft-1"
    artifact = checkpoint(tmp_path / "artifact")
    publish(artifact, target)
    assert (target / "sub" / "weights").read_text() == "weights"
    assert not artifact.exists()
    publish(artifact, target)  # said again after a crash: nothing is left to do
    publish(checkpoint(artifact, "others"), target)
    assert (target / "sub" / "weights").read_text() == "weights"
    assert [path.name for path in target.parent.iterdir()] == ["run-sft-1"]


def test_between_file_systems_a_copy_takes_its_place_at_once(tmp_path: Path, other_file_system: Path) -> None:
    target = other_file_system / "checkpoints" / "run-sft-1"
    stale = target.parent / ".run-sft-1.staged"
    checkpoint(stale, "left by a crash")
    artifact = checkpoint(tmp_path / "artifact")
    publish(artifact, target)
    assert (target / "sub" / "weights").read_text() == "weights"
    assert (target / "COMPLETE").exists()
    assert not artifact.exists()
    assert [path.name for path in target.parent.iterdir()] == ["run-sft-1"]


def test_an_artifact_that_vanished_publishes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "nowhere", tmp_path / "checkpoints" / "run-sft-1")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_processes_of_a_folder_are_found_by_their_mark_and_ended(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = (
        "import subprocess, time\n"
        f"subprocess.Popen({sleep!r}, start_new_session=True)\n"
        "print(1, flush=True)\n"
        "time.sleep(60)\n"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", program], env={MARK: str(tmp_path)}, stdout=subprocess.PIPE
    )
    other = subprocess.Popen(sleep, env={MARK: str(tmp_path / "x")})
    try:
        assert ours.stdout is not None and ours.stdout.readline() == b"1\n"
        assert len(processes_of(tmp_path)) == 2
        assert end_processes(tmp_path) == 2
        assert processes_of(tmp_path) == []
        assert other.poll() is None
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()
        if ours.stdout is not None:
            ours.stdout.close()
