"""A configuration to begin with: every field of a job with its meaning and default, as TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config import JOBS, JobKind

WIDTH = 100
# What stands for fields that have no default, by the field's name; (kind, name) where kinds differ.
_EXAMPLES: Mapping[str | tuple[JobKind, str], Any] = {
    "experts": {"math": "models/math", "code": "models/code"},
    "data": {"files": ["data.jsonl"]},
    "pairs": {"files": ["pairs.jsonl"]},
    "output": "pairs.jsonl",
    "router": "checkpoints/sft",
    (JobKind.SFT, "router"): "models/instruct",
}


def template(kind: JobKind) -> str:
    """TOML of a job of this kind: required fields with an example, all others commented out with their defaults."""
    job = JOBS[kind]
    title = (job.__doc__ or "").strip().splitlines()[0]
    lines = [*_comment(title), *_comment("Paths are meant from the folder of this file."), ""]
    tables = []
    for name, field in job.model_fields.items():
        if _is_table(field):
            tables.append((name, field))
        else:
            lines += _scalar(name, field, _example(kind, name))
    for name, field in tables:
        lines += ["", *_table(name, field, _example(kind, name))]
    return "\n".join(lines) + "\n"


def _example(kind: JobKind, name: str) -> Any:
    return _EXAMPLES.get((kind, name), _EXAMPLES.get(name))


def _table(path: str, field: FieldInfo, example: Any) -> Iterator[str]:
    """One table with its fields, and those within it after it; commented out where it is optional."""
    model = _model(field)
    if model is None:  # the mapping from slot to model
        yield from _comment(
            field.description or "Slot = folder or hub id of the model, in the order of the heads."
        )
        yield f"[{path}]" if field.is_required() else f"# [{path}]"
        for name, value in _EXAMPLES["experts"].items():
            yield ("" if field.is_required() else "# ") + f"{name} = {json.dumps(value)}"
        return
    yield from _comment((model.__doc__ or "").strip().splitlines()[0])
    is_optional = not field.is_required() and field.default is None
    if is_optional and field.description:
        yield from _comment(field.description)
    yield f"# [{path}]" if is_optional else f"[{path}]"
    inner = []
    for name, each in model.model_fields.items():
        if _is_table(each):
            inner.append((name, each))
        else:
            given = example.get(name) if isinstance(example, dict) and not is_optional else None
            yield from _scalar(name, each, given, is_given=given is not None, is_open=is_optional)
    for name, each in inner:
        yield ""
        yield from _table(f"{path}.{name}", each, None)


def _scalar(
    name: str, field: FieldInfo, example: Any, *, is_given: bool = False, is_open: bool = False
) -> Iterator[str]:
    """One field; what is required in a table that may be left out stays open."""
    choices = _choices(field.annotation)
    meaning = field.description or ""
    if choices:
        meaning = f"{meaning} One of {', '.join(choices)}.".strip()
    yield from _comment(meaning)
    if is_given or (field.is_required() and not is_open):
        yield f"{name} = {_toml(example)}"
    elif field.is_required() or field.default is None:
        yield f"# {name} ="
    else:
        yield f"# {name} = {_toml(field.get_default(call_default_factory=True))}"


def _comment(text: str) -> Iterator[str]:
    for line in wrap(text.replace("`", ""), WIDTH):
        yield f"# {line}"


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [json.dumps(choice) for choice in get_args(annotation)]
    return []


def _is_table(field: FieldInfo) -> bool:
    return _model(field) is not None or get_origin(field.annotation) is dict


def _model(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a table, also of one that may be absent."""
    for part in (field.annotation, *get_args(field.annotation)):
        if (
            isinstance(part, type)
            and issubclass(part, BaseModel)
            and get_origin(field.annotation) is not dict
        ):
            return part
    return None


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return f"[{', '.join(_toml(item) for item in value)}]"
