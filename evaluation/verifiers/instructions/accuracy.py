"""The benchmark's four numbers: of prompts and of instructions, strictly and loosely; and how each kind does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evaluation.questions import Answer, Question
from evaluation.statistics.intervals import Estimate, paired_difference, wilson_interval
from evaluation.verifiers.instructions.judging import Strictness, followed, instructions_of


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many; `total` is at least 1."""

    num_followed: int
    total: int

    @property
    def value(self) -> float:
        """Between 0 and 1."""
        return self.num_followed / self.total


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How often instructions were followed.

    Attributes:
        prompts: share of the prompts all of whose instructions are followed, with Wilson's interval.
        instructions: share of the instructions that are followed; its interval draws prompts, because instructions of
            one prompt do not vary independently.
        by_kind: of the instructions of a kind, for example "keywords:existence".
        by_group: of those of a group of kinds, for example "keywords".
    """

    prompts: Estimate
    instructions: Estimate
    by_kind: Mapping[str, Share]
    by_group: Mapping[str, Share]


def accuracy(answered: Iterable[tuple[Question, Answer]], strictness: Strictness) -> Accuracy:
    """The accuracies of these answers.

    Raises:
        ValueError: no answers.
        InvalidRequest: INVALID_FIELD, a question's instructions cannot be read, or langdetect is not installed.
    """
    results: list[bool] = []
    kinds: list[str] = []
    clusters: list[int] = []
    whole: list[bool] = []
    for number, (question, answer) in enumerate(answered):
        instructions = instructions_of(question)
        of_prompt = followed(instructions, answer.text, strictness)
        whole.append(all(of_prompt))
        results.extend(of_prompt)
        kinds.extend(instruction.name for instruction in instructions)
        clusters.extend([number] * len(of_prompt))
    return Accuracy(
        prompts=wilson_interval(sum(whole), len(whole)),
        instructions=paired_difference([float(result) for result in results], [0.0] * len(results), clusters),
        by_kind=_shares(kinds, results),
        by_group=_shares([kind.split(":")[0] for kind in kinds], results),
    )


def _shares(names: list[str], results: list[bool]) -> dict[str, Share]:
    return {
        name: Share(
            sum(result for other, result in zip(names, results, strict=True) if other == name),
            names.count(name),
        )
        for name in sorted(set(names))
    }
