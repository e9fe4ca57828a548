"""Launchers: processes that the local stack knows, and containers that are copies of the compose project's own."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from docker.errors import APIError, NotFound

from fusionroute import local_stack, processes
from fusionroute.launching import Launch, Launched, LaunchFailed
from fusionroute.launching.docker_launcher import DockerLauncher
from fusionroute.launching.process_launcher import ProcessLauncher
from fusionroute.local_stack import Programs, StackPlan
from fusionroute.stack_state import StackState, load_state

FAKE = (sys.executable, str(Path(__file__).with_name("fake_daemon.py")))
LAUNCH = Launch("math", "good", "router:1")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "stack"
    plan = StackPlan(router_checkpoint="good", experts={"math": "good"}, port=7, threads=3)
    local_stack.start(
        plan, path, ask_registry=lambda address: {"math": "ready"}, programs=Programs(FAKE, FAKE, FAKE)
    )
    yield path
    if load_state(path) is not None:
        local_stack.stop(path, 1.0)


def state_of(folder: Path) -> StackState:
    state = load_state(folder)
    assert state is not None
    return state


def address_of(launcher: ProcessLauncher, launched: Launched) -> str:
    give_up = time.monotonic() + 20
    while not (address := launcher.address_of(launched)):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    return address


def test_an_added_process_has_the_settings_of_the_slots_other_one_and_is_known_to_the_stack(
    folder: Path,
) -> None:
    launcher = ProcessLauncher(folder)
    launched = launcher.start(Launch("math", "other", "ignored:1", device="cuda:1"))
    record = state_of(folder).processes[-1]
    assert record.name == launched.name == "expert-math-2"
    old = next(each for each in state_of(folder).processes if each.name == "expert-math")
    assert record.command[:2] == old.command[:2]
    options = dict(zip(record.command[2:-1:2], record.command[3::2], strict=False))
    assert options["--router"] == "127.0.0.1:50007"
    assert (options["--model"], options["--device"], options["--threads"]) == ("other", "cuda:1", "3")
    assert record.command[-1] == "--standby"
    address = address_of(launcher, launched)
    assert state_of(folder).addresses[launched.name] == address
    launcher.check(launched)
    assert "serving other" in "".join(launcher.log_tail(launched))
    local_stack.stop(folder, 5.0)
    assert processes.find(record) is None


def test_a_stopped_process_is_forgotten_and_its_name_not_used_again(folder: Path) -> None:
    launcher = ProcessLauncher(folder)
    launched = launcher.start(LAUNCH)
    record = state_of(folder).processes[-1]
    address_of(launcher, launched)
    launcher.stop(launched, 5.0)
    launcher.stop(launched, 5.0)
    assert processes.find(record) is None
    state = state_of(folder)
    assert [each.name for each in state.processes] == ["router", "expert-math"]
    assert (launched.name in state.addresses, state.leaving) == (False, ())
    assert launcher.start(LAUNCH).name == "expert-math-3"


def test_the_first_expert_of_a_stack_is_found_by_its_address_and_may_be_stopped(folder: Path) -> None:
    launcher = ProcessLauncher(folder)
    address = state_of(folder).addresses["expert-math"]
    found = launcher.find(address)
    assert found == Launched("expert-math")
    assert launcher.find("127.0.0.1:1") is None
    assert launcher.reach(address) == address


def test_a_process_that_ends_shows_its_last_words(folder: Path) -> None:
    launcher = ProcessLauncher(folder)
    launched = launcher.start(Launch("math", "dies", "router:1"))
    give_up = time.monotonic() + 20
    with pytest.raises(LaunchFailed, match="expert-math-2 ended") as caught:
        while time.monotonic() < give_up:
            launcher.check(launched)
            time.sleep(0.05)
    assert caught.value.log_tail == ["the weights are not there"]


def test_without_a_stack_the_experts_are_one_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    launcher = ProcessLauncher(folder, FAKE)
    launched = launcher.start(LAUNCH)
    try:
        record = state_of(folder).processes[0]
        assert "router:1" in record.command
        assert state_of(folder).router_address == "router:1"
        address_of(launcher, launched)
    finally:
        assert local_stack.stop(folder, 5.0) == []


def a_container(service: str, slot: str, *, status: str = "running", **host: Any) -> MagicMock:
    """An expert's container as the SDK shows it."""
    labels = {
        "com.docker.compose.project": "demo",
        "com.docker.compose.service": service,
        "com.docker.compose.config-hash": "c0ffee",
        "com.docker.compose.oneoff": "False",
        "com.docker.compose.depends_on": "router:service_healthy",
    }
    container = MagicMock(labels=labels, status=status)
    container.name = f"demo-{service}-1"
    container.attrs = {
        "Image": "sha256:abc",
        "State": {"Status": status, "ExitCode": 3},
        "Config": {
            "Cmd": ["expert-service"],
            "User": "fusionroute",
            "Env": [
                "PATH=/bin",
                f"FUSIONROUTE_EXPERT_SLOT={slot}",
                "FUSIONROUTE_EXPERT_MODEL=/models/old",
                "FUSIONROUTE_EXPERT_ROUTER=router:50050",
                "FUSIONROUTE_EXPERT_PORT=50061",
                f"FUSIONROUTE_EXPERT_ADVERTISE={service}:50061",
            ],
            "Healthcheck": {"Test": ["CMD", "probe"], "Interval": 10},
        },
        "HostConfig": {
            "NetworkMode": "demo_default",
            "Binds": ["demo_models:/models:ro"],
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges:true"],
            "ReadonlyRootfs": True,
            "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 5},
            "PortBindings": {"50061/tcp": [{"HostPort": "1"}]},
            **host,
        },
        "NetworkSettings": {"Networks": {"extra": {}, "demo_default": {"IPAddress": "172.18.0.5"}}},
    }
    return container


@pytest.fixture
def engine() -> MagicMock:
    """A docker client with two experts."""
    client = MagicMock()
    containers = [a_container("expert-math", "math"), a_container("expert-strings", "strings")]
    client.containers.list.return_value = containers
    client.api.create_container.return_value = {"Id": "1234"}
    by_name = {container.name: container for container in containers}
    client.containers.get.side_effect = by_name.__getitem__
    return client


def test_a_container_is_a_copy_of_the_slots_own_with_another_model(engine: MagicMock) -> None:
    launched = DockerLauncher(engine, "demo").start(Launch("math", "/models/new", "unused:1"))
    (image,), made = engine.api.create_container.call_args
    assert image == "sha256:abc"
    assert made["name"] == launched.name
    assert launched.name.startswith("demo-expert-math-")
    assert made["environment"] == {
        "PATH": "/bin",
        "FUSIONROUTE_EXPERT_SLOT": "math",
        "FUSIONROUTE_EXPERT_MODEL": "/models/new",
        "FUSIONROUTE_EXPERT_ROUTER": "router:50050",
        "FUSIONROUTE_EXPERT_PORT": "50061",
        "FUSIONROUTE_EXPERT_ADVERTISE": f"{launched.name}:50061",
        "FUSIONROUTE_EXPERT_STANDBY": "true",
    }
    host = made["host_config"]
    assert (host["Binds"], host["CapDrop"]) == (["demo_models:/models:ro"], ["ALL"])
    assert (host["SecurityOpt"], host["ReadonlyRootfs"]) == (["no-new-privileges:true"], True)
    assert (host["PortBindings"], host["RestartPolicy"]) == ({}, {"Name": "no"})
    assert made["networking_config"] == {"EndpointsConfig": {"demo_default": {}}}
    engine.api.connect_container_to_network.assert_called_once_with("1234", "extra")
    labels = made["labels"]
    assert labels["com.docker.compose.project"] == "demo"
    assert labels["com.docker.compose.service"] not in ("expert-math", "expert-strings")
    assert labels["com.docker.compose.oneoff"] == "False"
    assert "com.docker.compose.depends_on" not in labels
    assert (made["user"], made["healthcheck"]["Test"]) == ("fusionroute", ["CMD", "probe"])
    engine.api.start.assert_called_once_with("1234")


def test_a_container_that_cannot_be_started_is_removed(engine: MagicMock) -> None:
    engine.api.start.side_effect = APIError("no such device")
    with pytest.raises(LaunchFailed, match="no such device"):
        DockerLauncher(engine).start(LAUNCH)
    engine.api.remove_container.assert_called_once_with("1234", force=True)


def test_a_container_with_the_engines_socket_is_not_copied(engine: MagicMock) -> None:
    socket = ["/var/run/docker.sock:/var/run/docker.sock"]
    engine.containers.list.return_value = [a_container("expert-math", "math", Binds=socket)]
    with pytest.raises(LaunchFailed, match="mounts docker"):
        DockerLauncher(engine).start(LAUNCH)
    engine.api.create_container.assert_not_called()


def test_a_container_is_reached_at_its_address_in_the_network(engine: MagicMock) -> None:
    launcher = DockerLauncher(engine)
    assert launcher.reach("expert-math:50061") == "172.18.0.5:50061"
    assert launcher.reach("elsewhere:50061") == "elsewhere:50061"
    assert launcher.find("expert-math:50061") == Launched("demo-expert-math-1")
    assert launcher.find("elsewhere:50061") is None


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"Status": "exited", "ExitCode": 3}, "exited with exit code 3"),
        ({"Status": "running", "Health": {"Status": "unhealthy"}}, "unhealthy"),
    ],
)
def test_a_container_that_has_ended_or_is_not_healthy_shows_its_last_words(
    engine: MagicMock, state: dict[str, Any], words: str
) -> None:
    container = engine.containers.list.return_value[0]
    launcher = DockerLauncher(engine)
    launcher.check(Launched(container.name))
    container.attrs["State"] = state
    container.logs.return_value = b"one\ntwo\n"
    with pytest.raises(LaunchFailed, match=words) as caught:
        launcher.check(Launched(container.name))
    assert caught.value.log_tail == ["one", "two"]


def test_only_what_was_started_here_is_removed_when_it_stops(engine: MagicMock) -> None:
    container = engine.containers.list.return_value[0]
    launcher = DockerLauncher(engine)
    launcher.stop(Launched(container.name), 12.4)
    container.stop.assert_called_once_with(timeout=12)
    container.remove.assert_not_called()
    container.labels["org.fusionroute.launched"] = "math"
    launcher.stop(Launched(container.name), 5)
    container.remove.assert_called_once_with(force=True)
    engine.containers.get.side_effect = NotFound("gone")
    launcher.stop(Launched(container.name), 5)


def test_what_has_taken_its_place_is_started_again_as_its_pattern_is(engine: MagicMock) -> None:
    made = a_container("expert-math-1234", "math", RestartPolicy={"Name": "no"})
    made.labels["org.fusionroute.launched"] = "math"
    engine.containers.list.return_value.append(made)
    engine.containers.get.side_effect = None
    engine.containers.get.return_value = made
    DockerLauncher(engine).keep(Launched("demo-expert-math-1234"))
    made.update.assert_called_once_with(restart_policy={"Name": "on-failure", "MaximumRetryCount": 5})


def test_experts_of_several_projects_are_told_apart_by_name(engine: MagicMock) -> None:
    engine.containers.list.return_value[1].labels["com.docker.compose.project"] = "other"
    with pytest.raises(LaunchFailed, match="demo, other"):
        DockerLauncher(engine).start(LAUNCH)
    engine.containers.list.return_value = []
    with pytest.raises(LaunchFailed, match="any compose project"):
        DockerLauncher(engine).start(LAUNCH)
