"""The command `trainer-service`."""

from __future__ import annotations

from fusionroute.settings import daemon_command
from trainer.settings import TrainerSettings


def _run(settings: TrainerSettings) -> int:
    from trainer.bootstrap import run

    return run(settings)


main = daemon_command(
    "trainer-service",
    "Runs training jobs one after the other, each in a process of its own, and publishes what they make.\n\n"
    "Example: trainer-service --jobs-dir ./jobs --checkpoints-dir ./checkpoints --port 50070",
    TrainerSettings,
    _run,
)
