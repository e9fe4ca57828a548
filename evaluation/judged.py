"""What many systems would have written at each token of a gold answer, and which systems follow from that.

A greedy answer equals the gold answer exactly when, after every prefix of the gold answer, the first choice is the gold
token, the end of sequence included. So one look at the gold answer decides exact match for every way to write at once,
and for those systems that choose among the ways: by the first token, by token, or knowing the gold answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from evaluation.questions import RIGHT, Answer, Verdict
from evaluation.systems.ways import Way


@dataclass(frozen=True, slots=True)
class Opinion:
    """Of one way about the T tokens of a gold answer.

    Attributes:
        best_ids: its own first choice after each prefix.
        logprobs: natural log of the gold tokens' probabilities.
        experts: slot of the expert that took part in each, "" for the router alone.
    """

    best_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    experts: tuple[str, ...]


class Overruled(NamedTuple):
    """A token in which an expert took part: the gold one, the fused first choice, and the expert's."""

    gold: int
    fused: int
    by_expert: int

    @property
    def kinds(self) -> list[str]:
        """What happened: nothing, or that the expert was overruled, and whether that mended or spoiled the token."""
        if self.fused == self.by_expert:
            return []
        if self.fused == self.gold:
            return ["overruled", "mended"]
        return ["overruled", "spoiled" if self.by_expert == self.gold else "neither"]


@dataclass(frozen=True, slots=True)
class JudgedText:
    """A gold answer as several ways see it.

    Attributes:
        ids: its tokens, the end of sequence included.
        opinions: by the name of the way.
    """

    ids: tuple[int, ...]
    opinions: Mapping[str, Opinion]

    def rights(self, way: str) -> list[bool]:
        """At which tokens a way would have written the gold one."""
        return [best == gold for best, gold in zip(self.opinions[way].best_ids, self.ids, strict=True)]

    def answer(self, way: str, reference: str) -> Answer:
        """What is known of the way's own answer: all of it if it is right, else only that it is another one."""
        opinion = self.opinions[way]
        is_right = all(self.rights(way))
        return Answer(
            text=reference if is_right else "",
            is_complete=is_right,
            num_tokens=len(self.ids),
            logprob=sum(opinion.logprobs),
            experts=opinion.experts,
        )

    def verdict(self, way: str) -> Verdict:
        """Exact match of the way's greedy answer."""
        return _verdict(self.rights(way))

    def with_opinions_of(self, other: JudgedText) -> JudgedText:
        """With those opinions of the other, about the same tokens, that are missing here."""
        assert self.ids == other.ids, "another gold answer"
        return JudgedText(self.ids, {**other.opinions, **self.opinions})

    def overruled(self, way: str, alone: Mapping[str, str]) -> list[Overruled]:
        """One for each token in which an expert took part.

        Args:
            way: one that adds to an expert's scores.
            alone: by slot the name of the way in which that expert writes alone.
        """
        opinion = self.opinions[way]
        return [
            Overruled(gold, best, self.opinions[alone[expert]].best_ids[place])
            for place, (gold, best, expert) in enumerate(
                zip(self.ids, opinion.best_ids, opinion.experts, strict=True)
            )
            if expert
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values; log-probabilities with five decimals."""
        return {
            "ids": list(self.ids),
            "ways": {
                name: {
                    "best": list(opinion.best_ids),
                    "logprob": [round(value, 5) for value in opinion.logprobs],
                    "expert": list(opinion.experts),
                }
                for name, opinion in self.opinions.items()
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> JudgedText:
        """What `to_json` wrote. Raises KeyError, TypeError: it did not."""
        opinions = {
            name: Opinion(tuple(way["best"]), tuple(way["logprob"]), tuple(way["expert"]))
            for name, way in values["ways"].items()
        }
        return cls(tuple(values["ids"]), opinions)


def best_expert_each_token(judged: JudgedText, experts: Sequence[Way]) -> Verdict:
    """Oracle top-1: at each token the expert that gives the gold token the most probability, if it writes that."""
    opinions = [judged.opinions[way.name] for way in experts]
    rights = []
    for place, gold in enumerate(judged.ids):
        best = max(opinions, key=lambda opinion: opinion.logprobs[place])
        rights.append(best.best_ids[place] == gold)
    return _verdict(rights)


def some_expert(judged: JudgedText, experts: Sequence[Way]) -> Verdict:
    """Sequence-level selection by an oracle: one expert writes the whole answer, the right one if there is any."""
    verdicts = [judged.verdict(way.name) for way in experts]
    return max(verdicts, key=lambda verdict: verdict.score)


def first_choice(judged: JudgedText, routed: Way, experts: Mapping[str, Way]) -> Verdict:
    """Sequence-level selection by the router's first choice, which then writes the whole answer."""
    slot = judged.opinions[routed.name].experts[0]
    return judged.verdict(experts[slot].name)


def _verdict(rights: Sequence[bool]) -> Verdict:
    wrong = next((place for place, right in enumerate(rights) if not right), None)
    return RIGHT if wrong is None else Verdict(0.0, f"another token at place {wrong} of {len(rights)}")
