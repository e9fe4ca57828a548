"""What an evaluation has found, as statistics compute it and reports show it; plain values, the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from evaluation.statistics.intervals import Estimate

ALL = "all"
"""The stratum of every question."""

SCORE = "score"
"""The measure of verdicts: mean score, more is better."""

NLL = "nll"
"""The measure of forced answers: negative log-probability in nats per token, less is better."""

ACCURACY = "accuracy"
"""The measure of texts: share of the tokens that were the first choice, all texts together, more is better."""


@dataclass(frozen=True, slots=True)
class SystemNote:
    """Who was asked.

    Attributes:
        name: for programs, for example "cdpo/sum".
        label: for people.
        kind: "expert", "served", "selection", "model", "remote" or "forced" (gold prefixes instead of an own answer).
        note: what a reader has to know to read its row rightly; may be "".
    """

    name: str
    label: str
    kind: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """How a system did on the questions of a stratum, all seeds together.

    Attributes:
        stratum: ``ALL``, or "DIVISION=PART", for example "coverage=gap" or "task=box_m".
        num_questions: of each seed.
        estimate: mean score with its interval: Wilson's for one seed, of the seeds' bootstrap for several.
        per_seed: mean score by seed.
        measure: ``SCORE``, ``ACCURACY`` or ``NLL``.
    """

    system: str
    stratum: str
    num_questions: int
    estimate: Estimate
    per_seed: Mapping[int, float]
    measure: str = SCORE


@dataclass(frozen=True, slots=True)
class Comparison:
    """First minus second, on the same questions of a stratum, paired.

    Attributes:
        num_questions: of each seed.
        num_clusters: all seeds together; what is resampled.
        difference: mean difference with the interval of the clustered bootstrap, over seeds too where there are
            several.
        over_seeds: mean with Student's interval over the seeds' differences; None with one seed.
        mixed: the summary with random effects of seeds; None with one seed.
        only_first, only_second: questions that only one of them got right, all seeds together; for ``NLL`` those on
            which its loss is the smaller one, for ``ACCURACY`` those with more right tokens.
        p_value: of the sign-flip test over clusters, two-sided; where every cluster is one question of one seed this
            is McNemar's exact test.
        p_adjusted: by Holm over the family of comparisons it was made in.
        detectable: the smallest true difference that these questions would show with 80 % power at 5 %.
        per_seed: difference by seed.
        measure: ``SCORE``, ``ACCURACY`` or ``NLL``.
        mcnemar: p-value of McNemar's exact test, which takes questions (and seeds) for independent; only for
            ``SCORE``, else None.
    """

    first: str
    second: str
    stratum: str
    num_questions: int
    num_clusters: int
    difference: Estimate
    over_seeds: Estimate | None
    mixed: Estimate | None
    only_first: int
    only_second: int
    p_value: float
    p_adjusted: float
    detectable: float
    per_seed: Mapping[int, float]
    measure: str = SCORE
    mcnemar: float | None = None

    @property
    def is_significant(self) -> bool:
        """At 5 %, after Holm."""
        return self.p_adjusted < 0.05


@dataclass(frozen=True, slots=True)
class RoutingShare:
    """Who took part in a system's tokens, on the questions of a stratum.

    Attributes:
        num_tokens: all answers together.
        shares: share of the tokens by slot, "" for the router alone; sums to 1.
    """

    system: str
    stratum: str
    num_tokens: int
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RoutingEntropy:
    """How undecided a system's routing was, over the tokens of its answers to the questions of a stratum.

    Attributes:
        most: the highest entropy there can be, in nats: the logarithm of the number of weights.
        counts: tokens in bins of equal width from 0 to `most`; the last one holds `most` too.
        mean: over these tokens, in nats.
    """

    system: str
    stratum: str
    most: float
    counts: tuple[int, ...]
    mean: float


@dataclass(frozen=True, slots=True)
class Overruling:
    """Where the complement made the fused first choice another than the expert's, in a stratum.

    Attributes:
        num_tokens: all tokens in which an expert took part.
        num_overruled: of these, where the choices differ.
        num_mended: of these, where the fused choice was right and the expert's was not.
        num_spoiled: where the expert's was right and the fused one was not.
        num_neither: where neither was right; what is left of `num_overruled` has no known right token.
    """

    system: str
    stratum: str
    num_tokens: int
    num_overruled: int
    num_mended: int = 0
    num_spoiled: int = 0
    num_neither: int = 0

    @property
    def num_unknown(self) -> int:
        """Overruled tokens of which it is not known what was right."""
        return self.num_overruled - self.num_mended - self.num_spoiled - self.num_neither


@dataclass(frozen=True, slots=True)
class TracedToken:
    """One token of an example answer.

    Attributes:
        expert: slot, "" for the router alone.
        weights: routing weights by slot (under a gate rule "router" too).
        fused, by_expert, by_router: text of each one's first choice at this place; "" where it has none.
        logprob: of the token in the fused distribution; None where it is not known.
    """

    text: str
    expert: str
    weights: Mapping[str, float] = field(default_factory=dict)
    fused: str = ""
    by_expert: str = ""
    by_router: str = ""
    logprob: float | None = None

    @property
    def is_overruled(self) -> bool:
        """Whether the complement made the fused choice another than the expert's."""
        return bool(self.by_expert) and self.fused != self.by_expert


@dataclass(frozen=True, slots=True)
class TracedAnswer:
    """An example answer, token by token."""

    system: str
    task: str
    prompt: str
    reference: str
    is_right: bool
    tokens: tuple[TracedToken, ...]


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that a report shows.

    Attributes:
        name: of the suite.
        summary: sentences that stand above all, negative findings among them.
        limits: what these numbers do not show.
        divisions: how questions are divided, in the order to show: division -> its parts.
        facts: seeds, numbers, versions, what decides the outcome; as JSON has it. No timings.
        slots: of the checkpoint, in its order.
        baseline: the system that pictures compare the others with; "" = the one that is compared most often.
    """

    name: str
    summary: tuple[str, ...]
    limits: tuple[str, ...]
    systems: tuple[SystemNote, ...]
    divisions: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    comparisons: tuple[Comparison, ...]
    routing: tuple[RoutingShare, ...] = ()
    examples: tuple[TracedAnswer, ...] = ()
    slots: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    entropies: tuple[RoutingEntropy, ...] = ()
    overrulings: tuple[Overruling, ...] = ()
    baseline: str = ""
