"""Texts and a base that mean nothing, to see in seconds that everything works."""

from __future__ import annotations

from pathlib import Path
from random import Random

from benchmarks.real_text.sizes import EXPERTS, GAP, UNSEEN
from benchmarks.real_text.texts import Row
from tests.tiny_models import character_tokenizer, save_tiny_model

NUM_ROWS = 40
LETTERS = {"math": "0123456789", "code": "{}[]:_abc", "prose": "defghijkl", GAP: "mnopqr", UNSEEN: "stuvwxyz"}


class MadeUp:
    """Letters that tell one domain from another."""

    def save_base(self, folder: Path) -> None:
        """A model of random weights whose tokens are characters."""
        save_tiny_model(folder, tokenizer=character_tokenizer())

    def pools(self) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
        """Drawn rows."""
        random = Random("made up")  # noqa: S311 - not for secrets
        trained = (*EXPERTS, GAP)
        asked = (*trained, UNSEEN)
        return (
            {domain: [_row(domain, random) for _ in range(NUM_ROWS)] for domain in trained},
            {domain: [_row(domain, random) for _ in range(NUM_ROWS)] for domain in asked},
        )


def _row(domain: str, random: Random) -> Row:
    def draw() -> str:
        return "".join(random.choices(LETTERS[domain], k=random.randint(8, 14)))

    return Row(f"{draw()}\n", draw())
