"""The training loop across processes: killed and begun again, divided over two, stopped, failing, orphaned."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fusionroute.errors import Reason, TrainingFailed
from tests.loop_lessons import cdpo_run, losses, sft_lesson, sft_run, trained_tensors
from trainer.loop import train_loop
from trainer.loop_inputs import SftLesson
from trainer.run_context import RunContext, RunProgress, Stopped

DDP_TOLERANCE = 1e-5
"""Largest difference of parameters after 120 steps that the order of float32 sums over processes may make."""

DEADLINE_SECONDS = 90.0

PARENT = """
import sys
from pathlib import Path
from trainer.loop import train_loop
from trainer.run_context import RunContext
folder = Path(sys.argv[1])
train_loop(folder, RunContext(folder, lambda progress: print("step", progress.step, flush=True)))
"""


def start_parent(folder: Path) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    threads = str(torch.get_num_threads())  # sums of more threads are made in another order
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": threads},
    )


def wait_for_step(parent: subprocess.Popen[str], step: int) -> None:
    assert parent.stdout is not None
    for line in parent.stdout:
        if int(line.split()[1]) >= step:
            return
    raise AssertionError(f"ended with {parent.wait()} before step {step}")


def train(folder: Path) -> dict[str, torch.Tensor]:
    train_loop(folder, RunContext(folder))
    return trained_tensors(folder)


def test_killed_at_a_random_step_and_begun_again_a_run_gives_the_undisturbed_parameters(tmp_path):
    training = {"max_steps": 60, "log_every_steps": 1, "save_every_steps": 4}
    undisturbed = train(sft_run(tmp_path / "undisturbed", training))
    folder = sft_run(tmp_path / "killed", training)
    step = random.randint(5, 40)
    with start_parent(folder) as parent:
        wait_for_step(parent, step)
        parent.kill()
    assert not (folder / "trained").exists()
    resumed = train(folder)
    for name, value in undisturbed.items():
        assert torch.equal(resumed[name], value), f"{name} after a kill at step {step}"
    assert losses(folder) == losses(tmp_path / "undisturbed")


def test_two_processes_compute_what_one_does_and_a_stop_between_changes_nothing(tmp_path):
    training = {"max_steps": 120, "learning_rate": 1e-4, "log_every_steps": 5}  # long enough to be stopped within
    one = train(cdpo_run(tmp_path / "one", training | {"batch_rows": 8}))
    folder = cdpo_run(tmp_path / "two", training | {"batch_rows": 4, "num_processes": 2})
    seen: list[RunProgress] = []

    def report(progress: RunProgress) -> None:
        seen.append(progress)
        context.stop.request()

    context = RunContext(folder, report)
    with pytest.raises(Stopped):
        train_loop(folder, context)
    assert seen[0].stage == "training"
    states = list((folder / "states").iterdir())
    assert len(states) == 1
    assert {path.name for path in states[0].iterdir()} > {"rank-0.safetensors", "rank-1.safetensors"}
    two = train(folder)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=DDP_TOLERANCE)
    # the stop has added a log at its own step, which divides one window of metrics; the last is whole
    for name in ("step", "loss", "gradient_norm", "routing_entropy", "rewards/margins", "bias/mean"):
        assert losses(folder, name)[-1] == pytest.approx(losses(tmp_path / "one", name)[-1], rel=1e-3)


def test_a_failure_in_a_child_process_keeps_its_name(tmp_path):
    lesson = sft_lesson()
    gold = np.full_like(lesson.labels.gold_logprobs, -np.inf)
    labels = dataclasses.replace(lesson.labels, gold_logprobs=gold)
    folder = sft_run(tmp_path, {"num_processes": 2, "batch_rows": 4}, SftLesson(lesson.rows, labels))
    with pytest.raises(TrainingFailed, match="loss/expert is not finite at step 1") as caught:
        train(folder)
    assert caught.value.reason is Reason.LOSS_NOT_FINITE
    assert caught.value.metadata["part"] == "expert"


def test_children_end_with_their_parent(tmp_path):
    folder = sft_run(tmp_path, {"num_processes": 2, "batch_rows": 4, "max_steps": 1_000_000})
    with start_parent(folder) as parent:
        wait_for_step(parent, 1)
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 2
        parent.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_SECONDS)
    assert not alive
    saved = [path for path in (folder / "states").iterdir() if (path / "COMPLETE").exists()]
    assert len(saved) == 1  # they were asked to end and could save
