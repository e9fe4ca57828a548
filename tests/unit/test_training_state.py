"""States of a run: whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fusionroute.errors import Reason, TrainingFailed
from trainer.training_state import (
    SavedStep,
    StateFolder,
    rank_file,
    read_tensors,
    storage_errors,
    write_tensors,
)

TENSORS = {"parameter/w": torch.arange(6.0).reshape(2, 3), "step/w": torch.tensor(4.0)}
SHAPES = {"parameter/w": (2, 3), "step/w": ()}


def save(states: StateFolder, step: int) -> Path:
    states.begin(step)
    write_tensors(states.staged(step) / rank_file(0), TENSORS)
    return states.publish(SavedStep(step, 1, {"last_epoch": step}))


@pytest.fixture
def states(tmp_path) -> StateFolder:
    return StateFolder(tmp_path / "states")


def refusal(folder: Path, expected=SHAPES) -> str:
    with pytest.raises(TrainingFailed) as caught:
        read_tensors(folder, 0, expected)
    assert caught.value.reason is Reason.STATE_BROKEN
    assert str(folder) in caught.value.message
    return caught.value.message


def test_a_state_comes_back_as_it_was_saved(states):
    assert states.newest() is None
    folder = save(states, 4)
    assert states.newest() == folder
    assert SavedStep.read(folder) == SavedStep(4, 1, {"last_epoch": 4})
    read = read_tensors(folder, 0, SHAPES)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())


def test_the_newest_is_that_of_most_steps_and_whole(states):
    whole = save(states, 9)
    save(states, 10)
    (states.folder / "step-10" / "COMPLETE").unlink()
    states.begin(12)
    write_tensors(states.staged(12) / rank_file(0), TENSORS)
    assert states.newest() == whole


def test_a_half_written_state_is_replaced(states):
    states.begin(4)
    (states.staged(4) / "rank-7.safetensors").touch()
    assert sorted(path.name for path in save(states, 4).iterdir()) == [
        "COMPLETE", "rank-0.safetensors", "state.json",
    ]  # fmt: skip


def test_older_states_go_once_a_newer_is_whole(states):
    for step in (2, 4, 6):
        save(states, step)
    assert sorted(path.name for path in states.folder.iterdir()) == ["step-4", "step-6"]


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(states):
    folder = save(states, 4)
    assert "lacks exp_avg/w" in refusal(folder, SHAPES | {"exp_avg/w": (2, 3)})
    assert "has unknown step/w" in refusal(folder, {"parameter/w": (2, 3)})
    assert "parameter/w has shape (2, 3), expected (3, 2)" in refusal(
        folder, SHAPES | {"parameter/w": (3, 2)}
    )


def test_a_torn_or_missing_file_is_named(states):
    folder = save(states, 4)
    path = folder / rank_file(0)
    path.write_bytes(path.read_bytes()[:-5])
    assert rank_file(0) in refusal(folder)
    path.unlink()
    assert rank_file(0) in refusal(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 99, "step": 1, "world_size": 1, "scheduler": {}}'])
def test_a_state_whose_json_is_broken_is_refused(states, text):
    folder = save(states, 4)
    (folder / "state.json").write_text(text)
    with pytest.raises(TrainingFailed, match=r"state\.json") as caught:
        SavedStep.read(folder)
    assert caught.value.reason is Reason.STATE_BROKEN


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_is_named(tmp_path):
    with (
        pytest.raises(TrainingFailed, match="no room to write") as caught,
        storage_errors(tmp_path),
        Path("/dev/full").open("wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert caught.value.reason is Reason.STORAGE_FULL
    assert str(tmp_path) in caught.value.message


def test_a_full_disk_is_named_in_the_words_of_safetensors_too(tmp_path):
    import subprocess
    import sys

    program = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from trainer.training_state import storage_errors, write_tensors\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with storage_errors(Path(sys.argv[1])):\n"
        "    write_tensors(Path(sys.argv[1]) / 'big.safetensors', {'w': torch.zeros(100_000)})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "TrainingFailed: no room to write" in done.stderr


def test_other_errors_keep_their_own_name(tmp_path):
    with pytest.raises(PermissionError), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    with pytest.raises(Exception, match="expected") as caught, storage_errors(tmp_path):
        save_file({"w": "not a tensor"}, tmp_path / "x")  # type: ignore[dict-item]
    assert not isinstance(caught.value, TrainingFailed)
