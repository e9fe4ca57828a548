"""Every score of an evaluation in one file, so that any two systems can be compared later, also across evaluations.

    scores.json.gz   {"questions": [{"id", "task", "cluster", "strata"}, ...],
                      "systems": {NAME: {"label", "kind", "note", "seeds": {SEED: [score or null, ...]}}}}

Scores stand in the order of the questions; null = not asked.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.findings import SystemNote
from evaluation.questions import Answer, Outcome, Question, Verdict
from fusionroute.errors import InvalidRequest, Reason

FILE = "scores.json.gz"
_UNSEEN = Answer("", is_complete=False)


@dataclass(frozen=True, slots=True)
class Scores:
    """What all systems got for all questions.

    Attributes:
        questions: without prompts and references.
        notes: of the systems, in the order of the tables.
        scores: by system, then by training seed, in the order of the questions; None = not asked.
    """

    questions: tuple[Question, ...]
    notes: tuple[SystemNote, ...]
    scores: Mapping[str, Mapping[int, Sequence[float | None]]]

    @classmethod
    def of(
        cls, questions: Iterable[Question], notes: Iterable[SystemNote], outcomes: Iterable[Outcome]
    ) -> Scores:
        """From outcomes of these systems to these questions."""
        kept = tuple(
            Question(each.id, each.task, "", cluster=each.cluster, strata=each.strata) for each in questions
        )
        places = {question.id: place for place, question in enumerate(kept)}
        scores: dict[str, dict[int, list[float | None]]] = {}
        for outcome in outcomes:
            by_seed = scores.setdefault(outcome.system, {})
            row = by_seed.setdefault(outcome.seed, [None] * len(kept))
            row[places[outcome.question.id]] = outcome.verdict.score
        return cls(kept, tuple(notes), scores)

    def outcomes(self, system: str) -> Iterator[Outcome]:
        """Of one system. Raises InvalidRequest: there is none of this name."""
        if system not in self.scores:
            known = ", ".join(sorted(self.scores))
            raise InvalidRequest(Reason.INVALID_FIELD, f"there is no system {system!r}; known: {known}")
        for seed, row in self.scores[system].items():
            for question, score in zip(self.questions, row, strict=True):
                if score is not None:
                    yield Outcome(question, system, seed, _UNSEEN, Verdict(score))

    def write(self, folder: Path) -> None:
        """Into a folder, whole or not at all; the same scores give the same bytes."""
        values = {
            "questions": [
                {"id": each.id, "task": each.task, "cluster": each.cluster, "strata": dict(each.strata)}
                for each in self.questions
            ],
            "systems": {
                note.name: {
                    "label": note.label,
                    "kind": note.kind,
                    "note": note.note,
                    "seeds": {str(seed): list(row) for seed, row in self.scores[note.name].items()},
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
        questions = tuple(
            Question(each["id"], each["task"], "", cluster=each["cluster"], strata=each["strata"])
            for each in values["questions"]
        )
        notes, scores = [], {}
        for name, system in values["systems"].items():
            notes.append(SystemNote(name, system["label"], system["kind"], system["note"]))
            scores[name] = {int(seed): row for seed, row in system["seeds"].items()}
        return cls(questions, tuple(notes), scores)
