"""Outcomes as arrays: every system on the same questions, by seed, cut into strata and summed over clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.findings import ACCURACY, ALL, NLL, SCORE
from evaluation.questions import Outcome, Question

Floats = npt.NDArray[np.float64]
MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Measure:
    """What is averaged: the sum of amounts over the sum of weights.

    Attributes:
        name: ``SCORE``, ``ACCURACY`` or ``NLL``.
        amount, weight: of an outcome; they raise ValueError where it has none.
        is_share: whether it lies between 0 and 1, as does every outcome's amount over its weight.
    """

    name: str
    amount: Callable[[Outcome], float]
    weight: Callable[[Outcome], float]
    is_share: bool


@dataclass(frozen=True, slots=True)
class Sitting:
    """What systems made of the questions of one seed.

    Attributes:
        seed: training seed of the models.
        questions: Q of them, in the order of their ids.
        weights: [Q], the same for all systems.
        amounts: [systems, Q].
    """

    seed: int
    questions: tuple[Question, ...]
    weights: Floats
    amounts: Floats


@dataclass(frozen=True, slots=True)
class Part:
    """A stratum of a panel: S seeds, K clusters.

    Attributes:
        name: of the stratum.
        seeds: in ascending order.
        members: for each seed the places of its questions in the sitting.
        is_there: [S, K], whether the seed has a question of the cluster.
        weights: [S, K], summed over questions.
        totals: [systems, S, K], amounts summed over questions.
    """

    name: str
    seeds: tuple[int, ...]
    members: tuple[npt.NDArray[np.int64], ...]
    is_there: npt.NDArray[np.bool_]
    weights: Floats
    totals: Floats

    @property
    def num_clusters(self) -> int:
        """K, all seeds together."""
        return int(self.is_there.shape[1])

    @property
    def num_questions(self) -> int:
        """Of each seed; of the one with the fewest where they differ."""
        return min(len(each) for each in self.members)

    @property
    def means(self) -> Floats:
        """Sum of amounts over sum of weights, [systems, S]."""
        return np.asarray(self.totals.sum(axis=2) / self.weights.sum(axis=1))


@dataclass(frozen=True, slots=True)
class Panel:
    """Systems that have answered exactly the same questions with the same seeds."""

    systems: tuple[str, ...]
    sittings: tuple[Sitting, ...]

    def place(self, system: str) -> int:
        """Of the system in the first axis of the arrays."""
        return self.systems.index(system)

    def part(self, stratum: str) -> Part:
        """The questions of a stratum.

        Raises:
            ValueError: a seed has no question of it.
        """
        members = tuple(_members(sitting, stratum) for sitting in self.sittings)
        numbers: dict[str, int] = {}
        keys = [
            np.array(
                [numbers.setdefault(cluster_of(sitting.questions[at]), len(numbers)) for at in places],
                dtype=np.int64,
            )
            for sitting, places in zip(self.sittings, members, strict=True)
        ]
        shape = (len(members), len(numbers))
        is_there, weights = np.zeros(shape, dtype=bool), np.zeros(shape)
        totals = np.zeros((len(self.systems), *shape))
        for at, (sitting, places, clusters) in enumerate(zip(self.sittings, members, keys, strict=True)):
            is_there[at, clusters] = True
            weights[at] = np.bincount(clusters, sitting.weights[places], len(numbers))
            for which, amounts in enumerate(sitting.amounts):
                totals[which, at] = np.bincount(clusters, amounts[places], len(numbers))
        seeds = tuple(sitting.seed for sitting in self.sittings)
        return Part(stratum, seeds, members, is_there, weights, totals)


def cluster_of(question: Question) -> str:
    """What the question is resampled with: its cluster, else itself alone."""
    return f"cluster {question.cluster}" if question.cluster else f"question {question.id}"


def strata_of(question: Question) -> dict[str, str]:
    """Its part in every division; "task" is always one."""
    return {**question.strata, "task": question.task}


def divisions_of(outcomes: Iterable[Outcome]) -> dict[str, tuple[str, ...]]:
    """Division -> its parts, in the order in which they first appear; "task" is the last one."""
    found: dict[str, dict[str, None]] = {}
    seen: set[int] = set()
    for outcome in outcomes:
        if id(outcome.question) in seen:
            continue
        seen.add(id(outcome.question))
        for division, part in strata_of(outcome.question).items():
            found.setdefault(division, {})[part] = None
    found["task"] = found.pop("task", {})
    return {division: tuple(parts) for division, parts in found.items()}


def strata_names(divisions: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """``ALL``, then "DIVISION=PART" for all of them."""
    return (ALL, *(f"{division}={part}" for division, parts in divisions.items() for part in parts))


def panels(outcomes: Iterable[Outcome], systems: Sequence[str], measure: Measure) -> list[Panel]:
    """The systems, those together that have answered the same questions with the same seeds and weights.

    Raises:
        ValueError: a system without outcomes, two outcomes for one question, two questions with one id, an outcome
            that cannot be measured.
    """
    answered = _by_system(outcomes, systems)
    groups: dict[tuple[object, ...], list[tuple[str, tuple[Sitting, ...]]]] = {}
    for system in dict.fromkeys(systems):
        sittings = _sittings(answered[system], measure)
        key = tuple((each.seed, _ids(each), each.weights.tobytes()) for each in sittings)
        groups.setdefault(key, []).append((system, sittings))
    return [_merged(group) for group in groups.values()]


def why_unpaired(first: Panel, second: Panel, names: tuple[str, str]) -> str:
    """How the questions of two systems differ, in words."""
    for one, other, name in ((first, second, names[1]), (second, first, names[0])):
        mine = {(each.seed, question.id) for each in one.sittings for question in each.questions}
        theirs = {(each.seed, question.id) for each in other.sittings for question in each.questions}
        missing = sorted(mine - theirs)
        if missing:
            named = ", ".join(f"{question!r} of seed {seed}" for seed, question in missing[:MAX_NAMED])
            more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
            return f"{name!r} lacks {named}{more}"
    for mine_at, theirs_at in zip(first.sittings, second.sittings, strict=True):
        for at in np.flatnonzero(mine_at.weights != theirs_at.weights):
            return (
                f"question {mine_at.questions[at].id!r} of seed {mine_at.seed} has {mine_at.weights[at]:g} tokens for "
                f"{names[0]!r} and {theirs_at.weights[at]:g} for {names[1]!r}"
            )
    return "nothing differs"


def _by_system(
    outcomes: Iterable[Outcome], systems: Sequence[str]
) -> dict[str, dict[tuple[int, str], Outcome]]:
    answered: dict[str, dict[tuple[int, str], Outcome]] = {system: {} for system in systems}
    questions: dict[tuple[int, str], Question] = {}
    for outcome in outcomes:
        mine = answered.get(outcome.system)
        if mine is None:
            continue
        key = (outcome.seed, outcome.question.id)
        if key in mine:
            raise ValueError(f"{outcome.system!r} answered question {key[1]!r} of seed {key[0]} twice")
        known = questions.setdefault(key, outcome.question)
        if known is not outcome.question and known != outcome.question:
            raise ValueError(f"two questions of seed {key[0]} have the id {key[1]!r}")
        mine[key] = outcome
    for system, mine in answered.items():
        if not mine:
            raise ValueError(f"there is no outcome of the system {system!r}")
    return answered


def _sittings(answered: Mapping[tuple[int, str], Outcome], measure: Measure) -> tuple[Sitting, ...]:
    by_seed: dict[int, list[Outcome]] = {}
    for (seed, _), outcome in sorted(answered.items(), key=lambda item: item[0]):
        by_seed.setdefault(seed, []).append(outcome)
    return tuple(
        Sitting(
            seed,
            tuple(outcome.question for outcome in mine),
            np.array([measure.weight(outcome) for outcome in mine], dtype=np.float64),
            np.array([[measure.amount(outcome) for outcome in mine]], dtype=np.float64),
        )
        for seed, mine in by_seed.items()
    )


def _ids(sitting: Sitting) -> tuple[str, ...]:
    return tuple(question.id for question in sitting.questions)


def _merged(group: Sequence[tuple[str, tuple[Sitting, ...]]]) -> Panel:
    sittings = [
        Sitting(
            same[0].seed, same[0].questions, same[0].weights, np.concatenate([each.amounts for each in same])
        )
        for same in zip(*(sittings for _, sittings in group), strict=True)
    ]
    return Panel(tuple(system for system, _ in group), tuple(sittings))


def _members(sitting: Sitting, stratum: str) -> npt.NDArray[np.int64]:
    if stratum == ALL:
        return np.arange(len(sitting.questions))
    division, equals, part = stratum.partition("=")
    places = [at for at, each in enumerate(sitting.questions) if strata_of(each).get(division) == part]
    if not equals or not places:
        raise ValueError(f"stratum = {stratum!r} is not allowed: seed {sitting.seed} has no question of it")
    return np.array(places, dtype=np.int64)


def _score(outcome: Outcome) -> float:
    score = outcome.verdict.score
    if not 0.0 <= score <= 1.0:
        raise ValueError(f"score = {score} of question {outcome.question.id!r} is not allowed: from 0 to 1")
    return score


def _loss(outcome: Outcome) -> float:
    if outcome.answer.logprob is None:
        raise ValueError(f"{outcome.system!r} gave no log-probability for question {outcome.question.id!r}")
    return -outcome.answer.logprob


def _tokens(outcome: Outcome) -> float:
    if outcome.answer.num_tokens < 1:
        raise ValueError(f"{outcome.system!r} gave no number of tokens for question {outcome.question.id!r}")
    return float(outcome.answer.num_tokens)


def _right_tokens(outcome: Outcome) -> float:
    """Whole numbers where the score is a share of tokens, whatever the division has lost."""
    return round(_score(outcome) * _tokens(outcome), 6)


MEAN_SCORE = Measure(SCORE, _score, lambda outcome: 1.0, is_share=True)
TOKEN_ACCURACY = Measure(ACCURACY, _right_tokens, _tokens, is_share=True)
LOSS_PER_TOKEN = Measure(NLL, _loss, _tokens, is_share=False)
