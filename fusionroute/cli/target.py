"""Which stack or router a command is about: the options, and what they mean when left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fusionroute.cli.group import EXIT_NOBODY_THERE, Failure

Command = TypeVar("Command", bound=Callable[..., Any])

TRAINER_VARIABLE = "FUSIONROUTE_TRAINER"
"""Without a further part: FUSIONROUTE_TRAINER_... are the trainer's own settings."""


def name_option(command: Command) -> Command:
    """--name: which local stack."""
    return click.option("--name", default="default", show_default=True, help="Which local stack.")(command)


def address_options(command: Command) -> Command:
    """--address and --name: which router."""
    option = click.option(
        "--address",
        metavar="HOST:PORT[,...]",
        help="Router to talk to, or several that share sessions; else $FUSIONROUTE_ADDRESS, else the local stack's.",
    )
    return name_option(option(command))


def trainer_option(command: Command) -> Command:
    """--trainer: which trainer, beside a router of the same stack."""
    return click.option(
        "--trainer",
        metavar="HOST:PORT",
        help=f"Trainer to talk to; else ${TRAINER_VARIABLE}, else the local stack's.",
    )(command)


def trainer_options(command: Command) -> Command:
    """--trainer and --name: which trainer."""
    return name_option(trainer_option(command))


def json_option(command: Command) -> Command:
    """--json: output for scripts."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(command)


def folder_of(name: str) -> Path:
    """The state folder of a stack; a bad name is a usage error."""
    from fusionroute.stack_state import StackError, stack_folder

    try:
        return stack_folder(name)
    except StackError as error:
        raise click.BadParameter(str(error), param_hint="--name") from None


def router_address(address: str | None, name: str) -> str:
    """The address given, the environment's, or that of the local stack of this name; commas between several.

    Raises:
        Failure: no address given and no such stack is up.
    """
    from fusionroute.stack_state import StackError, load_state

    explicit = address or os.environ.get("FUSIONROUTE_ADDRESS")
    if explicit:
        return explicit
    try:
        state = load_state(folder_of(name))
    except StackError as error:
        raise Failure(str(error)) from None
    if state is None or not state.router_address:
        raise Failure(
            f"no stack {name!r} is up: start one with `fusionroute up`, or name a router with --address",
            EXIT_NOBODY_THERE,
        )
    return state.router_address


def trainer_address(trainer: str | None, name: str) -> str:
    """The address given, the environment's, or that of the trainer in the local stack of this name.

    Raises:
        Failure: no address given and no such stack is up, or it has no trainer.
    """
    from fusionroute.stack_state import StackError, load_state

    explicit = trainer or os.environ.get(TRAINER_VARIABLE)
    if explicit:
        return explicit
    try:
        state = load_state(folder_of(name))
    except StackError as error:
        raise Failure(str(error)) from None
    address = "" if state is None else state.addresses.get("trainer", "")
    if not address:
        what = f"no stack {name!r} is up" if state is None else f"the stack {name!r} has no trainer"
        hint = "start one with `fusionroute up --trainer`, or name a trainer with --trainer"
        raise Failure(f"{what}: {hint}", EXIT_NOBODY_THERE)
    return address
