"""What programs want of the sandbox, and do not get; with all that this kernel offers, and with less."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from evaluation.sandbox.box import Sandbox, Status
from evaluation.sandbox.protection import Limits, Measure
from fusionroute.errors import Unavailable
from tests.hostile_programs import ENDLESS, FORGERS, NAMES, TRIES

KERNELS = {
    "all that is here": frozenset(),
    "a container's, without namespaces": frozenset({Measure.NAMESPACES}),
    "an old one, without Landlock": frozenset({Measure.LANDLOCK}),
}
SHORT = Limits(wall_seconds=2.0, cpu_seconds=1, memory_bytes=256 << 20)
READING = {"read_users", "read_project", "list_project", "list_processes"}
FIVE = """
import math
def tried(test):
    try:
        return bool(test())
    except Exception:
        return False
ways = {
    "equal": lambda: f() == 5,
    "not unequal": lambda: not f() != 5,
    "near": lambda: abs(f() - 5) < 1e-9,
    "near the other way": lambda: abs(5 - f()) < 1e-9,
    "close": lambda: math.isclose(f(), 5),
    "in a list": lambda: f() in [5],
    "the list has it": lambda: 5 in [f()],
    "contained": lambda: 5 in f(),
}
found = [name for name, test in ways.items() if tried(test)]
assert found, "no way"
"""
"""Passes if only one of many ways to compare finds f() to be 5."""


def _sandbox(limits: Limits | None = None, without: frozenset[Measure] = frozenset()) -> Sandbox:
    sandbox = Sandbox(limits, without=without)
    if missing := sandbox.protection.missing:
        pytest.skip(f"this kernel does not offer enough: {'; '.join(missing)}")
    return sandbox


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[str]:
    """The first line of `TRIES`: what is there to be touched."""
    existing = tmp_path / "existing"
    existing.write_text("secret")
    existing.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0fusionroute-probe")
        local.listen()
        facts = {
            "TARGET": str(tmp_path / "target"),
            "EXISTING": str(existing),
            "PROJECT": str(Path(__file__).parents[2]),
            "PORT": server.getsockname()[1],
            "EVALUATION": os.getpid(),
        }
        yield "".join(f"{name} = {value!r}\n" for name, value in facts.items())
    assert existing.read_text() == "secret"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing"]


def _sandbox_processes(of: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if (
            command
            and "evaluation.sandbox.inside" in " ".join(command)
            and json.loads(command[-1])["parent"] == of
        ):
            found.append(process)
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_program_reaches_nothing(kernel: str, targets: str):
    sandbox = _sandbox(without=KERNELS[kernel])
    names = list(NAMES)
    result = sandbox.check(targets + TRIES, f"found = reached({names})\nassert not found, found", ["reached"])
    assert result.is_passed, result.note


def test_what_programs_try_works_where_nothing_holds_them(targets: str):
    """Else a sandbox that reaches nothing would prove nothing."""
    command = targets + TRIES + f"\nprint({_HARMLESS!r} == reached({_HARMLESS!r}))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", (done.stdout, done.stderr)


# those that leave nothing behind and need no rights
_HARMLESS = [
    *(
        "thread",
        "program",
        "append",
        "memory_file",
        "read_users",
        "read_project",
        "list_processes",
        "read_own_memory",
    ),
    *(
        "tcp_loopback",
        "udp",
        "unix_socket",
        "pair_of_sockets",
        "kill_evaluation",
        "environment",
        "outlive_parent",
    ),
]


@pytest.mark.parametrize("aim", FORGERS)
def test_a_wrong_program_is_not_taken_for_a_right_one(aim: str, short: Sandbox):
    result = short.check(FORGERS[aim], FIVE, ["f"])
    assert result.status is not Status.PASSED
    assert result.note


@pytest.fixture(scope="module")
def short() -> Sandbox:
    return _sandbox(SHORT)


def test_a_right_program_passes(short: Sandbox):
    assert short.check("def f():\n    print('noise')\n    return 5", FIVE, ["f"]).is_passed


def test_tests_and_programs_exchange_values_functions_and_objects(short: Sandbox):
    program = (
        "import collections, fractions, re\n"
        "class Node:\n    def __init__(self, value): self.value, self.next = value, None\n"
        "    def __eq__(self, other): return self.value == other.value\n"
        "    def __add__(self, other): return Node(self.value + other.value)\n"
        "    def __getitem__(self, place): return self.value * place\n    def __len__(self): return 3\n"
        "def last(node): return node if node.next is None else last(node.next)\n"
        "def fill(kept, named, some): kept.append(1); named['x'] = 2; some.add(3)\n"
        "def same(*values, **named): return values + tuple(named.items())\n"
        "def through(function, values): return [function(value) for value in values]\n"
        "def numbers():\n    number = 0\n    while True:\n        yield number\n        number += 1\n"
        "def fails(kind): raise {'value': ValueError, 'own': type('Own', (KeyError,), {})}[kind]('why')\n"
        "def counted(text): return collections.Counter(text)\ndef found(text): return re.search('b', text)\n"
        "PLAIN = [1, 2]\n"
    )
    tests = """
import fractions, itertools
node = Node(1); node.next = Node(2); node.next.next = Node(3)
assert last(node).value == 3 and last(node) == Node(3) and last(node) != Node(4) and last(node) != 3
assert (Node(1) + Node(2)).value == 3 and node[5] == 5 and len(node) == 3
kept, named, some = [], {}, set()
fill(kept, named, some)
assert (kept, named, some) == ([1], {"x": 2}, {3})
values = (None, True, 1 << 100, -7, 0.1, float("inf"), "\\ud800 é", b"\\xff", (1, (2,)), {(1, 2): {3}}, 1j, range(3),
          frozenset({1}), fractions.Fraction(1, 3), [[]], int, ValueError)
back = same(*values)
assert back == values and [type(value) for value in back] == [type(value) for value in values]
assert same(a=1) == (("a", 1),)
assert through(lambda value: value * 2, [1, 2]) == [2, 4]
assert list(itertools.islice(numbers(), 3)) == [0, 1, 2]
for kind, error in (("value", ValueError), ("own", KeyError)):
    try:
        fails(kind)
    except error as raised:
        assert "why" in str(raised)
    else:
        raise RuntimeError(kind)
assert counted("aab") == {"a": 2, "b": 1} and found("abc") and not found("xyz") and PLAIN == [1, 2]
"""
    names = ["Node", "last", "fill", "same", "through", "numbers", "fails", "counted", "found", "PLAIN"]
    result = short.check(program, tests, names)
    assert result.is_passed, result.note


def test_a_failed_test_is_shown_with_its_line(short: Sandbox):
    note = short.check("def f(x): return x", "assert f(1) == 1\nassert f(2) == 3\n", ["f"]).note
    assert note == "AssertionError in assert f(2) == 3"


def test_a_program_that_never_ends_is_ended_with_all_it_started():
    sandbox = _sandbox(Limits(wall_seconds=1.5, cpu_seconds=1, memory_bytes=256 << 20))
    with ThreadPoolExecutor(len(ENDLESS)) as threads:
        results = dict(
            zip(
                ENDLESS,
                threads.map(lambda name: sandbox.check(ENDLESS[name], FIVE, ["f"]), ENDLESS),
                strict=True,
            )
        )
    assert all(result.status is not Status.PASSED and result.note for result in results.values()), results
    assert results["sleeps"].status is Status.TIMED_OUT
    assert not _sandbox_processes(os.getpid())


def test_a_program_that_computes_too_long_is_told_so():
    sandbox = _sandbox(Limits(wall_seconds=60, cpu_seconds=1))
    assert "processor time" in sandbox.check(ENDLESS["loops"], FIVE, ["f"]).note


def test_tests_that_never_end_are_ended(short: Sandbox):
    result = short.check("def f(): return 5", "while True: f()", ["f"])
    assert result.status is not Status.PASSED


def test_everything_ends_with_the_evaluation_that_started_it():
    _sandbox()
    program = (
        "from evaluation.sandbox.box import Sandbox\nfrom evaluation.sandbox.protection import Limits\n"
        "Sandbox(Limits(wall_seconds=100, cpu_seconds=100)).check('while True: pass', '', [])"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2]) as evaluation:
        _until(lambda: any(each.cpu_times().user > 0.3 for each in _sandbox_processes(evaluation.pid)))
        evaluation.send_signal(signal.SIGKILL)
    _until(lambda: not _sandbox_processes(evaluation.pid))


def _until(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_protection_of_files_no_program_runs():
    sandbox = Sandbox(without=frozenset({Measure.LANDLOCK, Measure.MOUNTS}))
    with pytest.raises(Unavailable, match="read your files"):
        sandbox.check("def f(): return 5", FIVE, ["f"])


def test_without_a_filter_no_program_runs():
    sandbox = Sandbox(without=frozenset({Measure.SYSCALLS}))
    with pytest.raises(Unavailable, match="reach the network"):
        sandbox.check("def f(): return 5", FIVE, ["f"])


def test_a_weak_sandbox_runs_programs_where_that_is_allowed():
    sandbox = Sandbox(allow_weak=True, without=frozenset({Measure.LANDLOCK, Measure.MOUNTS}))
    assert sandbox.check("def f(): return 5", FIVE, ["f"]).is_passed


def test_the_list_of_system_calls_alone_leaves_only_reading(targets: str):
    weak = frozenset({Measure.LANDLOCK, Measure.NAMESPACES})
    sandbox = Sandbox(allow_weak=True, without=weak)
    if not sandbox.protection.syscalls_filtered:
        pytest.skip("no list of system calls here")
    # its own memory is its own; a list of descriptors is none of them: opening one is refused
    harmless = READING | {"read_own_memory", "examiners_descriptors"}
    tests = f"found = set(reached({list(NAMES)}))\nassert {READING!r} <= found <= {harmless!r}, found"
    result = sandbox.check(targets + TRIES, tests, ["reached"])
    assert result.is_passed, result.note


def test_landlock_alone_keeps_files_and_other_processes(targets: str):
    sandbox = Sandbox(allow_weak=True, without=frozenset({Measure.SYSCALLS, Measure.NAMESPACES}))
    if sandbox.protection.landlock < 6:
        pytest.skip("no Landlock 6 here")
    names = [
        *sorted(READING),
        *("write_in_tmp", "write_here", "append", "truncate", "delete", "rename", "make_folder", "make_link"),
        *("program", "tcp_loopback", "unix_socket", "kill_evaluation"),
    ]
    result = sandbox.check(targets + TRIES, f"found = reached({names})\nassert not found, found", ["reached"])
    assert result.is_passed, result.note


def test_what_keeps_programs_in_can_be_read():
    text = str(_sandbox().protection)
    assert "filtered" in text
    assert "OPEN" not in text
