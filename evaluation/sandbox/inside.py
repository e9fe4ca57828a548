"""The first process of the sandbox: gives up its rights, starts program and examiner, and tells the verdict.

    evaluation ──job──> supervisor ── namespaces ──> examiner ── pipes ──> candidate
               <─────────────── verdict ────────────    │                     │
                                                  own limits and filters on both, the candidate's first;
                                                  it is there before the job is read and never sees the tests

Runs as a program of its own with a clean environment; imports little, since it starts once for every check.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from evaluation.sandbox import kernel
from evaluation.sandbox.candidate import Candidate
from evaluation.sandbox.examiner import Examiner, ProgramGone, ending, failure
from evaluation.sandbox.values import receive, send

MAX_JOB_BYTES = 64 << 20


def main() -> None:
    """Read settings from the first argument and a job from standard input; write a report to standard output."""
    settings = json.loads(sys.argv[1])
    sys.argv[1:] = []
    kernel.die_with(settings["parent"])
    os.chdir("/")
    with_namespaces = "namespaces" not in settings["without"] and _enter_namespaces()
    supervisor = os.getpid()
    if child := os.fork():
        os.waitpid(child, 0)
        os.killpg(0, signal.SIGKILL)  # whatever is left, and this process
    kernel.die_with(0 if with_namespaces else supervisor)  # in a namespace the supervisor has no number
    _examine(settings, with_namespaces)


def _enter_namespaces() -> bool:
    try:
        kernel.enter_namespaces()
    except kernel.NotOffered:
        return False
    return True


def _examine(settings: dict[str, Any], with_namespaces: bool) -> None:
    """Start the candidate, judge it by the job's tests, report."""
    requests_out, requests_in = os.pipe()
    answers_out, answers_in = os.pipe()
    examiner = os.getpid()
    candidate = os.fork()
    if candidate == 0:
        kernel.die_with(examiner)
        asked, answers = _alone_with(requests_out, answers_in)
        send(answers, _give_up_rights(settings, with_namespaces))
        Candidate(asked, answers).serve()
    os.close(requests_out)
    os.close(answers_in)
    report = os.dup(1)
    nowhere = os.open("/dev/null", os.O_RDWR)
    job = json.loads(_read_job())
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    in_force = receive(answers_out)
    _give_up_rights(settings, with_namespaces)
    if settings["is_strict"] and not (in_force["files"] and in_force["syscalls"]):
        verdict = {"status": "refused", "note": ""}
    else:
        verdict = _judged(Examiner(requests_in, answers_out), job, candidate, settings)
    os.write(report, json.dumps({**verdict, "token": job["token"], "in_force": in_force}).encode())
    os._exit(0)


def _alone_with(asked: int, answers: int) -> tuple[int, int]:
    """Close every descriptor but these two and a standard input, output and error that lead nowhere."""
    nowhere = os.open("/dev/null", os.O_RDWR)
    kept = [os.dup2(descriptor, 200 + place) for place, descriptor in enumerate((asked, answers))]
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.closerange(3, 200)
    os.closerange(202, 1 << 20)
    moved = os.dup2(kept[0], 3), os.dup2(kept[1], 4)
    os.closerange(5, 202)
    return moved


def _read_job() -> bytes:
    parts, size = [], 0
    while part := os.read(0, 1 << 20):
        parts.append(part)
        size += len(part)
        if size > MAX_JOB_BYTES:
            os._exit(3)
    return b"".join(parts)


def _give_up_rights(settings: dict[str, Any], with_namespaces: bool) -> dict[str, Any]:
    """All that the kernel offers and `settings` do not leave out; says what is in force."""
    without = settings["without"]
    kernel.become_unreadable()
    version = 0 if "landlock" in without else _landlock(settings["readable"])
    is_hidden = not version and with_namespaces and "mounts" not in without and _hide(settings["readable"])
    kernel.limit(cpu_seconds=settings["cpu_seconds"], memory_bytes=settings["memory_bytes"])
    kernel.drop_capabilities()
    is_filtered = "syscalls" not in without and _filter()
    return {
        "files": bool(version) or is_hidden,
        "syscalls": is_filtered,
        "namespaces": with_namespaces,
        "landlock": version,
    }


def _landlock(readable: list[str]) -> int:
    try:
        return kernel.landlock(readable)
    except kernel.NotOffered:
        return 0


def _hide(readable: list[str]) -> bool:
    try:
        kernel.hide_files(readable)
    except OSError:
        return False
    return True


def _filter() -> bool:
    try:
        kernel.filter_syscalls()
    except kernel.NotOffered:
        return False
    return True


def _judged(
    examiner: Examiner, job: dict[str, Any], candidate: int, settings: dict[str, Any]
) -> dict[str, str]:
    """Run the program over there and the tests here."""
    tests = job["tests"]
    try:
        names: dict[str, object] = {"__name__": "tests"}
        code = compile(tests, "<tests>", "exec")
        names.update(examiner.load(job["program"], job["names"]))
        exec(code, names)  # noqa: S102 - the tests are the benchmark's
    except ProgramGone as gone:
        return {"status": "failed", "note": str(gone) or _ending(candidate, settings)}
    except BaseException as error:
        return {"status": "failed", "note": failure(error, tests)}
    return {"status": "passed", "note": ""}


def _ending(candidate: int, settings: dict[str, Any]) -> str:
    _, status = os.waitpid(candidate, 0)
    return "the program " + ending(status, settings["cpu_seconds"])
