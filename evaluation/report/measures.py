"""What a report says about each measure, and how its numbers look: scores, losses and accuracies never share axes."""

from __future__ import annotations

from dataclasses import dataclass

from evaluation.findings import ACCURACY, NLL, SCORE
from fusionroute.errors import invalid


@dataclass(frozen=True, slots=True)
class Look:
    """How a measure is told.

    Attributes:
        measure: ``SCORE``, ``ACCURACY`` or ``NLL``.
        heading: of the chapter with all systems.
        differences: heading of the chapter with differences.
        parts: heading of a chapter by parts, before ", by DIVISION".
        told: what a number is, to stand before "with its 95 % interval".
        things: what was asked, in the plural.
        ahead: heading of the two numbers of a comparison that count what speaks for either system.
        unit: after a difference in sentences, with a space before it; "" for none.
        is_less_better: whether a smaller number is the better one.
        least: what the axes of means always show; None where they begin and end with the numbers.
        file: stands in the names of pictures; "" or with a "-" after it.
    """

    measure: str
    heading: str
    differences: str
    parts: str
    told: str
    things: str
    ahead: str
    unit: str = ""
    is_less_better: bool = False
    least: tuple[float, float] | None = (0.0, 1.0)
    file: str = ""

    @property
    def better(self) -> str:
        """Which numbers are the better ones."""
        return "less is better" if self.is_less_better else "higher is better"

    def is_better(self, difference: float) -> bool:
        """Whether a difference, first minus second, speaks for the first."""
        return difference < 0.0 if self.is_less_better else difference > 0.0


LOOKS = (
    Look(
        SCORE,
        heading="How systems did",
        differences="Differences",
        parts="How systems did",
        told="Mean score",
        things="questions",
        ahead="right: only first, only second",
    ),
    Look(
        ACCURACY,
        heading="How many tokens of texts systems get right",
        differences="Differences in token accuracy",
        parts="Token accuracy",
        told="Share of the tokens of texts that are the first choice",
        things="texts",
        ahead="more right: first, second",
        unit=" of the tokens",
        file="accuracy-",
    ),
    Look(
        NLL,
        heading="How probable systems find texts",
        differences="Differences in loss per token",
        parts="Loss per token",
        told="Negative log-probability of texts in nats per token",
        things="texts",
        ahead="smaller loss: first, second",
        unit=" nats per token",
        is_less_better=True,
        least=None,
        file="nll-",
    ),
)
"""In the order of a report."""


def look_of(measure: str) -> Look:
    """How a measure is told. Raises InvalidRequest: it is not known."""
    for look in LOOKS:
        if look.measure == measure:
            return look
    raise invalid("measure", measure, f"one of {', '.join(look.measure for look in LOOKS)}")
