"""How a judge's script counts what works; imports nothing but the standard library."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

URL_VARIABLE = "JUDGED_URL"


class Score:
    """Points of one judge: each `point` is won by a block that does not raise."""

    def __init__(self) -> None:
        self.url = os.environ[URL_VARIABLE]
        self.num_won = 0
        self.num_points = 0

    @contextmanager
    def point(self, what: str) -> Iterator[None]:
        """One thing that must work."""
        self.num_points += 1
        try:
            yield
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            print(f"LOST  {what}: {type(error).__name__}: {error} ({last.name}, line {last.lineno})")
        else:
            self.num_won += 1
            print(f"won   {what}")

    @contextmanager
    def refusal(
        self, what: str, kind: type[BaseException] | tuple[type[BaseException], ...], text: str = ""
    ) -> Iterator[None]:
        """One thing that must be refused with an error of this kind whose text contains `text`."""
        with self.point(what):
            try:
                yield
            except kind as error:
                assert text in str(error), f"{str(error)!r} without {text!r}"
            else:
                raise AssertionError("nothing was refused")

    def end(self) -> None:
        """Prints the score, the last line of all."""
        print(f"PASSED {self.num_won} of {self.num_points}")
