"""`python -m tests.fake_job FOLDER`: a job's process whose run counts steps and writes a checkpoint, without a model.

What it does is in its configuration: `training.max_steps` steps of `STEP_SECONDS`, a state every fifth, and, by name

    good       nothing special
    parent     starts a process that ignores SIGTERM, in a session of its own
    stubborn   does not listen when it is asked to stop
    nan        fails at step 3 with a named error
    bug        fails at step 3 as nobody has foreseen
    full       has no room left on the disk at step 3
    suicide    kills itself at step 3, each time
    half       makes a folder that is no complete checkpoint
    labels     makes something that is no checkpoint
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fusionroute.errors import Reason, TrainingFailed
from trainer.config import JobConfig, SftJob
from trainer.jobs.process import main
from trainer.run_context import RunContext, RunProgress, RunResult

STEP_SECONDS = 0.02
SAVE_EVERY_STEPS = 5
NOTE = "first line\nWARNING: second line"


def config_of(name: str = "good", num_steps: int = 10) -> str:
    """The configuration of a fake job, JSON."""
    content = {
        "name": name,
        "experts": {"math": "nowhere"},
        "data": {"files": ["nothing.jsonl"]},
        "router": "nowhere",
        "training": {"max_steps": num_steps},
    }
    return SftJob.model_validate(content).to_json()


def steps_done(folder: Path) -> list[int]:
    """Every step that was made in a job's folder, by all attempts, in order."""
    path = folder / "steps.txt"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def run(config: JobConfig, context: RunContext) -> RunResult:
    """Counts from the last saved step on."""
    assert isinstance(config, SftJob) and config.training.max_steps is not None
    state = context.folder / "state.json"
    first = json.loads(state.read_text())["step"] if state.exists() else 0
    if config.name == "parent":
        sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
        subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
    for step in range(first + 1, config.training.max_steps + 1):
        print(f"step {step}")
        if context.stop.requested and config.name != "stubborn":
            if context.stop.save:
                save(state, step - 1)
            context.stop.check()
        time.sleep(STEP_SECONDS)
        if step == 3:
            go_wrong(config.name)
        with (context.folder / "steps.txt").open("a") as steps:
            steps.write(f"{step}\n")
        if step % SAVE_EVERY_STEPS == 0:
            save(state, step)
        note = NOTE if step == 1 else ""
        context.report(RunProgress("training", step, config.training.max_steps, loss=1 / step, note=note))
    artifact = context.folder / "artifact"
    artifact.mkdir(exist_ok=True)
    (artifact / "weights").write_text(f"made by {config.name} in {config.training.max_steps} steps")
    if config.name != "half":
        (artifact / "COMPLETE").touch()
    return RunResult(artifact, is_checkpoint=config.name != "labels", metrics={})


def go_wrong(name: str) -> None:
    """What its name says."""
    if name == "nan":
        raise TrainingFailed(Reason.LOSS_NOT_FINITE, "the loss of step 3 is nan (part: cdpo)")
    if name == "bug":
        raise ZeroDivisionError("nobody has thought of this")
    if name == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if name == "suicide":
        os.kill(os.getpid(), signal.SIGKILL)


def save(state: Path, step: int) -> None:
    """A state that is there as a whole or not at all."""
    draft = state.with_suffix(".draft")
    draft.write_text(json.dumps({"step": step}))
    draft.replace(state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], run))
