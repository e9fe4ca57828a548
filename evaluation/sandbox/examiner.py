"""The side that is trusted: runs the tests in a process where no line of the program runs.

A program can print, exit, replace built-ins, catch what is raised, or look for the tests in memory: all of that
happens in the candidate's process, which knows neither the tests nor how the verdict is told. What it can do is
return values, and these are compared here.
"""

from __future__ import annotations

import builtins
import signal
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from evaluation.sandbox.values import PeerGone, pack, receive, send, unpack

MAX_NOTE_CHARACTERS = 300


class ProgramError(Exception):
    """The program raised something that is no built-in kind of exception."""


class ProgramGone(BaseException):
    """The program's process has ended: no test can go on, not even one that catches every exception."""


class Examiner:
    """Asks a candidate's process for values.

    Args:
        requests, answers: descriptors to write requests to and to read answers from.
    """

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._handed_over: list[Callable[..., object]] = []

    def load(self, program: str, names: Sequence[str]) -> dict[str, object]:
        """Run the program; what it has defined of `names`.

        Raises:
            Exception: what the program raised.
            ProgramGone: its process has ended.
        """
        self.ask("run", program)
        found = self.ask("defined", list(names))
        return {name: found[name] for name in names if name in found}

    def ask(self, do: str, *values: object, **named: object) -> Any:
        """Let the candidate apply one of its functions; containers among `values` change as they do there.

        Raises:
            Exception: what was raised there.
            ProgramGone: its process has ended.
        """
        reply = self._exchange(
            {"do": do, "values": pack(list(values), self._keep), "named": pack(named, self._keep)}
        )
        if "raised" in reply:
            self._raise(list(reply["raised"]), str(reply["text"]))
        try:
            for value, changed in zip(values, reply["changed"], strict=True):
                if changed is not None:
                    _become(value, unpack(changed, self._find))
            return unpack(reply["result"], self._find)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ProgramGone(f"the program has sent what is no value: {error}") from None

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """A reply to a request; calls of functions that a test has handed over are served in between."""
        try:
            send(self._requests, request)
            while isinstance(reply := receive(self._answers), dict) and "call" in reply:
                send(self._requests, self._called_back(reply))
        except PeerGone as error:
            raise ProgramGone(str(error)) from None
        if not isinstance(reply, dict):
            raise ProgramGone("the program has sent what is no answer")
        return reply

    def _called_back(self, call: dict[str, Any]) -> dict[str, Any]:
        try:
            function = self._handed_over[int(call["call"])]
            values, named = unpack(call["values"], self._find), unpack(call["named"], self._find)
            return {"result": pack(function(*values, **named), self._keep)}
        except Exception as error:
            return {"raised": True, "text": f"{type(error).__name__}: {error}"[:MAX_NOTE_CHARACTERS]}

    @staticmethod
    def _raise(kinds: list[str], text: str) -> NoReturn:
        for name in kinds[:64]:
            kind = getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                if kind is Exception:
                    break
                try:
                    raise kind(text) from None
                except TypeError:  # one that is not made from a text, such as UnicodeDecodeError
                    if kind is TypeError:
                        raise
        raise ProgramError(f"{str(kinds[0])[:80]}: {text}") from None

    def _keep(self, value: object) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"t": "its", "v": value._number}
        if callable(value):
            self._handed_over.append(value)
            return {"t": "mine", "v": len(self._handed_over) - 1}
        raise TypeError(
            f"a test cannot hand a {type(value).__name__} to a program: plain data and functions only"
        )

    def _find(self, whose: str, number: int) -> object:
        return Remote(self, number) if whose == "its" else self._handed_over[number]


def _become(value: Any, changed: Any) -> None:
    """Give a test's own container the contents that it has over there."""
    if type(value) is not type(changed) or value == changed:
        return
    if isinstance(value, (list, bytearray)):
        value[:] = changed
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(changed)


class Remote:
    """An object of the program: its functions, classes and instances. Equal to nothing but what the program made."""

    def __init__(self, examiner: Examiner, number: int) -> None:
        object.__setattr__(self, "_examiner", examiner)
        object.__setattr__(self, "_number", number)

    def __call__(self, *values: object, **named: object) -> Any:
        return self._examiner.ask("call", self, *values, **named)

    def __getattr__(self, name: str) -> Any:
        return self._examiner.ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._examiner.ask("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._examiner.ask("eq", self, other))

    def __hash__(self) -> int:
        return hash(self._number)


def _forward(name: str) -> None:
    def method(self: Remote, *values: object) -> Any:
        return self._examiner.ask(name, self, *values)

    setattr(Remote, f"__{name}__", method)


def _forward_among_remotes(name: str) -> None:
    def method(self: Remote, other: object) -> Any:
        # with a test's own operand the program would decide how far it is from what the test expects
        return self._examiner.ask(name, self, other) if isinstance(other, Remote) else NotImplemented

    setattr(Remote, f"__{name}__", method)


for _name in (
    "len",
    "iter",
    "next",
    "bool",
    "float",
    "int",
    "str",
    "repr",
    "neg",
    "abs",
    "getitem",
    "setitem",
):
    _forward(_name)
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "xor", "lt", "le"):
    _forward_among_remotes(_name)


def failure(error: BaseException, tests: str) -> str:
    """What went wrong, in a line: the test that failed, or what was raised."""
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = tests.splitlines()[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, (ProgramError, ProgramGone)):
        text = str(error)
    return (f"{text} in {line}" if line else text)[:MAX_NOTE_CHARACTERS]


def ending(status: int, cpu_seconds: int) -> str:
    """How the program's process has ended, by its wait status."""
    number = status & 0x7F
    if number == signal.SIGXCPU:
        return f"used more than {cpu_seconds} s of processor time"
    return f"killed by signal {number}" if number else f"ended itself with exit status {status >> 8}"
