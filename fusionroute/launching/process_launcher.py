"""Experts as processes of a local stack: `fusionroute down`, `status` and `logs` know what is added here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from fusionroute import processes
from fusionroute.launching.launcher import NUM_LOG_LINES, Launch, Launched, LaunchFailed
from fusionroute.local_stack import expert_process, first_line, write_watch_targets
from fusionroute.processes import ProcessRecord
from fusionroute.stack_state import StackError, StackState, load_state, locked, tail

LOCK_PATIENCE_SECONDS = 10.0
# of the expert whose command is taken as a pattern: what only it may have
OWN_OPTIONS = ("model", "slot", "port", "ready-file", "advertise", "standby", "standby-seconds")


class ProcessLauncher:
    """Starts experts as the local stack starts its own, and enters them in its state.

    Args:
        folder: of the stack; without a state in it, the experts become a stack of their own, which
            `fusionroute down` stops.
        program: how to run an expert where no other one of the stack shows it.
    """

    def __init__(self, folder: Path, program: Sequence[str] | None = None) -> None:
        self._folder = folder
        self._program = tuple(program or ())

    def start(self, launch: Launch) -> Launched:
        """Starts a process with the settings of the slot's other expert."""
        with self._locked():
            state = load_state(self._folder) or StackState(self._folder.name, time.time(), launch.router, ())
            name = self._free_name(state, launch.slot)
            pattern = _pattern(state, launch.slot)
            ready_file = self._folder / "ready" / name
            ready_file.parent.mkdir(parents=True, exist_ok=True)
            ready_file.unlink(missing_ok=True)
            options = _options(pattern) if pattern else {"router": launch.router}
            options |= {
                "model": launch.model,
                "slot": launch.slot,
                "port": "0",
                "ready-file": str(ready_file),
            }
            if launch.device:
                options["device"] = launch.device
            arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
            try:
                record = processes.spawn(
                    name,
                    [*self._command(pattern), *arguments, "--standby"],
                    log=self._folder / "logs" / f"{name}.log",
                    environment=_environment(pattern),
                    die_with_parent=False,
                )
            except OSError as error:
                raise LaunchFailed(f"{name} cannot be started: {error}") from error
            replace(state, processes=(*state.processes, record)).save(self._folder)
        return Launched(name)

    def address_of(self, launched: Launched) -> str:
        """What the process has written to its ready file."""
        address = first_line(self._folder / "ready" / launched.name)
        if address:
            with self._locked():
                state = self._state()
                if state.addresses.get(launched.name) != address:
                    state = replace(state, addresses={**state.addresses, launched.name: address})
                    self._save(state, _watched(state, launched.name, self._folder))
        return address

    def check(self, launched: Launched) -> None:
        """Raises LaunchFailed once the process has ended."""
        record = _record(self._state(), launched.name)
        if record is None:
            raise LaunchFailed(f"{launched.name} was stopped by someone else")
        if processes.find(record) is None:
            code = processes.exit_code(record)
            how = "" if code is None else f" with exit code {code}"
            raise LaunchFailed(
                f"{launched.name} ended{how}; its log is {record.log}", self.log_tail(launched)
            )

    def log_tail(self, launched: Launched) -> list[str]:
        """Of the process's log."""
        return tail(self._folder / "logs" / f"{launched.name}.log", NUM_LOG_LINES)

    def keep(self, launched: Launched) -> None:
        """Nothing watches over processes."""

    def reach(self, address: str) -> str:
        """The address itself."""
        return address

    def find(self, address: str) -> Launched | None:
        """The process of the stack that serves at `address`."""
        state = load_state(self._folder)
        for name, known in state.addresses.items() if state is not None else ():
            if known == address and state is not None and _record(state, name) is not None:
                return Launched(name)
        return None

    def stop(self, launched: Launched, deadline_seconds: float) -> None:
        """Ends the process and forgets it; its log stays."""
        with self._locked():
            state = load_state(self._folder)
            record = _record(state, launched.name) if state is not None else None
            if state is None or record is None:
                return
            # Known first, so that whoever watches over the stack does not take it for a crash.
            replace(state, leaving=(*state.leaving, launched.name)).save(self._folder)
        processes.stop([record], deadline_seconds)
        with self._locked():
            state = load_state(self._folder)
            if state is None:
                return
            state = replace(
                state,
                processes=tuple(each for each in state.processes if each != record),
                addresses=_without(state.addresses, launched.name),
                leaving=tuple(name for name in state.leaving if name != launched.name),
            )
            self._save(state, _without(state.watch_addresses, launched.name))
            (self._folder / "ready" / launched.name).unlink(missing_ok=True)

    def _save(self, state: StackState, watched: Mapping[str, str]) -> None:
        replace(state, watch_addresses=watched).save(self._folder)
        if watched != state.watch_addresses:
            write_watch_targets(self._folder, watched)

    def _state(self) -> StackState:
        state = load_state(self._folder)
        if state is None:
            raise LaunchFailed(f"the stack {self._folder.name!r} is down")
        return state

    def _locked(self) -> _Lock:
        return _Lock(self._folder)

    def _free_name(self, state: StackState, slot: str) -> str:
        """Not the name of another process, nor of one whose log is still there."""
        taken = {record.name for record in state.processes}
        taken |= {path.stem for path in (self._folder / "logs").glob("*.log")}
        plain, number = expert_process(slot), 2
        while f"{plain}-{number}" in taken:
            number += 1
        return f"{plain}-{number}"

    def _command(self, pattern: ProcessRecord | None) -> tuple[str, ...]:
        if pattern is None:
            return self._program or (processes.program("expert-service"),)
        first_option = next(i for i, text in enumerate(pattern.command) if text.startswith("--"))
        return pattern.command[:first_option]


class _Lock:
    """The lock of a stack, waited for: another command may be entering its process just now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        give_up = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            self._held = locked(self._folder)
            try:
                self._held.__enter__()
            except StackError as error:
                if time.monotonic() > give_up:
                    raise LaunchFailed(str(error)) from None
                time.sleep(0.05)
            else:
                return

    def __exit__(self, *_: object) -> None:
        self._held.__exit__(None, None, None)


def _watched(state: StackState, name: str, folder: Path) -> Mapping[str, str]:
    """The watch ports with that of a process, which it writes below its address if it has one."""
    lines = (folder / "ready" / name).read_text().splitlines()
    return {**state.watch_addresses, name: lines[1]} if len(lines) > 1 else state.watch_addresses


def _without(addresses: Mapping[str, str], name: str) -> dict[str, str]:
    return {each: address for each, address in addresses.items() if each != name}


def _record(state: StackState, name: str) -> ProcessRecord | None:
    return next((record for record in state.processes if record.name == name), None)


def _pattern(state: StackState, slot: str) -> ProcessRecord | None:
    """The process whose settings a new one gets: the newest expert of the slot, else any expert."""
    experts = [record for record in state.processes if "slot" in _pairs(record.command)]
    same = [record for record in experts if _pairs(record.command)["slot"] == slot]
    living = [record for record in (*experts, *same) if processes.find(record) is not None]
    candidates = living or same or experts
    return candidates[-1] if candidates else None


def _pairs(command: Sequence[str]) -> dict[str, str]:
    """The options of a command line of `--name value` pairs and flags."""
    found = {}
    for index, text in enumerate(command):
        following = command[index + 1] if index + 1 < len(command) else "--"
        if text.startswith("--") and not following.startswith("--"):
            found[text.removeprefix("--")] = following
    return found


def _options(pattern: ProcessRecord) -> dict[str, str]:
    found = {name: value for name, value in _pairs(pattern.command).items() if name not in OWN_OPTIONS}
    if "watch-port" in found:
        found["watch-port"] = "0"  # the pattern has its own
    return found


def _environment(pattern: ProcessRecord | None) -> Mapping[str, str | None]:
    """That of the pattern, as far as it can be read: settings and secrets are in there."""
    plain = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    process = processes.find(pattern) if pattern is not None else None
    if process is None:
        return plain
    with suppress(psutil.Error):
        return {**dict.fromkeys(os.environ), **process.environ()}
    return plain
