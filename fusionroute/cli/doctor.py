"""`fusionroute doctor`: what on this machine will work, and what to do about the rest."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import EXIT_FAILED
from fusionroute.cli.target import folder_of, json_option, name_option

if TYPE_CHECKING:
    from fusionroute.cli.checks import Check

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=50050, show_default=True,
              help="Port that the router would take.")  # fmt: skip
@name_option
@json_option
def doctor(port: int, name: str, as_json: bool) -> None:
    """Check Python, packages, Redis, port, cache folder, memory, threads, and the stack if one is up.

    Exit code 1 when a check fails; warnings do not count.

    \b
    Example:
      fusionroute doctor --json
    """
    from fusionroute.cli.checks import all_checks

    checks = all_checks(folder_of(name), port)
    failed = any(check.verdict == "fail" for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print(checks)
    if failed:
        raise click.exceptions.Exit(EXIT_FAILED)


def _print(checks: list[Check]) -> None:
    from rich.text import Text

    from fusionroute.cli.console import console

    screen = console()
    for check in checks:
        line = Text(f"{check.verdict:<5}", style=_STYLES[check.verdict])
        line.append(f"{check.name:<10} {check.finding}", style="none")
        screen.print(line)
        if check.advice:
            screen.print(Text(f"{'':16} {check.advice}", style="dim"))
