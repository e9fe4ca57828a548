"""Which pictures findings have, in the order of the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from evaluation.findings import SCORE
from evaluation.report.forest import draw_differences, draw_forest, draw_pairs
from evaluation.report.heatmap import draw_heatmap
from evaluation.report.measures import Look
from evaluation.report.paper import Sheet, fixed_style
from evaluation.report.routing import draw_entropy, draw_overruled, draw_shares
from evaluation.report.strips import draw_strip
from evaluation.report.view import Columns, View

PREFIX = "report-"
"""With which the name of every picture begins; pictures of an older report are known by it."""


class Chapter(Enum):
    """Where in the report a picture stands."""

    RESULTS = "results"
    DIFFERENCES = "differences"
    PARTS = "parts"
    ROUTING = "routing"
    EXAMPLES = "examples"


@dataclass(frozen=True, slots=True)
class Picture:
    """One that was drawn.

    Attributes:
        file: its name in the report's folder.
        told: what it shows, for those who do not see it.
        about: name of the division it is of, or for examples the number of the example; "" for none.
        measure: of the numbers it shows; "" where it shows none of systems.
    """

    chapter: Chapter
    file: str
    told: str
    about: str = ""
    measure: str = ""


def draw_pictures(view: View, folder: Path) -> list[Picture]:
    """Draws what there is into a folder, each file written whole or not at all."""
    drawn = []
    with fixed_style():
        for picture, sheet in sheets(view):
            sheet.write(folder / picture.file)
            drawn.append(picture)
    return drawn


def sheets(view: View) -> Iterator[tuple[Picture, Sheet]]:
    """Every picture, drawn but not written; to be used within `fixed_style`."""
    for measured in view.by_measure:
        yield from _of_measure(measured)
    for columns in (*view.narrow, *view.wide):
        yield from _named(Chapter.ROUTING, "shares", "Share of the tokens that each expert took part in", columns,
                          draw_shares(view, columns))  # fmt: skip
    for columns in (*view.narrow, *view.wide):
        yield from _named(Chapter.ROUTING, "entropy", "Histogram of the entropy of the routing weights", columns,
                          draw_entropy(view, columns))  # fmt: skip
    for columns in (*view.narrow, *view.wide):
        yield from _named(Chapter.ROUTING, "overruled", "Share of the tokens in which the complement overruled the "
                          "expert, and who was right", columns, draw_overruled(view, columns))  # fmt: skip
    for number, example in enumerate(view.findings.examples, start=1):
        if example.tokens:
            told = f"Answer of {view.label(example.system)} on {example.task}, token by token"
            name = f"{PREFIX}example-{number:02d}.png"
            yield Picture(Chapter.EXAMPLES, name, told, str(number)), draw_strip(view, example)


def _of_measure(view: View) -> Iterator[tuple[Picture, Sheet]]:
    look = view.look
    what = look.told[:1].lower() + look.told[1:]
    for columns in view.narrow:
        yield from _named(Chapter.RESULTS, "forest", f"Forest plot: {what} with its interval of every system",
                          columns, [draw_forest(view, columns)], look)  # fmt: skip
    for columns in view.narrow:
        against = f"Paired difference of every system to {view.label(view.baseline)}, with its interval"
        yield from _named(Chapter.DIFFERENCES, "differences", against, columns, [draw_differences(view, columns)],
                          look)  # fmt: skip
        yield from _named(Chapter.DIFFERENCES, "pairs", "Other paired differences, with their intervals",
                          columns, [draw_pairs(view, columns)], look)  # fmt: skip
    for columns in view.wide:
        name = "scores" if look.measure == SCORE else "parts"
        yield from _named(Chapter.PARTS, name, f"{look.told} of every system on every part", columns,
                          draw_heatmap(view, columns), look)  # fmt: skip


def _named(
    chapter: Chapter,
    name: str,
    told: str,
    columns: Columns,
    sheets: Iterable[Sheet | None],
    look: Look | None = None,
) -> Iterator[tuple[Picture, Sheet]]:
    by = f"-{_safe(columns.name)}" if columns.name else ""
    for number, sheet in enumerate(sheets, start=1):
        if sheet is not None:
            file = f"{PREFIX}{look.file if look else ''}{name}{by}{f'-{number}' if number > 1 else ''}.png"
            words = f"{told}, by {columns.name}" if columns.name else told
            yield Picture(chapter, file, words, columns.name, look.measure if look else ""), sheet


def _safe(name: str) -> str:
    """A division's name for a file and a link."""
    return "".join(each if each.isascii() and each.isalnum() else "_" for each in name)
