"""The side that nobody trusts: runs a program and does with its values what the examiner asks for."""

from __future__ import annotations

import builtins
import operator
import os
from collections.abc import Callable
from typing import Any

from evaluation.sandbox.values import PeerGone, pack, receive, send, unpack

MAX_TEXT_CHARACTERS = 300
_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "xor", "neg", "abs"),
    *("eq", "lt", "le", "getitem", "setitem"),
)


class Candidate:
    """A program in this process, and its values that the examiner knows by number.

    Args:
        asked, answers: descriptors to read requests from and to write answers to.
    """

    def __init__(self, asked: int, answers: int) -> None:
        self._asked, self._answers = asked, answers
        self._kept: list[object] = []
        self._globals: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
        self._functions: dict[str, Callable[..., object]] = {
            **{name: getattr(operator, name) for name in _OPERATORS},
            **{name: getattr(builtins, name) for name in ("len", "str", "repr", "bool", "iter", "next")},
            **{name: getattr(builtins, name) for name in ("getattr", "setattr", "float", "int")},
            "run": self._run,
            "defined": self._defined,
            "call": lambda function, *values, **named: function(*values, **named),
        }

    def serve(self) -> None:
        """Until the examiner has gone."""
        try:
            while True:
                send(self._answers, self._reply(receive(self._asked)))
        except PeerGone:
            os._exit(0)

    def _reply(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            values = unpack(request["values"], self._find)
            named = unpack(request["named"], self._find)
            result = pack(self._functions[request["do"]](*values, **named), self._keep)
            changed = [
                pack(value, self._keep) if isinstance(value, (list, dict, set, bytearray)) else None
                for value in values
            ]
            return {"result": result, "changed": changed}
        except PeerGone:
            raise
        except BaseException as error:
            return _raised(error)

    def _run(self, program: str) -> None:
        exec(compile(program, "<program>", "exec"), self._globals)  # noqa: S102 - what all this is for

    def _defined(self, names: list[str]) -> dict[str, object]:
        return {name: self._globals[name] for name in names if name in self._globals}

    def _keep(self, value: object) -> dict[str, Any]:
        if isinstance(value, _OfExaminer):
            return {"t": "mine", "v": value.number}
        self._kept.append(value)
        return {"t": "its", "v": len(self._kept) - 1}

    def _find(self, whose: str, number: int) -> object:
        return self._kept[number] if whose == "its" else _OfExaminer(self, number)

    def call_examiner(self, number: int, values: tuple[object, ...], named: dict[str, object]) -> object:
        """Call a function that a test has handed over."""
        send(
            self._answers,
            {
                "call": number,
                "values": pack(list(values), self._keep),
                "named": pack(named, self._keep),
            },
        )
        reply = receive(self._asked)
        if "raised" in reply:
            raise RuntimeError(reply["text"])
        return unpack(reply["result"], self._find)


class _OfExaminer:
    """A function of a test, callable from here."""

    def __init__(self, candidate: Candidate, number: int) -> None:
        self.number = number
        self._candidate = candidate

    def __call__(self, *values: object, **named: object) -> object:
        return self._candidate.call_examiner(self.number, values, named)


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        text = str(error)[:MAX_TEXT_CHARACTERS]
    except BaseException:
        text = ""
    return {"raised": [kind.__name__ for kind in type(error).__mro__], "text": text}
