"""`fusionroute up --trainer` with the real daemons: a published checkpoint is promoted and answers with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusionroute.local_stack import stop
from fusionroute.manifest import written_fingerprint
from fusionroute.router_model import load_checkpoint
from fusionroute.stack_state import load_state
from tests.served_stack import make_family, save_router

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Commands:
    """The command line, with a state folder of its own."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def run(self, *arguments: str, exit_code: int = 0) -> str:
        import os

        names = ("FUSIONROUTE_", "REDIS_URL")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        done = subprocess.run(
            [Path(sys.executable).with_name("fusionroute"), *arguments],
            env=inherited | {"FUSIONROUTE_STATE_DIR": str(self.state)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == exit_code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout if not exit_code else done.stderr

    def checkpoint_of_an_answer(self) -> str:
        events = [
            json.loads(line)
            for line in self.run("generate", "w5 w9", "--json", "--max-tokens", "3").splitlines()
        ]
        started: dict[str, Any] = next(event["started"] for event in events if "started" in event)
        return str(started["checkpoint"])


def test_a_checkpoint_is_promoted_and_rolled_back_by_command_and_survives_a_restart(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family", ("math",))
    records = load_checkpoint(family.router).manifest.experts
    state = tmp_path / "state"
    published = state / "default" / "checkpoints" / "run-sft-a"
    save_router(published, records, seed=22)
    commands = Commands(state)
    start: tuple[str, ...] = (
        "up",
        "--router",
        str(family.router),
        "--expert",
        f"math={family.experts['math']}",
    )
    start += ("--trainer", "--port", "0", "--http-port", "0", "--threads", "1")
    try:
        assert "trainer on" in commands.run(*start)
        assert commands.checkpoint_of_an_answer() == written_fingerprint(family.router)
        told = json.loads(commands.run("checkpoints", "promote", "run-sft-a", "--json"))
        assert told["fingerprint"] == written_fingerprint(published)
        assert commands.checkpoint_of_an_answer() == written_fingerprint(published)
        processes = json.loads(commands.run("status", "--json"))["processes"]
        assert {row["process"]: row["state"] for row in processes} == dict.fromkeys(
            ("redis", "router", "trainer", "expert-math"), "ready"
        )
        commands.run("down")
        commands.run(*start)
        assert commands.checkpoint_of_an_answer() == written_fingerprint(published), (
            "what is promoted stays so"
        )
        commands.run("checkpoints", "rollback")
        assert commands.checkpoint_of_an_answer() == written_fingerprint(family.router)
        assert "no checkpoint is promoted" in commands.run("checkpoints", "rollback", exit_code=4)
    finally:
        if load_state(state / "default") is not None:
            stop(state / "default", 10.0)
