"""Configurations of training jobs as the command line takes them: a TOML file, and changes made by options."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trainer.config import JobConfig

KINDS = ("label", "sft", "pairs", "cdpo", "extend")


def read_config(kind: str, path: Path, changes: tuple[str, ...] = ()) -> JobConfig:
    """The job in a file, after changes of the form KEY=VALUE; relative paths are meant from the file's folder.

    Raises:
        InvalidRequest: INVALID_FIELD, naming file, field, value and limit.
        click.BadParameter: a change of another form.
    """
    from trainer.config import JOBS, JobKind

    content = read_toml(path)
    for change in changes:
        apply_change(content, change)
    job = JOBS[JobKind(kind)].from_values(content, str(path))
    return job.at(path.resolve().parent)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says. Raises InvalidRequest, naming the file."""
    from fusionroute.errors import InvalidRequest, Reason

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidRequest(Reason.INVALID_FIELD, f"configuration {path} cannot be read: {error}") from None


def apply_change(content: dict[str, Any], change: str) -> None:
    """Puts KEY=VALUE into plain values: the key with dots, the value as TOML, or as a text where it is none.

    Raises:
        click.BadParameter: a change of another form, or through a field that is no table.
    """
    key, equals, text = change.partition("=")
    *tables, name = key.strip().split(".")
    if not equals or not all([*tables, name]):
        raise click.BadParameter(
            f"{change!r} is not KEY=VALUE, for example training.epochs=4", param_hint="--set"
        )
    place: Any = content
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            raise click.BadParameter(f"{change!r}: {table} is not a table", param_hint="--set")
    place[name] = _value(text.strip())


def guessed_kind(content: Mapping[str, Any]) -> str:
    """Which kind of job these values describe, by the fields that only it has."""
    if "pairs" in content:
        return "cdpo"
    if "output" in content:
        return "pairs"
    if {"old_data", "num_steps", "batch_targets", "max_targets"} & content.keys():
        return "extend"
    return "sft" if "router" in content else "label"


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
