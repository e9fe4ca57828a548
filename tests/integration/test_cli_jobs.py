"""`fusionroute jobs` against the program `trainer-service` with a Redis of its own; its runs are fake."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fusionroute.cli import main
from fusionroute.trainer_client import TrainerClient
from tests.fake_job import config_of

SECONDS = 60.0


def started(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A trainer on a folder, and its address."""
    ready_file = folder / "ready"
    ready_file.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tests.fake_trainer", "--port", "0", "--ready-file", str(ready_file),
            "--jobs-dir", str(folder / "jobs"), "--checkpoints-dir", str(folder / "checkpoints"),
            "--job-heartbeat-seconds", "0.1", "--job-lease-seconds", "1",
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while not ready_file.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process, ready_file.read_text().strip()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, address = started(tmp_path_factory.mktemp("trainer"))
    yield address
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(trainer: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["jobs", *arguments, "--trainer", trainer])


def submitted(trainer: str, name: str = "good", num_steps: int = 10) -> str:
    async def submit() -> str:
        async with TrainerClient.open(trainer) as client:
            return (await client.submit("sft", config_of(name, num_steps), uuid.uuid4().hex)).job.job_id

    return asyncio.run(submit())


def test_watch_shows_progress_and_ends_with_the_checkpoint(trainer: str) -> None:
    job = submitted(trainer)
    result = run(trainer, "watch", job)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"checkpoint  good-sft-{job}\n"
    assert "training 10/10, loss 0.100" in result.stderr


def test_watch_with_json_is_a_line_for_every_change(trainer: str) -> None:
    job = submitted(trainer, num_steps=30)
    result = run(trainer, "watch", job, "--json")
    changes = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert changes[-1]["state"] == "succeeded"
    assert (changes[-1]["step"], changes[-1]["num_steps"], changes[-1]["stage"]) == (30, 30, "training")
    assert len(changes) > 2
    assert result.stderr == ""


def test_a_failed_job_is_told_with_its_reason_and_exit_code_1(trainer: str) -> None:
    job = submitted(trainer, "nan")
    result = run(trainer, "watch", job)
    assert result.exit_code == 1
    assert result.stderr.endswith(
        f"error: job {job} failed: the loss of step 3 is nan (part: cdpo) (LOSS_NOT_FINITE)\n"
    )


def test_list_and_get_tell_what_there_is_for_people_and_scripts(trainer: str) -> None:
    job = submitted(trainer)
    run(trainer, "watch", job)
    line = next(line for line in run(trainer, "list").stdout.splitlines() if line.startswith(job))
    assert f"published good-sft-{job}" in line
    assert " succeeded " in line and " sft " in line and " good " in line
    listed = json.loads(run(trainer, "list", "--json").stdout)
    assert listed[0]["job_id"] == job
    assert json.loads(run(trainer, "list", "--limit", "1", "--json").stdout) == listed[:1]
    shown = json.loads(run(trainer, "get", job, "--json").stdout)
    assert shown == listed[0]
    assert shown["config"]["training"]["max_steps"] == 10
    assert f"folder                  {shown['folder']}\n" in run(trainer, "get", job).stdout


def test_logs_are_printed_and_followed_to_the_end(trainer: str) -> None:
    job = submitted(trainer, num_steps=30)
    followed = run(trainer, "logs", job, "--follow")
    assert followed.exit_code == 0
    assert "step 1\n" in followed.stdout and "step 30\n" in followed.stdout
    assert run(trainer, "logs", job).stdout == followed.stdout
    assert run(trainer, "logs", job, "--from", "5").stdout == followed.stdout[5:]


def test_cancel_waits_and_resume_goes_on(trainer: str) -> None:
    job = submitted(trainer, num_steps=100)
    deadline = time.monotonic() + SECONDS
    while json.loads(run(trainer, "get", job, "--json").stdout)["step"] < 3:
        assert time.monotonic() < deadline
    cancelled = run(trainer, "cancel", job, "--wait")
    assert (cancelled.exit_code, cancelled.stdout) == (0, f"{job} cancelled: on request\n")
    again = run(trainer, "resume", job)
    assert again.stdout in (f"{job} queued\n", f"{job} running\n")
    resumed = run(trainer, "resume", job, "--watch")
    assert resumed.exit_code == 0
    assert resumed.stdout == f"checkpoint  good-sft-{job}\n"
    refused = run(trainer, "cancel", job)
    assert refused.exit_code == 4
    assert "is succeeded" in refused.stderr and "JOB_STATE" in refused.stderr


def test_an_unknown_job_is_refused_and_an_absent_trainer_is_nobody_there(trainer: str) -> None:
    for verb in ("get", "watch", "logs", "cancel", "resume"):
        result = run(trainer, verb, "0123456789ab")
        assert result.exit_code == 4, verb
        assert "job_id = '0123456789ab' is not known" in result.stderr
    assert run("127.0.0.1:1", "list").exit_code == 3
    assert run("127.0.0.1:1", "watch", "0123456789ab").exit_code == 3


def test_jobs_outlive_a_trainer_with_a_redis_of_its_own(tmp_path: Path) -> None:
    process, address = started(tmp_path)
    job = submitted(address)
    run(address, "watch", job)
    process.kill()
    process.wait(SECONDS)
    process, address = started(tmp_path)
    try:
        assert json.loads(run(address, "get", job, "--json").stdout)["state"] == "succeeded"
    finally:
        process.kill()
        process.wait(SECONDS)
