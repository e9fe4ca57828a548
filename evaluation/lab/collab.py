"""The lab's reward-guided choice: experts that take turns as a reward model of the same family says.

Its answers are written, not judged along the gold answer: what is chosen depends on answers that are wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.findings import SystemNote
from evaluation.journal import Journal
from evaluation.questions import Answer, Question, Verdict
from evaluation.running import ask_all
from evaluation.systems.answering import from_json
from evaluation.systems.collab import CollabWriter
from evaluation.systems.rewards import ModelReward
from evaluation.tasks.lab import verify
from fusionroute.client import RouterClient
from fusionroute.lab.tokenizer import ALPHABET, encode

if TYPE_CHECKING:
    from evaluation.lab.asking import OnProgress, SeedFolder

COLLAB = "collab"
NOTE = SystemNote(
    COLLAB,
    "reward-guided choice (Collab)",
    "served",
    "at each token the expert whose own way to the end a reward model likes best; that model is trained on gold "
    "answers beside wrong ones of the router and of the experts; fewer questions",
)
MOST_PER_TASK = 10
"""Questions of each task: an answer takes many more requests than that of any other system."""
NUM_CONCURRENT = 16


@dataclass(frozen=True, slots=True)
class LabCodec:
    """The lab's characters."""

    def encode(self, question: Question) -> list[int]:
        """The prompt's."""
        assert isinstance(question.prompt, str)
        return encode(question.prompt)

    def decode(self, ids: Sequence[int]) -> str:
        """Without padding and end."""
        return "".join(ALPHABET[each - 2] for each in ids if each >= 2)


def collab_questions(place: SeedFolder) -> list[Question]:
    """What is asked: of each task the first questions of those that are written anyway."""
    plan = replace(place.plan, per_task_written=min(place.plan.per_task_written, MOST_PER_TASK))
    return plan.written(list(place.questions))


def is_collab_known(place: SeedFolder) -> bool:
    """Whether the journal holds all that would be asked."""
    path, questions = place.written(COLLAB), collab_questions(place)
    return not questions or (path.exists() and Journal.read(path).keys() >= {each.id for each in questions})


async def write_by_collab(
    router: RouterClient, place: SeedFolder, slots: Sequence[str], reward: Path, on_progress: OnProgress
) -> None:
    """Answers to some questions. Raises as the services do."""
    questions = collab_questions(place)
    model = await asyncio.to_thread(ModelReward.load, reward)
    writer = CollabWriter(router, slots, model, LabCodec(), verify, exact=True)
    with Journal.open(place.written(COLLAB), place.what(COLLAB, [COLLAB], questions)) as journal:
        await ask_all(
            questions,
            writer.ask,
            journal,
            num_concurrent=NUM_CONCURRENT,
            on_progress=lambda done: on_progress("reward-guided", done),
        )


def read_collab(place: SeedFolder) -> dict[str, Mapping[str, tuple[Answer, Verdict]]]:
    """By system, then by question; nothing where nothing was asked."""
    if not collab_questions(place):
        return {}
    entries = Journal.read(place.written(COLLAB))
    return {COLLAB: {id_: from_json(entry) for id_, entry in entries.items()}}
