"""The whole stack as plain processes on one machine: routers with their Redis, the experts, on request a trainer.

The daemons get ordinary settings, so anything that their environment variables can say holds here too. Routers and
trainer share a Redis: the one that REDIS_URL names, else one that is a process of the stack and keeps its data.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusionroute import private_redis, processes
from fusionroute.errors import Unavailable
from fusionroute.stack_state import (
    AlreadyUp,
    NotUp,
    ProcessDied,
    StackError,
    StackState,
    forget_state,
    load_state,
    locked,
)

DEFAULT_ROUTER_PORT = 50050
DEFAULT_HTTP_PORT = 8080
START_DEADLINE_SECONDS = 300.0
STOP_DEADLINE_SECONDS = 25.0
POLL_SECONDS = 0.1
REDIS_STOP_SECONDS = 5.0
TARGETS_FILE = "prometheus.json"
"""In a stack's folder: its watch ports, as Prometheus's file_sd_configs reads them."""
ROUTER, TRAINER, REDIS = "router", "trainer", "redis"
# folders of a stack's trainer
JOBS, CHECKPOINTS = "jobs", "checkpoints"
SETTINGS_VARIABLES = (
    "FUSIONROUTE_EXPERT_",
    "FUSIONROUTE_ROUTER_",
    "FUSIONROUTE_TRAINER_",
    "FUSIONROUTE_CONFIG",
    "REDIS_URL",
)
SOCKET_FOLDER_PREFIX = "fusionroute-redis-"
"""In the system's folder of temporary files: a stack's own folder may be too deep for a socket."""

AskRegistry = Callable[[str], Mapping[str, str]]
"""Router address -> state by slot, for example {"math": "ready"}; raises nothing, {} when not reachable."""

OnProgress = Callable[[str, str], None]
"""Told a process name and what it has come to: "starting", "serving on HOST:PORT", "ready"."""


@dataclass(frozen=True, slots=True)
class Programs:
    """How to run the daemons: absolute program paths, with leading arguments if any."""

    router: tuple[str, ...]
    expert: tuple[str, ...]
    trainer: tuple[str, ...] = ()

    @classmethod
    def installed(cls) -> Programs:
        """The console scripts of this environment."""
        names = ("router-service", "expert-service", "trainer-service")
        return cls(*((processes.program(name),) for name in names))


@dataclass(frozen=True, slots=True)
class StackPlan:
    """What to start."""

    router_checkpoint: str
    # path or hub id by slot, of a base model too
    experts: Mapping[str, str]
    host: str = "127.0.0.1"
    # of the first router; 0 = any free one, which the others take anyway
    port: int = DEFAULT_ROUTER_PORT
    # replicas that share sessions and registry; when one dies another goes on with its turns
    routers: int = 1
    # of the router and then of each expert in turn, from the start again when they run out
    devices: tuple[str, ...] = ("cpu",)
    dtype: str = "auto"
    # torch threads of each process
    threads: int = 1
    # take no settings from the environment, so that the stack shares nothing, such as a Redis, with others
    isolated: bool = False
    # also start a trainer, whose checkpoints the router takes up when they are promoted
    trainer: bool = False
    # give each daemon a watch port, any free one
    watch: bool = False
    # of the first router, for applications over HTTP; 0 = any free one, which the others take anyway; None = none
    http_port: int | None = None
    # slot among `experts` whose model is not an expert but the base of the rule proxy; empty = none
    base_slot: str = ""
    # further environment of the daemons, for example settings by their variables
    variables: Mapping[str, str] = field(default_factory=dict)

    def device_of(self, process: str) -> str:
        """Where a process runs its model."""
        names = [*self.router_names(), *(expert_process(slot) for slot in self.experts)]
        return self.devices[names.index(process) % len(self.devices)]

    def router_names(self) -> list[str]:
        """The names of the routers' processes: router, router-2, ..."""
        return [router_process(index) for index in range(self.routers)]


def threads_for(num_processes: int, num_cores: int | None = None) -> int:
    """Torch threads for each of so many processes: the cores shared out, at least one each."""
    cores = num_cores if num_cores is not None else len(os.sched_getaffinity(0))
    return max(1, cores // num_processes)


def free_http_port() -> int:
    """The usual port for HTTP, or 0, any free one, where something else has taken it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_HTTP_PORT))
        except OSError:
            return 0
    return DEFAULT_HTTP_PORT


def start(
    plan: StackPlan,
    folder: Path,
    *,
    ask_registry: AskRegistry,
    programs: Programs | None = None,
    die_with_parent: bool = False,
    on_progress: OnProgress = lambda name, phase: None,
    deadline_seconds: float = START_DEADLINE_SECONDS,
) -> StackState:
    """Starts router, experts and trainer and returns once the registry has every expert ready.

    On any failure, and when interrupted, whatever was started is stopped again and the state removed; the
    logs stay.

    Raises:
        AlreadyUp: processes of an earlier start still run.
        ProcessDied: a daemon ended.
        StackError: not ready within the deadline, or another start or stop is at work.
    """
    with locked(folder):
        earlier = load_state(folder)
        if earlier is not None and earlier.alive:
            raise AlreadyUp(f"the stack {folder.name!r} is up, its router on {earlier.router_address}")
        launch = _Launch(plan, folder, programs or Programs.installed(), die_with_parent, on_progress)
        launch.deadline = time.monotonic() + deadline_seconds
        try:
            launch.start_redis()
            launch.start_routers()
            launch.start_trainer()
            launch.start_experts()
            launch.wait_for_registry(ask_registry)
        except BaseException:
            _stop(launch.state, STOP_DEADLINE_SECONDS)
            forget_state(folder)
            raise
        return launch.state


def stop(folder: Path, deadline_seconds: float = STOP_DEADLINE_SECONDS) -> list[str]:
    """Stops all processes of a stack within one deadline.

    Returns:
        The names of the processes that had to be killed.

    Raises:
        NotUp: nothing was started there.
    """
    with locked(folder):
        state = load_state(folder)
        if state is None:
            raise NotUp(f"no stack {folder.name!r} is up")
        killed = _stop(state, deadline_seconds)
        forget_state(folder)
        return killed


def _stop(state: StackState, deadline_seconds: float) -> list[str]:
    """Stops the daemons and then their Redis, in which they have said until the end what became of their work."""
    daemons = [record for record in state.processes if record.name != REDIS]
    killed = processes.stop(daemons, deadline_seconds)
    killed += processes.stop(
        [record for record in state.processes if record.name == REDIS], REDIS_STOP_SECONDS
    )
    socket_folder = Path(state.addresses.get(REDIS, "/")).parent
    if socket_folder.name.startswith(SOCKET_FOLDER_PREFIX):
        shutil.rmtree(socket_folder, ignore_errors=True)
    return killed


class _Launch:
    """One start in progress."""

    def __init__(
        self,
        plan: StackPlan,
        folder: Path,
        programs: Programs,
        die_with_parent: bool,
        on_progress: OnProgress,
    ) -> None:
        self.plan, self.folder, self.programs = plan, folder, programs
        self.die_with_parent, self.on_progress = die_with_parent, on_progress
        self.deadline = 0.0
        named = os.environ.get("FUSIONROUTE_ROUTER_REDIS_URL") or os.environ.get("REDIS_URL", "")
        self.redis_url = "" if plan.isolated else named
        self.state = StackState(folder.name, time.time(), "", ())
        for old in (*folder.glob("logs/*.log"), *folder.glob("ready/*"), *folder.glob(TARGETS_FILE)):
            old.unlink()
        (folder / "ready").mkdir(parents=True, exist_ok=True)

    def start_redis(self) -> None:
        """Starts a Redis where several processes need the same one and none is named."""
        is_shared = self.plan.trainer or self.plan.routers > 1
        if not is_shared or self.redis_url:
            return
        socket = Path(tempfile.mkdtemp(prefix=SOCKET_FOLDER_PREFIX)) / "redis.sock"
        self._remember(addresses={**self.state.addresses, REDIS: str(socket)})
        data = self.folder / "redis"
        data.mkdir(mode=0o700, exist_ok=True)
        try:
            command = private_redis.server_command(private_redis.find_redis_server(), socket, data)
        except Unavailable as error:
            raise StackError(error.message) from None
        self._run(REDIS, command)
        while not private_redis.answers(socket):
            self._pause("redis does not answer")
        self.redis_url = private_redis.url_of(socket)
        self.on_progress(REDIS, f"serving on {socket}")

    def start_routers(self) -> None:
        names = self.plan.router_names()
        for name in names:
            port = self.plan.port if name == ROUTER else 0
            options = {"checkpoint": self.plan.router_checkpoint, "port": str(port)}
            if self.plan.http_port is not None:
                options["http-port"] = str(self.plan.http_port if name == ROUTER else 0)
            if self.plan.base_slot:
                options["base-slot"] = self.plan.base_slot
            if self.plan.trainer:
                options["checkpoints-dir"] = str(self.folder / CHECKPOINTS)
            self._spawn(name, self.programs.router, {**options, **self._model_options(name)})
        self._remember(router_address=",".join(self._wait_for_address(name) for name in names))

    def start_trainer(self) -> None:
        if not self.plan.trainer:
            return
        options = {"port": "0", "router": self.state.router_address}
        for name in (JOBS, CHECKPOINTS):
            options[f"{name}-dir"] = str(self.folder / name)
        self._spawn(TRAINER, self.programs.trainer, options)
        self._wait_for_address(TRAINER)

    def start_experts(self) -> None:
        for slot, model in self.plan.experts.items():
            name = expert_process(slot)
            options = {"model": model, "slot": slot, "port": "0", "router": self.state.router_address}
            self._spawn(name, self.programs.expert, {**options, **self._model_options(name)})
        for slot in self.plan.experts:
            self._wait_for_address(expert_process(slot))

    def wait_for_registry(self, ask_registry: AskRegistry) -> None:
        missing = set(self.plan.experts)
        while missing:
            states = ask_registry(self.state.addresses[ROUTER])
            for slot in sorted(slot for slot in missing if states.get(slot) == "ready"):
                missing.discard(slot)
                self.on_progress(expert_process(slot), "ready")
            if missing:
                self._pause(f"{', '.join(sorted(missing))} not in the registry of the router")
        self.on_progress(ROUTER, "ready")

    def _model_options(self, name: str) -> dict[str, str]:
        return {
            "device": self.plan.device_of(name),
            "dtype": self.plan.dtype,
            "threads": str(self.plan.threads),
        }

    def _spawn(self, name: str, program: Sequence[str], options: Mapping[str, str]) -> None:
        common = {"host": self.plan.host, "ready-file": str(self.folder / "ready" / name)}
        if self.plan.watch:
            common |= {"watch-port": "0", "watch-host": "127.0.0.1"}
        arguments = [text for key, value in {**options, **common}.items() for text in (f"--{key}", value)]
        self._run(name, [*program, *arguments])

    def _run(self, name: str, command: Sequence[str]) -> None:
        record = processes.spawn(
            name,
            command,
            log=self.folder / "logs" / f"{name}.log",
            environment=self._environment(),
            die_with_parent=self.die_with_parent,
        )
        self._remember(processes=(*self.state.processes, record))
        self.on_progress(name, "starting")

    def _environment(self) -> dict[str, str | None]:
        inherited = [name for name in os.environ if name.startswith(SETTINGS_VARIABLES)]
        removed = dict.fromkeys(inherited if self.plan.isolated else ())
        threads = {
            "OMP_NUM_THREADS": str(self.plan.threads),
            # Only one of the processes computes a token's part at a time; the others should not spin meanwhile.
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        # In the environment, not among the arguments, which everybody can read: it may hold a password.
        redis = {"REDIS_URL": self.redis_url} if self.redis_url else {}
        return {**removed, **threads, **redis, "PYTHONUNBUFFERED": "1", **self.plan.variables}

    def _wait_for_address(self, name: str) -> str:
        ready_file = self.folder / "ready" / name
        while not (address := first_line(ready_file)):
            self._pause(f"{name} does not serve")
        self._remember(addresses={**self.state.addresses, name: address})
        further = ready_file.read_text().splitlines()[1:]
        for url in (line for line in further if line.startswith(("http://", "https://"))):
            self._remember(http_urls={**self.state.http_urls, name: url})
        if self.plan.watch:
            self._remember_watch_address(name, further[0])
        self.on_progress(name, f"serving on {address}")
        return address

    def _remember_watch_address(self, name: str, address: str) -> None:
        found = {**self.state.watch_addresses, name: address}
        self._remember(watch_addresses=found)
        write_watch_targets(self.folder, found)

    def _pause(self, waiting_for: str) -> None:
        for record in self.state.processes:
            if processes.find(record) is None:
                raise ProcessDied(record, processes.exit_code(record))
        if time.monotonic() > self.deadline:
            raise StackError(f"gave up waiting: {waiting_for}; see {self.folder / 'logs'}")
        time.sleep(POLL_SECONDS)

    def _remember(self, **changes: object) -> None:
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]  # replace checks the names
        self.state.save(self.folder)


def write_watch_targets(folder: Path, found: Mapping[str, str]) -> None:
    """Writes the watch ports, by process name, as Prometheus's file_sd_configs reads them."""
    targets = [
        {"targets": [each], "labels": {"process": process, "job": process.split("-")[0]}}
        for process, each in found.items()
    ]
    draft = folder / f"{TARGETS_FILE}.draft"
    draft.write_text(json.dumps(targets, indent=2))
    draft.replace(folder / TARGETS_FILE)


def router_process(index: int) -> str:
    """The name of the router's process number `index`, from 0."""
    return ROUTER if index == 0 else f"{ROUTER}-{index + 1}"


def expert_process(slot: str) -> str:
    """The name of the process that serves a slot."""
    return f"expert-{slot}"


def first_line(path: Path) -> str:
    """The first line of a file; empty while there is no file."""
    try:
        return path.read_text().partition("\n")[0].strip()
    except FileNotFoundError:
        return ""
