"""Ctrl-C on `fusionroute train ... --local`: the first saves and stops, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time
from pathlib import Path
import click
from fusionroute.cli.train_local import run_here
from trainer.config import LabelJob
from trainer.run_context import RunProgress

def obedient(config, context):
    context.report(RunProgress("training", 1, 9))
    (context.folder / "running").touch()
    while True:
        if context.stop.requested and context.stop.save:
            (context.folder / "saved").touch()
        context.stop.check()
        time.sleep(0.02)

def deaf(config, context):
    (context.folder / "running").touch()
    while True:
        time.sleep(0.02)

job = LabelJob(experts={"math": "m"}, data={"files": ("a.jsonl",)})
try:
    run_here(job, Path(sys.argv[2]), None, {"obedient": obedient, "deaf": deaf}[sys.argv[1]])
except click.exceptions.Exit as leaving:
    sys.exit(leaving.exit_code)
"""


def start(kind: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, kind, str(folder)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (folder / "running").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_run_save_and_stop(number: signal.Signals, tmp_path: Path):
    process = start("obedient", tmp_path / "run")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (tmp_path / "run" / "saved").exists()
    assert "stopping once the state is saved" in errors
    assert f"goes on from what lies in {tmp_path / 'run'}" in errors


def test_the_second_signal_ends_a_run_that_does_not_listen(tmp_path: Path):
    process = start("deaf", tmp_path / "run")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "again to stop at once" in errors
