"""The local stack's processes, with daemons that only pretend to serve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fusionroute import local_stack, processes
from fusionroute.local_stack import Programs, StackPlan
from fusionroute.processes import ProcessRecord
from fusionroute.stack_state import (
    AlreadyUp,
    NotUp,
    ProcessDied,
    StackError,
    StackState,
    load_state,
    locked,
    stack_folder,
    tail,
)

FAKE = (sys.executable, str(Path(__file__).with_name("fake_daemon.py")))
PROGRAMS = Programs(FAKE, FAKE, FAKE)


def everyone_is_ready(address: str) -> Mapping[str, str]:
    return {"math": "ready", "code": "ready"}


def plan_of(router: str = "good", **experts: str) -> StackPlan:
    return StackPlan(router_checkpoint=router, experts=experts or {"math": "good", "code": "good"}, port=7)


def start(folder: Path, plan: StackPlan, **options: object) -> StackState:
    arguments = {"ask_registry": everyone_is_ready, "programs": PROGRAMS, "deadline_seconds": 20.0, **options}
    return local_stack.start(plan, folder, **arguments)


def survivors(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.pid != os.getpid():
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "stack"
    yield path
    state = load_state(path)
    if state is not None:
        processes.stop(state.processes, 0.2)
    assert survivors(path) == []


def test_a_started_stack_is_remembered_with_its_processes_and_addresses(folder: Path) -> None:
    phases: list[tuple[str, str]] = []
    state = start(folder, plan_of(), on_progress=lambda name, phase: phases.append((name, phase)))
    assert load_state(folder) == state
    assert [record.name for record in state.alive] == ["router", "expert-math", "expert-code"]
    assert state.router_address == "127.0.0.1:50007"
    assert state.addresses["expert-math"] == "127.0.0.1:50000"
    assert phases[0] == ("router", "starting")
    assert phases[-1] == ("router", "ready")
    assert ("expert-code", "ready") in phases


def test_an_isolated_stack_takes_no_settings_from_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://somewhere")
    start(folder, plan_of())
    assert "redis redis://somewhere" in (folder / "logs" / "router.log").read_text()
    local_stack.stop(folder, 10.0)
    start(folder, replace(plan_of(), isolated=True))
    assert "redis None" in (folder / "logs" / "router.log").read_text()


def option(state: StackState, process: str, name: str) -> str:
    (record,) = [record for record in state.processes if record.name == process]
    return record.command[record.command.index(name) + 1]


def test_a_base_model_is_started_in_the_slot_that_the_router_is_told(folder: Path) -> None:
    plan = replace(plan_of(math="good", base="good"), base_slot="base")
    state = start(folder, plan, ask_registry=lambda address: {"math": "ready", "base": "ready"})
    assert option(state, "router", "--base-slot") == option(state, "expert-base", "--slot") == "base"


def test_a_trainer_shares_redis_and_checkpoints_with_the_router(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    state = start(folder, replace(plan_of(math="good"), trainer=True))
    names = [record.name for record in state.alive]
    assert names == ["redis", "router", "trainer", "expert-math"]
    socket = Path(state.addresses["redis"])
    for name in ("router", "trainer"):
        assert f"redis unix://{socket}" in (folder / "logs" / f"{name}.log").read_text()
        assert option(state, name, "--checkpoints-dir") == str(folder / "checkpoints")
    assert option(state, "trainer", "--router") == state.router_address
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert local_stack.stop(folder, 10.0) == []
    assert state.alive == [] and not socket.parent.exists()
    assert list((folder / "redis").glob("appendonly*")), "the jobs' store is kept"


def test_several_routers_share_a_redis_and_experts_know_all_of_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    state = start(folder, replace(plan_of(math="good"), routers=2))
    assert [record.name for record in state.alive] == ["redis", "router", "router-2", "expert-math"]
    socket = state.addresses["redis"]
    for name in ("router", "router-2"):
        assert f"redis unix://{socket}" in (folder / "logs" / f"{name}.log").read_text()
    assert option(state, "router-2", "--port") == "0"
    both = f"{state.addresses['router']},{state.addresses['router-2']}"
    assert state.router_address == option(state, "expert-math", "--router") == both


def test_a_redis_that_is_named_serves_a_trainer_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://somewhere")
    state = start(folder, replace(plan_of(math="good"), trainer=True))
    assert [record.name for record in state.processes] == ["router", "trainer", "expert-math"]
    assert "redis redis://somewhere" in (folder / "logs" / "trainer.log").read_text()


def test_a_redis_of_the_stack_ends_after_the_daemons_that_need_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    state = start(folder, replace(plan_of(math="stubborn"), trainer=True))
    redis = next(record for record in state.processes if record.name == "redis")
    stopping = threading.Thread(target=local_stack.stop, args=(folder, 1.5))
    stopping.start()
    time.sleep(0.7)
    assert processes.find(redis) is not None
    stopping.join()
    assert state.alive == []


def test_without_a_trainer_there_is_no_redis_process(folder: Path) -> None:
    names = [record.name for record in start(folder, plan_of(math="good")).processes]
    assert names == ["router", "expert-math"]


def test_experts_are_told_where_the_router_serves(folder: Path) -> None:
    state = start(folder, plan_of())
    expert = state.processes[1]
    assert expert.command[expert.command.index("--router") + 1] == state.router_address
    assert expert.command[expert.command.index("--slot") + 1] == "math"


def test_stopping_ends_every_process_and_forgets_the_state(folder: Path) -> None:
    state = start(folder, plan_of())
    assert local_stack.stop(folder, 10.0) == []
    assert state.alive == []
    assert load_state(folder) is None
    with pytest.raises(NotUp):
        local_stack.stop(folder, 1.0)


def test_a_process_that_ignores_the_request_to_stop_is_killed_and_named(folder: Path) -> None:
    state = start(folder, plan_of(math="stubborn", code="good"))
    assert local_stack.stop(folder, 1.0) == ["expert-math"]
    assert state.alive == []


def test_what_a_daemon_started_itself_does_not_survive_it(folder: Path) -> None:
    state = start(folder, plan_of(router="parent"))
    family = processes.session_members(state.processes[0])
    assert len(family) == 2
    local_stack.stop(folder, 1.0)
    assert not any(member.is_running() for member in family)


def test_orphans_of_a_daemon_that_is_gone_are_found_by_its_session(folder: Path) -> None:
    state = start(folder, plan_of(router="parent"))
    family = processes.session_members(state.processes[0])
    os.kill(state.processes[0].pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(state.processes[0].pid)], timeout=5.0)
    assert processes.find(state.processes[0]) is None
    local_stack.stop(folder, 1.0)
    assert not any(member.is_running() for member in family)


def test_a_second_start_of_a_running_stack_is_refused_and_hurts_nothing(folder: Path) -> None:
    state = start(folder, plan_of())
    with pytest.raises(AlreadyUp, match=r"127\.0\.0\.1:50007"):
        start(folder, plan_of())
    assert len(state.alive) == 3


def test_what_an_earlier_crash_left_on_disk_does_not_hinder_a_start(folder: Path) -> None:
    first = start(folder, plan_of())
    processes.stop(first.processes, 10.0)
    second = start(folder, plan_of())
    assert {record.pid for record in second.alive}.isdisjoint(record.pid for record in first.processes)


def test_a_daemon_that_dies_takes_the_start_back_and_shows_its_last_words(folder: Path) -> None:
    with pytest.raises(ProcessDied, match="expert-code ended with exit code 3") as caught:
        start(folder, plan_of(math="good", code="dies"))
    assert caught.value.log_tail == ["the weights are not there"]
    assert load_state(folder) is None
    assert survivors(folder) == []


def test_a_daemon_that_never_serves_is_given_up_at_the_deadline(folder: Path) -> None:
    with pytest.raises(StackError, match="expert-code does not serve"):
        start(folder, plan_of(math="good", code="mute"), deadline_seconds=1.5)
    assert survivors(folder) == []


def test_an_expert_missing_from_the_registry_is_named_at_the_deadline(folder: Path) -> None:
    with pytest.raises(StackError, match="code not in the registry"):
        start(folder, plan_of(), ask_registry=lambda address: {"math": "ready"}, deadline_seconds=1.5)
    assert survivors(folder) == []


def test_an_interrupted_start_leaves_nothing_running(folder: Path) -> None:
    def interrupt(address: str) -> Mapping[str, str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(folder, plan_of(), ask_registry=interrupt)
    assert survivors(folder) == []
    assert load_state(folder) is None


def test_a_start_during_a_start_is_refused(folder: Path) -> None:
    with locked(folder), pytest.raises(StackError, match="someone else"):
        start(folder, plan_of())


def test_a_recycled_pid_is_not_taken_for_ours(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    try:
        record = ProcessRecord("router", stranger.pid, "an earlier boot:12", tmp_path / "log", ("x",))
        assert processes.find(record) is None
        assert processes.session_members(record) == []
        assert processes.stop([record], 0.2) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is a Linux feature")
def test_processes_tied_to_their_parent_end_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\n"
            "from pathlib import Path\n"
            "from fusionroute.processes import spawn\n"
            "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
            f"folder = Path({str(tmp_path)!r})\n"
            "record = spawn('a', command, log=folder / 'log', environment={}, die_with_parent=True)\n"
            "(folder / 'draft').write_text(str(record.pid))\n"
            "(folder / 'draft').rename(folder / 'pid')\n"
            "time.sleep(60)\n",
        ]
    )
    deadline = time.monotonic() + 20.0
    while not pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = psutil.Process(int(pid_file.read_text()))
    while "sleep" not in " ".join(child.cmdline()) or "prctl" in " ".join(child.cmdline()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    psutil.wait_procs([child], timeout=10.0)
    assert not child.is_running()


def test_a_state_file_that_is_not_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"format": 2}')
    with pytest.raises(StackError, match=r"state\.json cannot be read"):
        load_state(tmp_path)


@pytest.mark.parametrize("name", ["", "../x", "a/b"])
def test_a_stack_name_that_is_no_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StackError, match="stack name"):
        stack_folder(name, tmp_path)


def test_the_state_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSIONROUTE_STATE_DIR", str(tmp_path))
    assert stack_folder("a") == tmp_path / "a"


def test_cores_are_shared_out_with_at_least_one_thread_each() -> None:
    assert [local_stack.threads_for(4, cores) for cores in (1, 2, 4, 16)] == [1, 1, 1, 4]


def test_the_tail_of_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "no.log", 5) == []


def test_devices_are_shared_out_from_the_router_on() -> None:
    plan = StackPlan("router", {"math": "m", "code": "c", "instruct": "i"}, devices=("cuda:0", "cuda:1"))
    names = ["router", "expert-math", "expert-code", "expert-instruct"]
    assert [plan.device_of(name) for name in names] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
