"""Findings as JSON and back: what ``report.json`` holds.

The file is one object. ``"format"`` is "fusionroute-findings/1"; every other key is an attribute of `Findings`, and
every object in it has the attributes of its class in `evaluation.findings` as keys, which describes them:

    {
      "format": "fusionroute-findings/1",
      "name": "lab",
      "summary": ["..."],
      "systems": [{"name": "cdpo/sum", "label": "...", "kind": "served", "note": ""}],
      "divisions": {"coverage": ["covered", "gap"]},
      "cells": [{"system": "cdpo/sum", "stratum": "coverage=gap", "num_questions": 1800,
                 "estimate": {"value": 0.74, "low": 0.72, "high": 0.76}, "per_seed": {"1": 0.74}}],
      ...
    }

Seeds are keys and therefore text. Numbers that JSON does not have are the texts "inf", "-inf" and "nan". Divisions and
facts keep their order; all other mappings are sorted, so that the same findings give the same bytes. A key that is left
out has the attribute's default; one that is not known is an error.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from evaluation.findings import Findings
from fusionroute.errors import invalid

FORMAT = "fusionroute-findings/1"
IN_GIVEN_ORDER = frozenset({"divisions", "facts"})
_WORDS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_text(findings: Findings) -> str:
    """The whole file.

    Raises:
        InvalidRequest: facts hold what JSON has not.
    """
    try:
        text = json.dumps(
            {"format": FORMAT, **_plain(Findings, findings)}, ensure_ascii=False, allow_nan=False, indent=1
        )
    except (TypeError, ValueError) as error:
        raise invalid("facts", dict(findings.facts), f"only what JSON has: {error}") from None
    return text + "\n"


def read_findings(path: Path) -> Findings:
    """What a report was made from.

    Args:
        path: of a ``report.json``.

    Raises:
        InvalidRequest: the file is not there or not of this format; the message names file and field.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise invalid(str(path), error.strerror, "a report.json that can be read") from None
    except ValueError as error:
        raise invalid(str(path), str(error), "one JSON object") from None
    if not isinstance(document, dict):
        raise invalid(str(path), type(document).__name__, "one JSON object")
    if document.get("format") != FORMAT:
        raise invalid(f"{path}: format", document.get("format"), repr(FORMAT))
    del document["format"]
    findings = _value(Findings, document, f"{path}: ")
    assert isinstance(findings, Findings)
    return findings


def _plain(kind: Any, value: Any, name: str = "") -> Any:
    """A value of this type as JSON has it; `name` is of the field it was found in."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any or name == "facts" or value is None:
        return value
    if _is_object(kind):
        return {each: _plain(hint, getattr(value, each), each) for each, hint in _hints(kind).items()}
    if origin in (types.UnionType, Union):
        return _plain(arguments[0], value)
    if origin is Mapping:
        keys = list(value) if name in IN_GIVEN_ORDER else sorted(value)
        return {str(key): _plain(arguments[1], value[key]) for key in keys}
    if origin is tuple:
        return [_plain(arguments[0], each) for each in value]
    if kind is float and not math.isfinite(value):
        return str(float(value))
    return kind(value)


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value of this type from JSON; `where` names it in errors."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if _is_object(kind):
        return _object(kind, value, where)
    if origin in (types.UnionType, Union):  # of the kind "X | None"
        return None if value is None else _value(arguments[0], value, where)
    if origin is tuple:
        _require(isinstance(value, list), where, value, "a list")
        return tuple(_value(arguments[0], each, f"{where}[{place}]") for place, each in enumerate(value))
    if origin is Mapping:
        _require(isinstance(value, dict), where, value, "an object")
        return {
            _key(arguments[0], key, where): _value(arguments[1], each, f"{where}[{key!r}]")
            for key, each in value.items()
        }
    return _SCALARS[kind](value, where)


def _object(kind: Any, value: Any, where: str) -> Any:
    _require(isinstance(value, dict), where, value, "an object")
    hints = _hints(kind)
    prefix = where if where.endswith(" ") else f"{where}."
    for key in value:
        _require(key in hints, f"{prefix}{key}", value[key], f"one of {', '.join(hints)}")
    given = {name: _value(hints[name], each, f"{prefix}{name}") for name, each in value.items()}
    for each in fields(kind):
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        _require(each.name in given or has_default, f"{prefix}{each.name}", None, "has to be there")
    return kind(**given)


def _is_object(kind: Any) -> bool:
    return is_dataclass(kind)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _key(kind: Any, key: str, where: str) -> str | int:
    if kind is str:
        return key
    try:
        return int(key)
    except ValueError:
        raise invalid(where, key, "keys that are whole numbers") from None


def _text(value: Any, where: str) -> str:
    _require(isinstance(value, str), where, value, "text")
    return str(value)


def _truth(value: Any, where: str) -> bool:
    _require(isinstance(value, bool), where, value, "true or false")
    return bool(value)


def _whole(value: Any, where: str) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool), where, value, "a whole number")
    return int(value)


def _number(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    _require(isinstance(value, int | float) and not isinstance(value, bool), where, value, "a number")
    return float(value)


_SCALARS: dict[Any, Callable[[Any, str], Any]] = {str: _text, bool: _truth, int: _whole, float: _number}


def _require(holds: bool, where: str, value: Any, limit: str) -> None:
    if not holds:
        raise invalid(where, value, limit)
