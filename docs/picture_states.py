"""Draws docs/six_states.svg: why no choice among experts suffices, and what adding logits changes.

python -m docs.picture_states
"""

from __future__ import annotations

from pathlib import Path

from docs.picture import INK, LINE, MATH, PAPER, ROUTER, SOFT, STRINGS, arrow, text

WIDTH, HEIGHT = 864, 414
RIGHT_COLOUR, WRONG_COLOUR = "#15803d", "#b91c1c"
EXPERT, OTHER, COMPLEMENT = (4, 0), (1, -2), (0, 5)
"""Logits of a and b: of both experts, and what the router adds at question 1."""
UNIT = 11
"""Pixels of one logit."""


def state(x: float, y: float, words: str, colour: str = INK) -> str:
    """A rounded state with its name."""
    rect = (
        f'<rect x="{x - 52}" y="{y - 19}" width="104" height="38" rx="19" fill="{colour}" '
        f'fill-opacity="0.08" stroke="{colour}" stroke-width="2"/>'
    )
    return rect + text(x, y + 5, words, colour=colour)


def question(x: float, y: float, name: str, right: str) -> str:
    """A question with its two answers, one of them right."""
    parts = [state(x, y, name)]
    for token, below in (("a", -40), ("b", 40)):
        is_right = token == right
        word, colour = ("right", RIGHT_COLOUR) if is_right else ("wrong", WRONG_COLOUR)
        parts.append(arrow(f"M{x + 54} {y + below / 8} L{x + 138} {y + below}"))
        parts.append(text(x + 92, y + below * 0.9 + (-2 if below < 0 else 12), token, colour=INK))
        parts.append(state(x + 196, y + below, f"{'✓' if is_right else '✗'} {word}", colour))
    return "\n".join(parts)


def bars(x: float, base: float, title: str, logits: tuple[int, int], colour: str) -> str:
    """Logits of a and b as bars over a line; the higher one is what would be written."""
    parts = [
        f'<line x1="{x - 34}" x2="{x + 34}" y1="{base}" y2="{base}" stroke="{LINE}"/>',
        text(x, base + 70, title, size=13, colour=colour),
    ]
    best = max(logits)
    for place, (token, value) in enumerate(zip("ab", logits, strict=True)):
        left, height = x - 27 + 30 * place, max(abs(value) * UNIT, 1)
        top = base - height if value > 0 else base
        wins = value == best
        parts.append(
            f'<rect x="{left}" y="{top}" width="24" height="{height}" fill="{colour}" '
            f'fill-opacity="{0.85 if wins else 0.3}"/>'
        )
        number_y = top - 5 if value >= 0 else top + height + 13
        parts.append(text(left + 12, number_y, f"{value:+d}" if value else "0", size=12, colour=INK))
        parts.append(text(left + 12, base + 52, token, size=13, more='font-weight="700"' if wins else ""))
    return "\n".join(parts)


def row(y: float, name: str, logits: tuple[int, int], colour: str) -> str:
    """One expert at question 1: its logits, the complement, their sum."""
    fused = (logits[0] + COMPLEMENT[0], logits[1] + COMPLEMENT[1])
    return "\n".join(
        [
            bars(500, y, name, logits, colour),
            text(562, y - 14, "+", size=22, colour=SOFT),
            bars(626, y, "complement r", COMPLEMENT, ROUTER),
            text(690, y - 14, "=", size=22, colour=SOFT),
            bars(756, y, "e + r", fused, INK),
        ]
    )


def drawing() -> str:
    """The whole picture."""
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="{PAPER}" stroke="{LINE}"/>',
        text(190, 40, "Six states; both experts only ever say a", size=15, more='font-weight="600"'),
        question(92, 124, "question 0", "a"),
        question(92, 264, "question 1", "b"),
        text(190, 362, "Whoever chooses among them writes a:", size=13, colour=SOFT),
        text(190, 382, "right on one question of two.", size=13, colour=SOFT),
        f'<line x1="420" x2="420" y1="30" y2="{HEIGHT - 26}" stroke="{LINE}"/>',
        text(640, 40, "Question 1, with what the router adds", size=15, more='font-weight="600"'),
        row(116, "one expert's e", EXPERT, MATH),
        row(262, "the other's e", OTHER, STRINGS),
        text(640, 362, "Whichever expert is asked, b wins. At question 0 r is zero.", size=13, colour=SOFT),
        text(640, 382, "Right on both, without knowing a by itself.", size=13, colour=SOFT),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="system-ui, sans-serif" role="img" '
        'aria-label="Two experts that only say a; a router that adds 5 to b makes both questions right">'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker></defs>'
    )
    return "\n".join([head, marker, *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("six_states.svg").write_text(drawing())
