"""The containers, for real: built, started, asked, stopped. Needs a docker engine; `make compose-test`.

With FUSIONROUTE_MODELS naming a folder with lab/ in it, readable by all, nothing is trained:
`fusionroute lab build --output FOLDER/lab`.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.docker, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = shlex.split(os.environ.get("COMPOSE", "docker compose"))
PROJECT = "fusionroute-test"
START_DEADLINE_SECONDS = 1500
READY_DEADLINE_SECONDS = 120


class Stack:
    """A compose project of our own on a port of our own."""

    def __init__(self, port: int, port_2: int, trainer_port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.both = f"127.0.0.1:{port},127.0.0.1:{port_2}"
        self.trainer = f"127.0.0.1:{trainer_port}"
        self._environment = {
            **os.environ,
            "FUSIONROUTE_PORT": str(port),
            "FUSIONROUTE_PORT_2": str(port_2),
            "COMPOSE_PROFILES": "replica",
            "TRAINER_PORT": str(trainer_port),
            "FUSIONROUTE_IMAGE": "fusionroute:test",
        }

    def compose(self, *arguments: str, timeout_seconds: float = 120) -> str:
        """What `docker compose` says; its complaints are shown when it fails."""
        command = [*COMPOSE, "-p", PROJECT, *arguments]
        return self._run(command, timeout_seconds)

    def fusionroute(self, *arguments: str) -> str:
        """What `fusionroute` says to the stack."""
        return self._run(
            [Path(sys.executable).with_name("fusionroute"), *arguments, "--address", self.address], 300
        )

    def generate_with_both(self, prompt: str) -> list[dict[str, Any]]:
        """The events of an answer by whichever router is there."""
        command = [Path(sys.executable).with_name("fusionroute"), "generate", prompt, "--json", "--address", self.both]
        return [json.loads(line) for line in self._run(command, 300).splitlines()]

    def generate(self, prompt: str, *options: str) -> list[dict[str, Any]]:
        """The events of an answer."""
        text = self.fusionroute("generate", prompt, "--json", *options)
        return [json.loads(line) for line in text.splitlines()]

    def inspect(self, template: str) -> list[str]:
        """One line for each container."""
        containers = self.compose("ps", "-q").split()
        command = ["docker", "inspect", "--format", template, *containers]
        return self._run(command, 30).splitlines()

    def wait_for_experts(self, number: int) -> None:
        """Returns once so many experts are registered."""
        deadline = time.monotonic() + READY_DEADLINE_SECONDS
        while self._num_experts() < number:
            assert time.monotonic() < deadline, self.compose("logs", "--tail", "40")
            time.sleep(1)

    def _num_experts(self) -> int:
        """How many the first router knows; none while it does not answer."""
        try:
            return len(json.loads(self.fusionroute("experts", "list", "--json"))["experts"])
        except AssertionError:
            return 0

    def _run(self, command: list[Any], timeout_seconds: float) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def written(events: list[dict[str, Any]]) -> str:
    """The text of an answer."""
    parts = [event.get("token") or event.get("finished") or {} for event in events]
    return "".join(part.get("text", "") for part in parts)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    stack = Stack(free_port(), free_port(), free_port())
    stack.compose("build", timeout_seconds=900)
    try:
        stack.compose("up", "-d", timeout_seconds=START_DEADLINE_SECONDS)
        stack.wait_for_experts(3)
        yield stack
    finally:
        stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "30")


def test_three_experts_write_one_answer(stack):
    events = stack.generate("box: 4+4; rev jbef=")
    assert written(events) == "[8; febj]"
    experts = {event["token"]["expert"] for event in events if "token" in event}
    assert {"math", "strings", "format"} <= experts


def test_the_same_seed_gives_the_same_answer_after_an_expert_was_restarted(stack):
    sampling = ("--temperature", "1.5", "--seed", "7", "--ignore-eos", "--max-tokens", "24")
    before = written(stack.generate("rev abc=", *sampling))
    stack.compose("restart", "expert-strings")
    stack.wait_for_experts(3)
    assert written(stack.generate("rev abc=", *sampling)) == before


def test_when_the_router_is_killed_the_other_one_answers_with_the_same_experts(stack):
    stack.compose("kill", "router")
    assert written(stack.generate_with_both("box: 4+4; rev jbef=")) == "[8; febj]"
    stack.compose("start", "router")
    stack.wait_for_experts(3)


def test_a_published_checkpoint_is_promoted_while_the_router_serves(stack):
    copy = "mkdir -p /checkpoints/published && cp -r /models/lab/router /checkpoints/published/run-sft-copy"
    stack.compose("exec", "-T", "trainer", "sh", "-c", copy)
    told = stack.fusionroute("checkpoints", "promote", "run-sft-copy", "--trainer", stack.trainer, "--json")
    fingerprint = json.loads(told)["fingerprint"]
    events = stack.generate("box: 4+4; rev jbef=")
    assert events[0]["started"]["checkpoint"] == fingerprint
    assert written(events) == "[8; febj]"
    stack.fusionroute("checkpoints", "rollback", "--trainer", stack.trainer)
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.compose("exec", "-T", "router", "touch", "/checkpoints/published/mark")


def test_every_container_is_confined(stack):
    facts = stack.inspect(
        "{{.Config.User}}|{{.HostConfig.ReadonlyRootfs}}|{{.HostConfig.CapDrop}}|{{.HostConfig.SecurityOpt}}"
    )
    assert len(facts) >= 6
    for fact in facts:
        user, read_only, dropped, options = fact.split("|")
        assert user in {"fusionroute", "redis"}
        assert read_only == "true"
        assert "ALL" in dropped
        assert "no-new-privileges" in options


def test_a_served_model_cannot_be_written_to(stack):
    with pytest.raises(AssertionError, match="Read-only file system"):
        stack.compose("exec", "-T", "expert-math", "touch", "/models/lab/mark")
    assert "router" in stack.compose("exec", "-T", "expert-math", "ls", "/models/lab")


def test_an_expert_is_swapped_for_a_container_of_its_kind_and_back_again(stack):
    """Equal weights, so that the answers stay; `--project` because other stacks may run on this machine."""
    docker = ("--launcher", "docker", "--project", PROJECT)
    before = stack.generate("box: 4+4; rev jbef=")
    swapped = json.loads(
        stack.fusionroute("experts", "swap", "math", "--model", "/models/lab/experts/math", *docker, "--json")
    )
    assert (swapped["outcome"], swapped["stopped"]) == ("swapped", swapped["retired"])
    after = stack.generate("box: 4+4; rev jbef=")
    assert written(after) == written(before)
    epochs = {e["token"]["expert_epoch"] for e in after if e.get("token", {}).get("expert") == "math"}
    assert epochs == {str(swapped["epoch"])}
    added = json.loads(
        stack.fusionroute("experts", "add", "math", "--model", "/models/lab/experts/math", *docker, "--json")
    )
    stack.fusionroute("experts", "remove", added["instance_id"], *docker)
    with pytest.raises(AssertionError, match="does not exist"):
        stack.fusionroute("experts", "swap", "math", "--model", "/models/nowhere", *docker)
    assert written(stack.generate("box: 4+4; rev jbef=")) == written(before)
