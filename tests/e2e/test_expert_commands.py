"""`fusionroute experts ...` on a stack of real processes: swapped, rolled back, added, removed and reloaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fusionroute.stack_state import load_state
from tests.served_stack import make_family
from tests.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DEADLINE_SECONDS = 200


class Commands:
    """The command line, with a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        family = make_family(folder / "family", ("math", "strings"))
        self.router, self.experts = family.router, family.experts
        self.other = save_tiny_model(folder / "other", "qwen2", seed=77)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        names = ("FUSIONROUTE_", "REDIS_URL")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        return subprocess.Popen(
            # Ctrl-C is ignored by what was started in the background of a shell, and so by its children.
            ["env", "--default-signal=INT", Path(sys.executable).with_name("fusionroute"), *arguments],
            env=inherited | {"FUSIONROUTE_STATE_DIR": str(self.state)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, exit_code: int = 0) -> str:
        return end(self.start(*arguments), exit_code)

    def entries(self) -> list[dict[str, Any]]:
        """Of slot math."""
        found = json.loads(self.run("experts", "list", "--json"))["experts"]
        return [entry for entry in found if entry["slot"] == "math"]

    def states(self) -> list[str]:
        return sorted(entry["state"].removeprefix("EXPERT_STATE_") for entry in self.entries())

    def processes(self) -> set[str]:
        state = load_state(self.state / "default")  # `status` fails while one of them is not ready
        return {record.name for record in state.processes} if state is not None else set()

    def tokens(self) -> list[dict[str, Any]]:
        options = ("--max-tokens", "20", "--ignore-eos", "--json")
        lines = self.run("generate", "w5 w9 w30", *options).splitlines()
        return [event["token"] for event in map(json.loads, lines) if "token" in event]


def end(process: subprocess.Popen[str], exit_code: int = 0) -> str:
    output, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == exit_code, f"{process.args!r}\n{output}\n{errors}"
    return output if not exit_code else errors


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.2)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    experts = [text for slot, path in commands.experts.items() for text in ("--expert", f"{slot}={path}")]
    try:
        ports = ["--port", "0", "--http-port", "0"]
        commands.run("up", "--router", str(commands.router), *experts, *ports, "--threads", "1")
        yield commands
    finally:
        commands.run("down")
        mine = [p for p in psutil.process_iter() if any(str(commands.state) in word for word in _words(p))]
        assert mine == []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_swap_by_command_names_the_new_epoch_in_every_token_and_the_old_process_is_gone(
    commands: Commands,
) -> None:
    before = {token["expert_epoch"] for token in commands.tokens() if token.get("expert") == "math"}
    told = json.loads(
        commands.run("experts", "swap", "math", "--model", str(commands.other), "--no-canary", "--json")
    )
    assert (told["outcome"], told["retired"]) == ("swapped", told["stopped"])
    after = {token["expert_epoch"] for token in commands.tokens() if token.get("expert") == "math"}
    assert after == {str(told["epoch"])}
    assert int(max(before)) < told["epoch"]
    assert commands.processes() == {"router", "expert-math-2", "expert-strings"}
    refused = commands.run("experts", "rollback", "math", exit_code=4)
    assert "NOTHING_TO_ROLL_BACK" in refused


def test_a_swap_that_fails_or_is_interrupted_leaves_everything_as_it_was(commands: Commands) -> None:
    before = commands.entries()[0]["instance_id"], commands.processes()
    missing = commands.run("experts", "swap", "math", "--model", "/nowhere", exit_code=1)
    assert "'/nowhere' does not exist" in missing
    assert "load: " in missing
    refused = commands.run("experts", "add", "math", "--model", str(commands.experts["strings"]), exit_code=4)
    assert "use swap to change weights" in refused
    swapping = commands.start("experts", "swap", "math", "--model", str(commands.experts["math"]))
    wait_for(lambda: len(commands.processes()) > 3)
    swapping.send_signal(signal.SIGINT)
    end(swapping, 130)
    assert (commands.entries()[0]["instance_id"], commands.processes()) == before
    assert commands.states() == ["READY"]


def test_an_added_expert_shares_the_slot_until_it_is_removed(commands: Commands) -> None:
    model = commands.entries()[0]["model"]["name"]
    added = json.loads(commands.run("experts", "add", "math", "--model", model, "--json"))
    assert commands.states() == ["READY", "READY"]
    assert {entry["epoch"] for entry in commands.entries()} == {str(added["epoch"])}
    commands.run("experts", "reload", "math")
    assert commands.states() == ["READY", "READY"]
    commands.run("experts", "remove", added["instance_id"])
    assert commands.states() == ["READY"]
    last = commands.entries()[0]["instance_id"]
    assert "nobody but" in commands.run("experts", "remove", last, exit_code=4)
    assert commands.states() == ["READY"]
    assert len(commands.processes()) == 3


def test_a_rollback_while_the_old_one_drains_stops_the_new_one(commands: Commands) -> None:
    before = commands.entries()[0]
    # Answers one after the other keep the old expert's sessions from being idle under --policy finish.
    swapping = commands.start(
        "experts", "swap", "math", "--model", str(commands.experts["math"]), "--no-canary", "--json"
    )
    wait_for(lambda: "DRAINING" in commands.states() or swapping.poll() is not None)
    back = commands.start("experts", "rollback", "math", "--json")
    output = json.loads(end(swapping))
    if output["outcome"] == "swapped":  # it was quicker
        end(back, 4)
        return
    told = json.loads(end(back))
    assert told["serving"] == [before["instance_id"]]
    assert told["epoch"] > int(before["epoch"])
    assert output["stopped"] == [output["instance_id"]]
    assert [entry["instance_id"] for entry in commands.entries()] == [before["instance_id"]]
