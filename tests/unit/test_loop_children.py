"""What parent and children of a training loop tell each other."""

import json
import os
from pathlib import Path

import pytest

from fusionroute import processes
from fusionroute.errors import FusionRouteError, InvalidRequest, Reason, TrainingFailed
from tests.loop_lessons import sft_run
from trainer.loop import train_loop
from trainer.loop_children import _Children, _failure, _new_lines
from trainer.loop_process import FAILURE_FILE, STOP_FILE, _watch, _write_failure
from trainer.run_context import RunContext, Stop


def ended_children(folder: Path, program: str) -> _Children:
    """One child that has run a shell program."""
    record = processes.spawn(
        "rank-0", ["/bin/sh", "-c", program], log=folder / "rank-0.txt", environment={}, die_with_parent=True
    )
    children = _Children([record])
    processes.wait_for_end([record], poll_seconds=0.01)
    while not children.all_ended:
        children.look()
    return children


def test_progress_is_passed_on_line_by_line_and_never_half_a_line(tmp_path):
    path = tmp_path / "progress.jsonl"
    lines = _new_lines(path)
    assert next(lines) == []
    path.write_text("one\ntwo\nthr")
    assert next(lines) == ["one\n", "two\n"]
    assert next(lines) == []
    with path.open("a") as file:
        file.write("ee\n")
    assert next(lines) == ["three\n"]


def test_a_child_asks_to_stop_when_its_parent_is_gone(tmp_path):
    stop = Stop()
    _watch(tmp_path, stop, parent=-1)
    assert stop.requested
    assert stop.save


def test_a_child_asks_to_stop_when_the_file_says_so(tmp_path):
    stop = Stop()
    (tmp_path / STOP_FILE).touch()
    _watch(tmp_path, stop, os.getppid())
    assert stop.requested


def test_the_first_failure_is_the_one_that_is_told(tmp_path):
    _write_failure(tmp_path, TrainingFailed(Reason.STORAGE_FULL, "no room", metadata={"folder": "x"}))
    _write_failure(tmp_path, TrainingFailed(Reason.LOSS_NOT_FINITE, "the others"))
    told = _failure(tmp_path, ended_children(tmp_path, "exit 1"))
    assert isinstance(told, TrainingFailed)
    assert (told.reason, told.message, told.metadata) == (Reason.STORAGE_FULL, "no room", {"folder": "x"})
    assert [path.name for path in tmp_path.glob("*.json")] == [FAILURE_FILE]
    assert json.loads((tmp_path / FAILURE_FILE).read_text())["reason"] == "STORAGE_FULL"


@pytest.mark.parametrize(
    ("program", "how"),
    [("echo the end; exit 7", "ended with code 7"), ("echo the end; kill -9 $$", "was killed by SIGKILL")],
)
def test_a_child_that_says_nothing_is_named_with_the_end_of_its_log(tmp_path, program, how):
    children = ended_children(tmp_path, program)
    assert [record.name for record in children.failed] == ["rank-0"]
    told = _failure(tmp_path, children)
    assert told.reason is Reason.INTERNAL
    assert f"rank-0 {how}" in told.message
    assert told.message.endswith("the end")


@pytest.mark.parametrize("program", ["exit 0", "exit 3"])
def test_done_and_stopped_are_no_failures(tmp_path, program):
    assert not ended_children(tmp_path, program).failed


def test_a_launcher_that_does_not_exist_is_refused_by_name(tmp_path):
    folder = sft_run(tmp_path, {"launcher": ["no-such-launcher"]})
    with pytest.raises(InvalidRequest, match=r"training\.launcher = 'no-such-launcher'") as caught:
        train_loop(folder, RunContext(folder))
    assert isinstance(caught.value, FusionRouteError)
