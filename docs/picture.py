"""Draws docs/picture.svg: how one token comes to be, and who wrote which part of an answer.

python docs/picture.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

INK, SOFT, PAPER, LINE = "#1f2933", "#52606d", "#ffffff", "#9aa5b1"
MATH, STRINGS, FORMAT, ROUTER = "#c2410c", "#0f766e", "#6d28d9", "#1d4ed8"
ANSWER = [("[", FORMAT), ("8", MATH), ("; ", FORMAT), ("febj", STRINGS), ("]", FORMAT)]
WIDTH, HEIGHT = 864, 428
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"


def text(
    x: float,
    y: float,
    words: str,
    *,
    size: int = 14,
    colour: str = INK,
    anchor: str = "middle",
    more: str = "",
) -> str:
    """A line of text."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" {more}>'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, colour: str, title: str, *lines: str) -> str:
    """A rounded box with a title and smaller lines."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="10" fill="{colour}" '
        f'fill-opacity="0.08" stroke="{colour}" stroke-width="2"/>',
        text(x + width / 2, y + 26, title, size=16, colour=colour, more='font-weight="600"'),
    ]
    parts += [
        text(x + width / 2, y + 48 + 19 * n, line, size=13, colour=SOFT) for n, line in enumerate(lines)
    ]
    return "\n".join(parts)


def arrow(path: str, *, colour: str = SOFT, dashed: bool = False) -> str:
    """A curve with a head at its end."""
    dash = ' stroke-dasharray="5 5"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash} marker-end="url(#head)"/>'


def answer_line(y: float) -> str:
    """The prompt and the answer, coloured by who was asked."""
    spans = [f'<tspan fill="{SOFT}">box: 4+4; rev jbef=</tspan>']
    spans += [f'<tspan fill="{colour}" font-weight="700">{escape(piece)}</tspan>' for piece, colour in ANSWER]
    return (
        f'<text x="{WIDTH / 2}" y="{y}" font-size="24" text-anchor="middle" font-family="{MONO}" '
        f'xml:space="preserve">{"".join(spans)}</text>'
    )


def drawing() -> str:
    """The whole picture."""
    experts = [("math expert", MATH, 64), ("strings expert", STRINGS, 150), ("format expert", FORMAT, 236)]
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{PAPER}" stroke="{LINE}"/>',
        box(30, 144, 140, 70, INK, "tokens so far", "kept in Redis"),
        box(226, 117, 176, 124, ROUTER, "router", "an LLM; its head", "picks one expert", "per token"),
        *(box(480, y, 150, 58, colour, name, "own gRPC service") for name, colour, y in experts),
        box(700, 144, 134, 70, INK, "e + r", "choose a token"),
        arrow("M170 179 H220"),
        arrow("M402 150 C440 130 440 93 474 93", colour=MATH),
        arrow("M402 179 H474", colour=LINE, dashed=True),
        arrow("M402 208 C440 228 440 265 474 265", colour=LINE, dashed=True),
        arrow("M630 93 C700 93 740 100 745 138", colour=MATH),
        text(684, 84, "its logits e", size=13, colour=MATH),
        arrow("M314 241 V312 Q314 324 326 324 H754 Q766 324 766 312 V220", colour=ROUTER),
        text(555, 316, "the router's own logits r, the complement", size=13, colour=ROUTER),
        arrow("M790 144 V46 Q790 34 778 34 H112 Q100 34 100 46 V138"),
        text(445, 26, "next token", size=13, colour=SOFT),
        answer_line(378),
        text(
            WIDTH / 2, 408, "one answer, written token by token by whoever knows best",
            size=13, colour=SOFT,
        ),
    ]  # fmt: skip
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" role="img" '
        'aria-label="The router picks one expert for each token and adds its own logits">'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker></defs>'
    )
    return "\n".join([head, marker, *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing())
