"""`python -m tests.fake_trainer OPTIONS`: the program `trainer-service`, its jobs being `tests.fake_job`."""

from __future__ import annotations

import sys

from fusionroute.settings import daemon_command
from trainer.bootstrap import run
from trainer.settings import TrainerSettings

FAKE_JOB_COMMAND = (sys.executable, "-m", "tests.fake_job")

if __name__ == "__main__":
    daemon_command(
        "fake-trainer", "For tests.", TrainerSettings, lambda settings: run(settings, FAKE_JOB_COMMAND)
    )()
