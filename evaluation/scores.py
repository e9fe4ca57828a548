"""Every score of an evaluation in one file, so that any two systems can be compared later, also across evaluations.

    scores.json.gz   {"questions": [{"id", "task", "cluster", "strata"}, ...],
                      "texts": [the same, ...],
                      "systems": {NAME: {"label", "kind", "note", "seeds": {SEED: [score or null, ...]},
                                         "views": {SEED: [[accuracy, logprob, tokens] or null, ...]}}}}

Scores stand in the order of the questions, views in that of the texts; null = not asked.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from evaluation.findings import SystemNote
from evaluation.questions import Answer, Outcome, Question, Verdict
from fusionroute.errors import InvalidRequest, Reason

FILE = "scores.json.gz"
_UNSEEN = Answer("", is_complete=False)

T = TypeVar("T")


BySeed = Mapping[int, Sequence[T | None]]
"""By training seed, in the order of questions or texts; None = not asked."""


class View(NamedTuple):
    """What a system makes of a text.

    Attributes:
        accuracy: share of the tokens that it would write.
        logprob: of all tokens together, in nats.
    """

    accuracy: float
    logprob: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What all systems got for all questions, and made of all texts.

    Attributes:
        questions, texts: without prompts and references.
        notes: of the systems, in the order of the tables.
        scores, views: by system; systems that were asked no question, or read no text, are not in them.
    """

    questions: tuple[Question, ...]
    notes: tuple[SystemNote, ...]
    scores: Mapping[str, BySeed[float]]
    texts: tuple[Question, ...] = ()
    views: Mapping[str, BySeed[View]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        questions: Iterable[Question],
        notes: Iterable[SystemNote],
        outcomes: Iterable[Outcome],
        views: Iterable[Outcome] = (),
    ) -> Scores:
        """From what these systems answered to these questions, and from their views of texts."""
        kept, seen = [_without_texts(each) for each in questions], list(views)
        texts = [_without_texts(each) for each in {each.question.id: each.question for each in seen}.values()]
        return cls(
            tuple(kept),
            tuple(notes),
            _by_seed(kept, outcomes, lambda each: each.verdict.score),
            tuple(texts),
            _by_seed(texts, seen, _view),
        )

    def outcomes_of(self, system: str) -> Iterator[Outcome]:
        """Of one system's answers. Raises InvalidRequest: there is none of this name."""
        for question, seed, score in self._known(system, self.scores, self.questions):
            yield Outcome(question, system, seed, _UNSEEN, Verdict(score))

    def views_of(self, system: str) -> Iterator[Outcome]:
        """Of one system's looks at texts. Raises InvalidRequest: there is none of this name."""
        for question, seed, view in self._known(system, self.views, self.texts):
            answer = Answer("", True, view.num_tokens, view.logprob)
            yield Outcome(question, system, seed, answer, Verdict(view.accuracy))

    def _known(
        self, system: str, of_systems: Mapping[str, BySeed[T]], questions: Sequence[Question]
    ) -> Iterator[tuple[Question, int, T]]:
        known = sorted(note.name for note in self.notes)
        if system not in known:
            message = f"there is no system {system!r}; known: {', '.join(known)}"
            raise InvalidRequest(Reason.INVALID_FIELD, message)
        for seed, row in of_systems.get(system, {}).items():
            for question, each in zip(questions, row, strict=True):
                if each is not None:
                    yield question, seed, each

    def write(self, folder: Path) -> None:
        """Into a folder, whole or not at all; the same scores give the same bytes."""
        values = {
            "questions": [_plain(each) for each in self.questions],
            "texts": [_plain(each) for each in self.texts],
            "systems": {
                note.name: {
                    "label": note.label,
                    "kind": note.kind,
                    "note": note.note,
                    "seeds": _rows(self.scores.get(note.name, {})),
                    "views": _rows(self.views.get(note.name, {})),
                }
                for note in self.notes
            },
        }
        draft = folder / f".{FILE}.draft"
        draft.write_bytes(gzip.compress(json.dumps(values, separators=(",", ":")).encode(), mtime=0))
        draft.rename(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Scores:
        """What `write` wrote. Raises InvalidRequest: the file is missing or is something else."""
        path = folder / FILE
        try:
            values = json.loads(gzip.decompress(path.read_bytes()))
            return cls._of(values)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(Reason.INVALID_FIELD, f"{path} holds no scores: {error!r}") from None

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Scores:
        notes, scores, views = [], {}, {}
        for name, system in values["systems"].items():
            notes.append(SystemNote(name, system["label"], system["kind"], system["note"]))
            if system["seeds"]:
                scores[name] = {int(seed): row for seed, row in system["seeds"].items()}
            if system.get("views"):
                views[name] = {
                    int(seed): [None if each is None else View(*each) for each in row]
                    for seed, row in system["views"].items()
                }
        questions, texts = (
            tuple(
                Question(each["id"], each["task"], "", cluster=each["cluster"], strata=each["strata"])
                for each in those
            )
            for those in (values["questions"], values.get("texts", ()))
        )
        return cls(questions, tuple(notes), scores, texts, views)


def _by_seed(
    questions: Sequence[Question], outcomes: Iterable[Outcome], value_of: Callable[[Outcome], T]
) -> dict[str, dict[int, list[T | None]]]:
    places = {question.id: place for place, question in enumerate(questions)}
    found: dict[str, dict[int, list[T | None]]] = {}
    for outcome in outcomes:
        row = found.setdefault(outcome.system, {}).setdefault(outcome.seed, [None] * len(places))
        row[places[outcome.question.id]] = value_of(outcome)
    return found


def _without_texts(question: Question) -> Question:
    return Question(question.id, question.task, "", cluster=question.cluster, strata=question.strata)


def _view(outcome: Outcome) -> View:
    answer = outcome.answer
    assert answer.logprob is not None, f"{outcome.system} gave no probability of {outcome.question.id}"
    return View(outcome.verdict.score, round(answer.logprob, 5), answer.num_tokens)


def _plain(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "task": question.task,
        "cluster": question.cluster,
        "strata": dict(question.strata),
    }


def _rows(by_seed: BySeed[Any]) -> dict[str, list[Any]]:
    return {str(seed): list(row) for seed, row in by_seed.items()}
