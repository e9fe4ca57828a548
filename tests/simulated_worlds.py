"""Worlds whose truth is known, to see how often intervals hold it: ``python -m tests.simulated_worlds`` prints that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist, fmean

import numpy as np

from evaluation.findings import ALL, Cell, Comparison
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.statistics.cells import cells
from evaluation.statistics.comparing import compare
from evaluation.statistics.intervals import Estimate

PAIR = ("a", "b")
NUM_RESAMPLES = 250


@dataclass(frozen=True)
class World:
    """Two systems; an answer is right where ability and luck exceed how hard its cluster is.

    Clusters have one to five questions, which all seeds are asked.

    Attributes:
        lead: of the first system's ability.
        seed_spread: standard deviation of ability over training seeds.
        taste: standard deviation of the lead over clusters, the same for all seeds.
    """

    num_clusters: int
    num_seeds: int
    lead: float = 0.0
    seed_spread: float = 0.0
    taste: float = 0.0

    @property
    def share(self) -> float:
        """True share of right answers of the first system."""
        return NormalDist(sigma=(2.0 + self.seed_spread**2 + self.taste**2) ** 0.5).cdf(self.lead)

    @property
    def difference(self) -> float:
        """True difference: the second system is right on half."""
        return self.share - 0.5

    def outcomes(self, number: int) -> list[Outcome]:
        """All answers in one draw of the world."""
        rng = np.random.default_rng([number, self.num_clusters, self.num_seeds])
        clusters = np.repeat(np.arange(self.num_clusters), rng.integers(1, 6, size=self.num_clusters))
        questions = [Question(str(at), "t", "?", cluster=str(each)) for at, each in enumerate(clusters)]
        hard = rng.normal(size=self.num_clusters)[clusters]
        lead = self.lead + self.taste * rng.normal(size=self.num_clusters)[clusters]
        return [
            Outcome(question, system, seed, Answer("", True), Verdict(float(is_right)))
            for seed in range(self.num_seeds)
            for system, ahead in zip(PAIR, (lead, 0.0 * lead), strict=True)
            for ability in [ahead + rng.normal() * self.seed_spread]
            for question, is_right in zip(
                questions, ability + rng.normal(size=len(clusters)) > hard, strict=True
            )
        ]

    def comparisons(self, number: int) -> Iterator[Comparison]:
        """Of so many draws."""
        for each in range(number):
            yield compare(self.outcomes(each), [PAIR], [ALL], num_resamples=NUM_RESAMPLES)[0]

    def cells(self, number: int) -> Iterator[Cell]:
        """The first system's, of so many draws."""
        for each in range(number):
            yield cells(self.outcomes(each), [PAIR[0]], [ALL], num_resamples=NUM_RESAMPLES)[0]


def share_held(truth: float, estimates: Iterable[Estimate | None]) -> float:
    """How many of the intervals hold the truth."""
    return fmean(each.low <= truth <= each.high for each in estimates if each is not None)


def main(number: int = 300) -> None:
    """Prints how often every interval holds the truth, and how often p-values are below 5 %."""
    kinds: dict[str, Callable[[Comparison], Estimate | None]] = {
        "bootstrap": lambda each: each.difference,
        "mixed": lambda each: each.mixed,
        "Student over seeds": lambda each: each.over_seeds,
    }
    for world in (
        World(20, 1, 0.8), World(60, 1, 0.8), World(300, 1, 0.8), World(60, 1),
        World(60, 3, 0.5), World(60, 3, 0.5, 0.1), World(60, 3, 0.5, 0.5), World(300, 4, 0.5, 0.3),
        World(60, 4, 0.5, 0.1, taste=1.0),
    ):  # fmt: skip
        found = list(world.comparisons(number))
        shown = [f"cell {share_held(world.share, (each.estimate for each in world.cells(number))):.3f}"]
        for name, of in kinds.items():
            if of(found[0]) is not None:
                shown.append(f"{name} {share_held(world.difference, map(of, found)):.3f}")
        shown.append(f"p < 0.05 {fmean(each.p_value < 0.05 for each in found):.3f}")
        print(world, *shown, sep="  ")


if __name__ == "__main__":
    main()
