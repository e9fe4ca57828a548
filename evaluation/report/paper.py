"""The sheet that every picture is drawn on: placed in inches from the upper left, so that nothing has to be guessed.

All pictures are `WIDTH_INCHES` wide; at 900 pixels an inch is 100 pixels and the smallest letters are 10 pixels high.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute.looks import INK, PICTURE_RC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES = 9.0
DOTS_PER_INCH = 200
MARGIN = 0.14
MUTED = "#5B6570"
SERVED_COLOUR = "#1D4E89"
BAND_COLOUR = "#F2F4F7"
SMALL, NORMAL, TITLE = 7.5, 8.5, 11.0
MINUS = "\N{MINUS SIGN}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
# told apart in grey too, together with the slot's mark
HATCHES = ("", "////", "....", "xxxx", "----", "\\\\\\\\", "++++", "oooo")
_SHOWN = {"\n": "↵", "\r": "␍", "\t": "→", " ": "␣"}


@contextmanager
def fixed_style() -> Iterator[None]:
    """The same letters and lines whatever a user has set for other pictures."""
    import matplotlib as mpl

    own = {
        "text.parse_math": False,
        "text.hinting": "force_autohint",
        "hatch.linewidth": 0.5,
        "axes.grid": False,
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(PICTURE_RC | own)
        yield


class Sheet:
    """A picture of a known size in inches; to be made, filled and written within `fixed_style`."""

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """A pair of axes, in inches from the upper left."""
        bottom = self.height - top - height
        return self.figure.add_axes(
            (left / WIDTH_INCHES, bottom / self.height, width / WIDTH_INCHES, height / self.height)
        )

    def text(self, left: float, top: float, text: str, *, size: float = NORMAL, **more: Any) -> None:
        """A text at a place in inches from the upper left; it hangs below the place unless `va` is given."""
        more = {"va": "top", "color": INK} | more
        self.figure.text(left / WIDTH_INCHES, 1 - top / self.height, drawable(text), fontsize=size, **more)

    def box(self, left: float, top: float, width: float, height: float, **more: Any) -> None:
        """A filled rectangle behind everything else unless `zorder` is given."""
        from matplotlib.patches import Rectangle

        more = {"linewidth": 0, "zorder": -1} | more
        place = (left / WIDTH_INCHES, 1 - (top + height) / self.height)
        self.figure.add_artist(
            Rectangle(place, width / WIDTH_INCHES, height / self.height,
                      transform=self.figure.transFigure, **more)
        )  # fmt: skip

    def heading(self, title: str, told: str = "") -> None:
        """The upper lines of a picture, `heading_inches` high."""
        for place, line in enumerate(lines_of(title, TITLE, weight="bold")):
            self.text(MARGIN, 0.12 + 0.2 * place, line, size=TITLE, weight="bold")
        top = 0.12 + 0.2 * len(lines_of(title, TITLE, weight="bold")) + 0.03
        for place, line in enumerate(lines_of(told, NORMAL)):
            self.text(MARGIN, top + 0.165 * place, line, color=MUTED)

    def write(self, path: Path) -> Path:
        """Writes the PNG whole or not at all; the same picture gives the same bytes."""
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.figure.savefig(draft, dpi=DOTS_PER_INCH, format="png", metadata={"Software": None})
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        return path


def heading_inches(title: str, told: str = "") -> float:
    """How much room `Sheet.heading` takes."""
    lines = len(lines_of(title, TITLE, weight="bold"))
    return 0.12 + 0.2 * lines + 0.03 + 0.165 * len(lines_of(told, NORMAL)) + 0.12


def lines_of(text: str, size: float, weight: str = "normal") -> list[str]:
    """A text in lines that fit a sheet's width; none for no text."""
    return wrapped(text, WIDTH_INCHES - 2 * MARGIN, size, most_lines=4, weight=weight) if text else []


def wrapped(text: str, width: float, size: float, most_lines: int, weight: str = "normal") -> list[str]:
    """A text in lines of at most `width` inches, broken at spaces where it can be; always at least one line.

    What does not fit is left out of the last line, before its end, since names often differ there.
    """
    rest = " ".join(text.split())
    lines: list[str] = []
    while len(lines) < most_lines - 1 and text_inches(rest, size, weight) > width:
        fitting = _fitting(rest, width, size, weight)
        cut = fitting if rest[fitting : fitting + 1] == " " else rest.rfind(" ", 0, fitting)
        cut = cut if cut > fitting // 3 else fitting
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return [*lines, _without_middle(rest, width, size, weight)]


def shortened(text: str, width: float, size: float, weight: str = "normal") -> str:
    """A text of at most `width` inches; what does not fit is an ellipsis."""
    if text_inches(text, size, weight) <= width:
        return text
    room = max(width - text_inches(ELLIPSIS, size, weight), 0.0)
    return text[: _fitting(text, room, size, weight)].rstrip() + ELLIPSIS


def _without_middle(text: str, width: float, size: float, weight: str) -> str:
    if text_inches(text, size, weight) <= width:
        return text
    room = max(width - text_inches(ELLIPSIS, size, weight), 0.0)
    end = _fitting(text[::-1], room * 0.6, size, weight)
    start = _fitting(text, room - text_inches(text[-end:], size, weight), size, weight)
    return f"{text[:start].rstrip()}{ELLIPSIS}{text[-end:].lstrip()}"


def _fitting(text: str, width: float, size: float, weight: str) -> int:
    """How many of its first characters fit; at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if text_inches(text[:middle], size, weight) <= width else (low, middle - 1)
    return low


@lru_cache(maxsize=20_000)
def text_inches(text: str, size: float, weight: str = "normal") -> float:
    """How wide a line is, as it is drawn at this resolution."""
    from matplotlib.ft2font import LoadFlags

    font = _font(weight)
    font.set_size(size, DOTS_PER_INCH)
    font.set_text(drawable(text), 0.0, flags=LoadFlags.FORCE_AUTOHINT)
    return float(font.get_width_height()[0]) / 64.0 / DOTS_PER_INCH


def drawable(text: str) -> str:
    """A text with only characters that the letters of the pictures have; others by their number."""
    font = _font("normal")
    return "".join(
        each if font.get_char_index(ord(each)) and each.isprintable() else f"<{ord(each):X}>" for each in text
    )


def visible(text: str) -> str:
    """A token's text with what else nobody sees: spaces at its ends, line ends, tabs; "∅" for none."""
    if not text:
        return "∅"
    inner = text.strip(" ")
    start = len(text) - len(text.lstrip(" ")) if inner else len(text)
    end = len(text) - start - len(inner)
    shown = "␣" * start + inner + "␣" * end
    return "".join(_SHOWN.get(each, each) if each != " " else each for each in shown)


def signed(value: float, digits: int = 3) -> str:
    """A difference as pictures show it."""
    return f"{value:+z.{digits}f}".replace("-", MINUS)


def _font(weight: str) -> Any:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return get_font(findfont(FontProperties(family="DejaVu Sans", weight=weight)))
