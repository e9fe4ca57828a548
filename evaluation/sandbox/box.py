"""The sandbox as the rest of the evaluation sees it: a program and tests go in, a verdict comes out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.sandbox.protection import Limits, Measure, Protection
from fusionroute.errors import InternalFault, Reason, Unavailable

_PROJECT = Path(__file__).resolve().parents[2]
_FIRST_LINES = (
    "import sys; library = sys.path[:]; sys.path.insert(0, {project!r}); "
    "from evaluation.sandbox.inside import main; sys.path[:] = library; main()"
)
# Without site packages, and with sets in the same order every time; nothing of the user's own environment.
_ARGUMENTS = ("-s", "-S", "-P")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_DEVICES_AND_ZONES = ("/dev/null", "/dev/zero", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")
_SECONDS_TO_DIE = 10.0

_TRIES = """
def tries():
    import os, socket
    def reads(): open("/etc/passwd").close()
    def reads_folder(): os.listdir("/proc")
    def writes(): open("/tmp/fusionroute-sandbox-probe", "w").close()
    def connects(): socket.socket()
    def connects_locally(): socket.socketpair()
    def starts(): os.fork() or os._exit(0)
    done = []
    for each in (reads, reads_folder, writes, connects, connects_locally, starts):
        try:
            each()
        except OSError:
            continue
        done.append(each.__name__)
    return done
"""
_NOTHING_DONE = "done = tries()\nassert not done, done"


class Status(Enum):
    """How a check has ended."""

    PASSED = "passed"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What came out of a check.

    Attributes:
        note: why a program has not passed, in a line; "" when it has.
    """

    status: Status
    note: str = ""

    @property
    def is_passed(self) -> bool:
        """Whether all tests have run and none has failed."""
        return self.status is Status.PASSED


class Sandbox:
    """Runs Python programs that nobody has read; docs/tasks.md says what they can and cannot do.

    Safe to use from several threads; every check is a process tree of its own.

    Args:
        limits: of each check.
        allow_weak: run programs even where the kernel does not offer what keeps them from files and network.
        without: measures to do without, to see what a lesser kernel or a container would have.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        allow_weak: bool = False,
        without: frozenset[Measure] = frozenset(),
    ) -> None:
        self._limits = limits or Limits()
        self._allow_weak = allow_weak
        self._without = without

    @cached_property
    def protection(self) -> Protection:
        """What is in force here; tried once, by a program that does its worst.

        Raises:
            Unavailable: not on Linux, or the sandbox does not start.
        """
        if platform.system() != "Linux":
            message = f"programs of models run on Linux only, this is {platform.system()}"
            raise Unavailable(Reason.SANDBOX_WEAK, message)
        report = self._run(_TRIES, _NOTHING_DONE, ["tries"], Limits(), is_strict=False)
        if report is None:
            raise Unavailable(Reason.SANDBOX_WEAK, "the sandbox does not answer on this machine")
        in_force = report["in_force"]
        protection = Protection(
            in_force["files"], in_force["syscalls"], in_force["namespaces"], in_force["landlock"]
        )
        if not protection.missing and report["status"] != "passed":
            raise Unavailable(Reason.SANDBOX_WEAK, f"the sandbox leaks on this machine: {report['note']}")
        return protection

    def require(self) -> None:
        """Make sure that programs may run here.

        Raises:
            Unavailable: something is missing and `allow_weak` was not given; the message says what.
        """
        if (missing := self.protection.missing) and not self._allow_weak:
            raise Unavailable(
                Reason.SANDBOX_WEAK,
                f"no program of a model is run here: {'; '.join(missing)}. Allow a weak sandbox only in a "
                "container or machine that has nothing to lose",
            )

    def check(self, program: str, tests: str, names: Sequence[str]) -> CheckResult:
        """Run a program, then tests that use some of what it defines.

        Args:
            program: the text that nobody has read.
            tests: Python that raises where the program is wrong; runs in another process.
            names: what tests take from the program; all others they have of their own.

        Raises:
            Unavailable: see `require`.
            InternalFault: the sandbox itself has failed.
        """
        self.require()
        report = self._run(program, tests, names, self._limits, is_strict=not self._allow_weak)
        if report is None:
            return CheckResult(Status.TIMED_OUT, f"no verdict within {self._limits.wall_seconds:g} s")
        if report["status"] == "refused":
            raise Unavailable(Reason.SANDBOX_WEAK, f"the sandbox is weaker than it was: {report['in_force']}")
        return CheckResult(Status(report["status"]), str(report["note"]))

    def _run(
        self, program: str, tests: str, names: Sequence[str], limits: Limits, *, is_strict: bool
    ) -> dict[str, Any] | None:
        """The report of the examiner, None when the time was over."""
        token = secrets.token_hex(16)
        job = json.dumps({"program": program, "tests": tests, "names": list(names), "token": token})
        settings = {
            "parent": os.getpid(),
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "is_strict": is_strict,
            "without": sorted(measure.value for measure in self._without),
            "readable": _readable(),
        }
        start = _FIRST_LINES.format(project=str(_PROJECT))
        process = subprocess.Popen(
            [_interpreter(), *_ARGUMENTS, "-c", start, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(job.encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                _end(process)
        return _report(output, errors, token)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill all of a check that has not ended: nothing in there can leave its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=_SECONDS_TO_DIE)


def _report(output: bytes, errors: bytes, token: str) -> dict[str, Any]:
    """The examiner's report.

    An examiner that is gone without one has used up its own limits, in comparing what the program gave it.
    """
    try:
        report: dict[str, Any] = json.loads(output)
    except ValueError:
        if errors.strip():
            text = errors.decode(errors="replace").strip().splitlines()[-1]
            raise InternalFault(Reason.INTERNAL, f"the sandbox has failed: {text}") from None
        return {"status": "failed", "note": "the tests did not end within their limits", "in_force": {}}
    if report.get("token") != token:
        raise InternalFault(Reason.INTERNAL, "the sandbox has told the verdict of another check")
    return report


def _interpreter() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return str(Path(sys.executable).resolve())


def _readable() -> list[str]:
    """What a program may read: Python's own library, and the shared ones that its modules are linked with."""
    paths = {sysconfig.get_path("stdlib"), str(Path(sys.base_exec_prefix) / "lib"), *_SYSTEM_LIBRARIES}
    return sorted(path for path in {*paths, *_DEVICES_AND_ZONES} if Path(path).exists())
