"""Which models a stack shall serve: named one by one, a preset, or the lab's."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

import click

import fusionroute
from fusionroute.cli.group import Failure

BASE_SLOT = "base"
"""Of the model that the rule `proxy` takes away."""


def models_to_serve(
    experts: tuple[str, ...], router: str | None, lab: str | None, preset: str | None
) -> tuple[str, Mapping[str, str]]:
    """The router checkpoint and the models by slot.

    Raises:
        click.UsageError: the options contradict each other or leave something out.
        Failure: a folder that is named does not exist.
    """
    if lab is not None:
        if experts or router or preset:
            raise click.UsageError("--lab brings experts and router; leave --experts, --router, --preset out")
        return _lab_models(lab)
    models = {**(_preset_experts(preset) if preset else {}), **parse_experts(experts)}
    if not models or router is None:
        raise click.UsageError("say what to serve: --lab, or --router with --experts (or --preset)")
    checkpoint = Path(router).expanduser()
    if not (checkpoint / "COMPLETE").is_file():
        why = "is not a complete router checkpoint" if checkpoint.is_dir() else "does not exist"
        raise Failure(f"--router {router} {why}")
    return str(checkpoint.resolve()), {slot: _model(slot, model) for slot, model in models.items()}


def base_to_serve(base: str, models: Mapping[str, str]) -> dict[str, str]:
    """The base model by its slot.

    Raises:
        click.UsageError: an expert has that slot.
        Failure: a folder that is named does not exist.
    """
    if BASE_SLOT in models:
        raise click.UsageError(f"--base serves its model in slot {BASE_SLOT!r}, which an expert has")
    return {BASE_SLOT: _model(BASE_SLOT, base)}


def parse_experts(experts: tuple[str, ...]) -> dict[str, str]:
    """SLOT=MODEL texts as a mapping.

    Raises:
        click.BadParameter: a text of another form, or a slot twice.
    """
    models: dict[str, str] = {}
    for text in experts:
        slot, equals, model = text.partition("=")
        if not (slot and equals and model):
            raise click.BadParameter(
                f"{text!r} is not SLOT=MODEL, for example math=models/math", param_hint="--experts"
            )
        if slot in models:
            raise click.BadParameter(f"slot {slot!r} is given twice", param_hint="--experts")
        models[slot] = model
    return models


def _model(slot: str, model: str) -> str:
    """A folder as an absolute path; a hub id as it is."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or model.startswith((".", "~")):
        raise Failure(f"the model of slot {slot!r}, {model}, does not exist")
    return model


def _lab_models(size: str) -> tuple[str, Mapping[str, str]]:
    from fusionroute.cli.lab import SIZES, build_family

    if size not in SIZES:
        raise click.BadParameter(f"{size!r} is not one of {', '.join(SIZES)}", param_hint="--lab")
    family = build_family(size)
    return str(family.router), {slot: str(path) for slot, path in family.experts.items()}


def _preset_file(name: str) -> Path:
    """In the folder `presets` of the working directory, of a checkout, or of the installed package."""
    package = Path(fusionroute.__path__[0])
    folders = [Path("presets"), package.parent / "presets", package / "presets"]
    paths = [folder / f"{name}.toml" for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def _preset_experts(name: str) -> dict[str, str]:
    path = Path(name) if name.endswith(".toml") else _preset_file(name)
    try:
        experts: object = tomllib.loads(path.read_text()).get("experts")
    except FileNotFoundError:
        raise click.BadParameter(f"{path} does not exist", param_hint="--preset") from None
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--preset") from None
    if not isinstance(experts, dict) or not all(isinstance(model, str) for model in experts.values()):
        raise click.BadParameter(f"{path} has no table [experts] of slot = model", param_hint="--preset")
    return experts
