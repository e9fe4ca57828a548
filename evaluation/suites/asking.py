"""Asks everybody of a suite everything, and keeps what comes in journals; what is known already is not asked again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.findings import SystemNote
from evaluation.journal import Journal
from evaluation.judged import JudgedText
from evaluation.questions import Outcome, digest_of
from evaluation.running import Ask, ask_all
from evaluation.suites.config import Suite, SystemTable
from evaluation.suites.loading import LoadedTask
from evaluation.suites.texts import Text, outcome_of
from evaluation.systems.answering import RouterWriter, Verify, from_json, to_json
from evaluation.systems.collab import CollabWriter
from evaluation.systems.judging import MOST_WAYS, RouterJudge
from evaluation.systems.models import ModelFolder
from evaluation.systems.remote import RemoteWriter
from evaluation.systems.rewards import ModelReward
from evaluation.systems.tokens import TokenizerCodec
from evaluation.systems.ways import Way, available_ways, rule_names
from fusionroute.client import RouterClient
from fusionroute.errors import Reason, Unavailable, invalid
from fusionroute.questions import Options
from fusionroute.remote_models import RemoteModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OnProgress = Callable[[str, int], None]
"""Told who is asked what, and how many more questions are done."""


EXPERTS_SECONDS = 60.0
EXPERTS_POLL_SECONDS = 0.2


@dataclass(slots=True)
class Heard:
    """What has come.

    Attributes:
        notes: of the systems, in the order of the tables.
        outcomes: answers to questions, judged.
        views: of texts: log-probabilities, and as score the share of tokens that were the first choice.
        slots: of the router's checkpoint.
        models: who answered: the router's checkpoint and the experts' models.
    """

    notes: list[SystemNote] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    views: list[Outcome] = field(default_factory=list)
    slots: tuple[str, ...] = ()
    models: dict[str, Any] = field(default_factory=dict)


async def ask_suite(
    suite: Suite,
    tasks: Sequence[LoadedTask],
    texts: Sequence[Text],
    router: RouterClient,
    output: Path,
    on_progress: OnProgress,
) -> Heard:
    """Everybody's answers to everything.

    Raises:
        FusionRouteError: a system is not there, or the journals hold answers of others.
        ExceptionGroup: of what requests raised; what had come is kept.
    """
    info = await router.info()
    slots = tuple(slot.slot for slot in info.slots)
    experts = await _serving(router, slots)
    heard = Heard(slots=slots, models={"checkpoint": info.checkpoint, "experts": experts})
    systems = list(suite.systems) or _everybody(slots, rule_names(info.available_combine))
    asker = _Asker(suite, output, router, heard, on_progress)
    for table in systems:
        heard.notes.append(SystemNote(table.name, table.label or table.name, _kind(table)))
        await asker.ask(table, tasks)
    await asker.view(texts, [way_of(table) for table in systems if table.kind == "served"])
    return heard


async def _serving(router: RouterClient, slots: Sequence[str]) -> dict[str, str]:
    """The model of each slot's expert, once all are there: whose answers these are must not depend on a late lease.

    Raises:
        Unavailable: a slot has nobody.
    """
    deadline = time.monotonic() + EXPERTS_SECONDS
    while True:
        experts = {each.slot: each.model for each in await router.experts() if each.state == "ready"}
        missing = [slot for slot in slots if slot not in experts]
        if not missing:
            return {slot: experts[slot] for slot in slots}
        if time.monotonic() > deadline:
            raise Unavailable(
                Reason.EXPERT_UNAVAILABLE,
                f"nobody serves slot {', '.join(missing)} after {EXPERTS_SECONDS:g} s",
                retry_after_seconds=1.0,
            )
        await asyncio.sleep(EXPERTS_POLL_SECONDS)


def way_of(table: SystemTable) -> Way:
    """How the router is asked for a system."""
    return Way(table.name, table.label or table.name, table.combine, table.expert, table.random_expert)


class _Asker:
    def __init__(
        self, suite: Suite, output: Path, router: RouterClient, heard: Heard, on_progress: OnProgress
    ) -> None:
        self._suite, self._output, self._router, self._heard = suite, output, router, heard
        self._on_progress = on_progress

    async def ask(self, table: SystemTable, tasks: Sequence[LoadedTask]) -> None:
        """All tasks of one system, once with each seed of the suite."""
        if not tasks:
            return
        if table.kind == "model":
            await asyncio.to_thread(self._ask_model, table, tasks)
            return
        if table.kind == "collab":
            await self._ask_collab(table, tasks)
            return
        remote = RemoteModel.open(table.url, model=table.model, api_key_file=table.api_key_file)
        async with remote if table.kind == "remote" else _nobody() as model:
            for seed in self._suite.sampling.seeds:
                for task in tasks:
                    ask = self._ask_of(table, task.verify, seed, model)
                    who = {
                        "kind": table.kind,
                        **self._identity(table, model),
                        "sampling": self._sampling(seed),
                    }
                    with self._journal(table.name, task, seed, who) as journal:
                        await ask_all(
                            task.questions,
                            ask,
                            journal,
                            num_concurrent=self._suite.concurrency,
                            on_progress=partial(self._tell, table, task.title),
                        )
                        self._hear(table, task, seed, journal)

    async def _ask_collab(self, table: SystemTable, tasks: Sequence[LoadedTask]) -> None:
        """Greedy, whatever the suite's sampling; asked once, the same answers for every seed."""
        reward = await asyncio.to_thread(ModelReward.load, Path(table.reward))
        codec = await asyncio.to_thread(TokenizerCodec.load, self._suite.tokenizer)
        who = {
            "kind": table.kind,
            **self._heard.models,
            "reward": table.reward,
            "chunk_tokens": table.chunk_tokens,
        }
        for task in tasks:
            writer = CollabWriter(
                self._router, self._heard.slots, reward, codec, task.verify, table.chunk_tokens
            )
            with self._journal(table.name, task, 0, who) as journal:
                await ask_all(
                    task.questions,
                    writer.ask,
                    journal,
                    num_concurrent=self._suite.concurrency,
                    on_progress=partial(self._tell, table, task.title),
                )
                for seed in self._suite.sampling.seeds:
                    self._hear(table, task, seed, journal)

    async def view(self, texts: Sequence[Text], ways: Sequence[Way]) -> None:
        """What each way makes of the texts."""
        if not texts or not ways:
            return
        if len(ways) > MOST_WAYS:
            raise invalid("systems", f"{len(ways)} that are served", f"at most {MOST_WAYS} beside texts")
        by_id = {text.question.id: text for text in texts}
        judge = RouterJudge(self._router, ways, lambda question: _pair(by_id[question.id]))
        what = {
            "ways": [repr(way) for way in ways],
            "texts": digest_of(text.question for text in texts),
            **self._heard.models,
        }
        with Journal.open(self._output / "answers" / "texts.jsonl", what) as journal:
            await ask_all(
                [text.question for text in texts],
                judge.ask,
                journal,
                num_concurrent=self._suite.concurrency,
                on_progress=lambda done: self._on_progress("texts", done),
            )
            for text in texts:
                judged = JudgedText.from_json(journal.entries[text.question.id])
                self._heard.views.extend(outcome_of(text, judged, way.name) for way in ways)

    def _ask_of(self, table: SystemTable, verify: Verify, seed: int, model: RemoteModel | None) -> Ask:
        sampling = self._suite.sampling
        if model is not None:
            return RemoteWriter(model, verify, sampling.temperature, sampling.top_p, seed).ask
        return RouterWriter(self._router, way_of(table), verify, self._sampling(seed)).ask

    def _ask_model(self, table: SystemTable, tasks: Sequence[LoadedTask]) -> None:
        """Greedy, whatever the suite's sampling; once."""
        model: ModelFolder | None = None
        for task in tasks:
            who = {"kind": "model", "model": table.model}
            with self._journal(table.name, task, 0, who) as journal:
                missing = [each for each in task.questions if each.id not in journal.entries]
                self._tell(table, task.title, len(task.questions) - len(missing))
                if missing:
                    model = model or ModelFolder.load(table.name, Path(table.model))
                    answers = model.answer(missing, partial(self._tell, table, task.title))
                    for question, answer in zip(missing, answers, strict=True):
                        journal.add(question.id, to_json(answer, task.verify(question, answer)))
                for seed in self._suite.sampling.seeds:  # the same answers: paired with those of each seed
                    self._hear(table, task, seed, journal)

    def _hear(self, table: SystemTable, task: LoadedTask, seed: int, journal: Journal) -> None:
        for question in task.questions:
            answer, verdict = from_json(journal.entries[question.id])
            self._heard.outcomes.append(Outcome(question, table.name, seed, answer, verdict))

    def _journal(self, system: str, task: LoadedTask, seed: int, who: Mapping[str, Any]) -> Any:
        path = self._output / "answers" / system.replace("/", "+") / f"{task.title}-{seed}.jsonl"
        return Journal.open(path, {**who, "questions": digest_of(task.questions)})

    def _identity(self, table: SystemTable, model: RemoteModel | None) -> dict[str, Any]:
        return (
            {**self._heard.models, "way": repr(way_of(table))} if model is None else {"model": model.identity}
        )

    def _sampling(self, seed: int) -> Options:
        table = self._suite.sampling
        if table.temperature == 0.0:  # a seed all the same: experts may be drawn
            return Options(temperature=0.0, seed=seed)
        return Options(temperature=table.temperature, top_p=table.top_p, top_k=table.top_k, seed=seed)

    def _tell(self, table: SystemTable, title: str, num_done: int) -> None:
        self._on_progress(f"{table.name}: {title}", num_done)


def _everybody(slots: Sequence[str], rules: Sequence[str]) -> list[SystemTable]:
    return [
        SystemTable(
            name=way.name,
            label=way.label,
            combine=way.combine,  # type: ignore[arg-type]
            expert=way.expert,
            random_expert=way.is_random,
        )
        for way in available_ways(slots, rules)
        if not way.name.startswith("fixed/")
    ]


def _kind(table: SystemTable) -> str:
    if table.kind == "served" and table.expert and table.combine == "route":
        return "expert"
    if table.kind == "collab":
        return "served"
    return table.kind


def _pair(text: Text) -> tuple[Sequence[int], Sequence[int]]:
    return text.prompt_ids, text.ids


@asynccontextmanager
async def _nobody() -> AsyncIterator[None]:
    yield None
