"""Asks the running services, and models in folders, every question of a seed, and keeps what they say in journals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.findings import TracedAnswer, TracedToken
from evaluation.journal import Journal
from evaluation.judged import JudgedText
from evaluation.lab.plan import CDPO, SFT, LabPlan
from evaluation.lab.systems import Judged, SeedRecords
from evaluation.questions import Answer, Question, Verdict, digest_of
from evaluation.running import ask_all
from evaluation.systems.answering import RouterWriter, from_json
from evaluation.systems.judging import RouterJudge
from evaluation.systems.models import ModelFolder
from evaluation.systems.ways import (
    ENSEMBLE,
    GATED,
    PROXY,
    RANDOM,
    ROUTER_ALONE,
    ROUTING_ONLY,
    SUM,
    Way,
    expert_ways,
    fixed_ways,
)
from evaluation.tasks.lab import verify
from fusionroute.client import RouterClient
from fusionroute.lab.tasks import examples
from fusionroute.lab.tokenizer import EOS_ID, encode
from fusionroute.questions import Options

NUM_CONCURRENT = 64
_TRACED = {"routing_weights": True, "num_candidates": 1, "temperature": 0.0, "seed": 0, "exact": True}
EXAMPLES = "examples.json"

OnProgress = Callable[[str, int], None]
"""Told what is asked and how many more questions are done."""


@dataclass(frozen=True, slots=True)
class SeedFolder:
    """Where the journals of a seed lie.

    Attributes:
        origins: by the name of a router checkpoint or a model, what its weights are, so that answers of others are not
            taken for its own.
    """

    folder: Path
    plan: LabPlan
    questions: Sequence[Question]
    origins: Mapping[str, str]

    def judged(self, name: str) -> Path:
        """Of a router checkpoint or a model."""
        return self.folder / f"judged-{name}.jsonl"

    def written(self, system: str) -> Path:
        """Of a system that writes."""
        return self.folder / f"written-{system.replace('/', '+')}.jsonl"

    def keep_examples(self, examples: Sequence[TracedAnswer]) -> None:
        """Answers token by token, for the report."""
        values = [asdict(example) for example in examples]
        (self.folder / EXAMPLES).write_text(
            json.dumps(values, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )

    def examples(self) -> list[TracedAnswer]:
        """Those that were kept."""
        path = self.folder / EXAMPLES
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        return [
            TracedAnswer(**{**each, "tokens": tuple(TracedToken(**token) for token in each["tokens"])})
            for each in values
        ]

    def what(self, who: str, ways: Iterable[str], questions: Sequence[Question]) -> dict[str, Any]:
        """The first line of a journal: whatever decides its answers."""
        return {
            "who": who,
            "ways": list(ways),
            "models": self.origins[who],
            "questions": digest_of(questions),
        }


def ways_of(checkpoint: str, slots: Sequence[str], rules: Iterable[str]) -> list[Way]:
    """What a router checkpoint is asked for: everything of phases I and II, three rules of the others."""
    known = set(rules)
    if checkpoint not in (SFT, CDPO):
        return [way for way in (SUM, ROUTING_ONLY, ROUTER_ALONE) if way.combine in known]
    several = [SUM, ROUTING_ONLY, ROUTER_ALONE, *GATED, RANDOM, PROXY]
    if checkpoint == SFT:
        several += [*expert_ways(slots), ENSEMBLE]
    return [way for way in several if way.combine in known] + fixed_ways(slots)


def written_ways(checkpoint: str, slots: Sequence[str]) -> list[Way]:
    """Which of them also write answers."""
    if checkpoint == SFT:
        return [*expert_ways(slots), ROUTING_ONLY, SUM, *GATED]
    return [SUM] if checkpoint == CDPO else []


async def judge_by_router(
    router: RouterClient, place: SeedFolder, checkpoint: str, ways: Sequence[Way], on_progress: OnProgress
) -> None:
    """What the ways of the checkpoint that the router serves now make of every question. Raises as the services do."""
    judge = RouterJudge(router, ways, encode_question, exact=True)
    what = place.what(checkpoint, [way.name for way in ways], place.questions)
    with Journal.open(place.judged(checkpoint), what) as journal:
        await ask_all(
            place.questions,
            judge.ask,
            journal,
            num_concurrent=NUM_CONCURRENT,
            on_progress=lambda done: on_progress("judged", done),
        )


async def write_by_router(
    router: RouterClient, place: SeedFolder, checkpoint: str, ways: Sequence[Way], on_progress: OnProgress
) -> None:
    """Answers of these ways to some questions, really written. Raises as the services do."""
    questions = place.plan.written(list(place.questions))
    for way in ways:
        name = system_name(checkpoint, way)
        writer = RouterWriter(
            router, way, verify, Options(temperature=0.0, seed=0, exact=True, routing_weights=True)
        )
        with Journal.open(place.written(name), place.what(checkpoint, [name], questions)) as journal:
            await ask_all(
                questions,
                writer.ask,
                journal,
                num_concurrent=NUM_CONCURRENT,
                on_progress=lambda done: on_progress("written", done),
            )


def judge_by_model(place: SeedFolder, name: str, folder: Path, on_progress: OnProgress) -> None:
    """What a model in a folder makes of every question."""
    with Journal.open(place.judged(name), place.what(name, [name], place.questions)) as journal:
        missing = [question for question in place.questions if question.id not in journal.entries]
        on_progress("judged", len(place.questions) - len(missing))
        if missing:
            model = ModelFolder.load(name, folder)
            found = model.judge(missing, encode_question, lambda done: on_progress("judged", done))
            for question, judged in zip(missing, found, strict=True):
                journal.add(question.id, judged.to_json())


def is_known(place: SeedFolder, checkpoint: str, slots: Sequence[str]) -> bool:
    """Whether the journals hold all that would be asked of a router checkpoint."""
    questions = place.plan.written(list(place.questions))
    names = [system_name(checkpoint, way) for way in written_ways(checkpoint, slots)] if questions else []
    wanted = [
        (place.judged(checkpoint), place.questions),
        *((place.written(name), questions) for name in names),
    ]
    if checkpoint == CDPO and not (place.folder / EXAMPLES).exists():
        return False
    return all(
        path.exists() and Journal.read(path).keys() >= {question.id for question in asked}
        for path, asked in wanted
    )


async def trace_examples(router: RouterClient, system: str, way: Way) -> list[TracedAnswer]:
    """A handful of telling answers, token by token."""
    slots = [slot.slot for slot in (await router.info()).slots]
    traced = []
    for item in examples():
        options: Any = {**way.options(), **_TRACED}
        completion = await router.complete(item.prompt, max_tokens=len(item.answer) + 8, **options)
        tokens = tuple(
            TracedToken(
                text=token.text or "⏎" if token.id != EOS_ID else "■",
                expert=token.expert or "",
                weights=dict(zip([*slots, "router"], token.routing_weights, strict=False)),
                fused=_shown(token.top.fused),
                by_expert=_shown(token.top.expert),
                by_router=_shown(token.top.complement),
                logprob=token.logprob,
            )
            for token in completion.tokens
        )
        is_right = completion.text == item.answer and completion.finish_reason == "eos"
        traced.append(TracedAnswer(system, item.task, item.prompt, item.answer, is_right, tokens))
    return traced


def read_seed(
    place: SeedFolder, seed: int, slots: Sequence[str], routers: Sequence[str], models: Sequence[str]
) -> SeedRecords:
    """What the journals of a seed hold. Raises FileNotFoundError, InvalidRequest: one is missing or of other models."""
    questions = place.plan.written(list(place.questions))
    written: dict[str, Mapping[str, tuple[Answer, Verdict]]] = {}
    entropies: dict[str, Mapping[str, tuple[float, ...]]] = {}
    for checkpoint in routers:
        for way in written_ways(checkpoint, slots) if questions else []:
            entries = Journal.read(place.written(system_name(checkpoint, way)))
            name = way.name if way.name.startswith("expert/") else system_name(checkpoint, way)
            written[name] = {id_: from_json(entry) for id_, entry in entries.items()}
            entropies[name] = {id_: tuple(entry["entropies"]) for id_, entry in entries.items()}
    return SeedRecords(
        seed=seed,
        slots=tuple(slots),
        routers={name: _judged(place.judged(name)) for name in routers},
        models={name: _judged(place.judged(name)) for name in models},
        written=written,
        entropies=entropies,
    )


def disagreements(records: SeedRecords) -> tuple[int, list[str]]:
    """Written answers that were looked at, and "SYSTEM ID" of those that are right where judging says wrong, or the
    other way round.
    """
    num_compared, differing = 0, []
    for system, answers in records.written.items():
        checkpoint, _, name = (
            system.rpartition("/") if not system.startswith("expert/") else (SFT, "", system)
        )
        judged = records.routers[checkpoint]
        for id_, (_, verdict) in answers.items():
            num_compared += 1
            if judged[id_].verdict(name).is_right != verdict.is_right:
                differing.append(f"{system} {id_}")
    return num_compared, differing


def encode_question(question: Question) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the gold answer with its end."""
    assert isinstance(question.prompt, str)
    return encode(question.prompt), [*encode(question.reference), EOS_ID]


def system_name(checkpoint: str, way: Way) -> str:
    """As tables name a way of a checkpoint."""
    return way.name if way.name.startswith("expert/") else f"{checkpoint}/{way.name}"


def _shown(candidates: Sequence[Any]) -> str:
    return (candidates[0].text if candidates[0].id != EOS_ID else "■") if candidates else ""


def _judged(path: Path) -> Judged:
    return {id_: JudgedText.from_json(entry) for id_, entry in Journal.read(path).items()}
