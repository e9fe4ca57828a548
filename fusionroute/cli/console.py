"""The consoles that commands print on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 240


def console(*, stderr: bool = False) -> Console:
    """A console that never breaks lines of its own accord, nor cuts tables where there is no terminal."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made = Console(stderr=stderr, highlight=False, soft_wrap=True, width=FILE_WIDTH)
    return made


def table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """A plain table whose cells are never cut; the columns named in `right` hold numbers."""
    made = Table(box=None, pad_edge=False)
    for heading in headings:
        justify = "right" if heading in right else "left"
        made.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]  # a Literal
    return made
