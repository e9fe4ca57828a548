"""`fusionroute bench`: how fast, measured in one run on this machine."""

from __future__ import annotations

from fusionroute.cli.group import CommandGroup

bench = CommandGroup(
    name="bench",
    commands_at={},
    help="""Measure speed on this machine.

    \b
    Example:
      fusionroute bench decode --lab demo
    """,
)
