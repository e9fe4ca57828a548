"""Asks everybody of a suite everything, and keeps what comes in journals; what is known already is not asked again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.findings import SystemNote
from evaluation.journal import Journal
from evaluation.questions import Outcome, digest_of
from evaluation.running import Ask, ask_all
from evaluation.suites.config import Suite, SystemTable
from evaluation.suites.loading import LoadedTask
from evaluation.suites.reached import Reached, reached_routers, way_of
from evaluation.suites.texts import Text
from evaluation.suites.viewing import OnProgress, view_texts
from evaluation.systems.answering import RouterWriter, Verify, from_json, to_json
from evaluation.systems.collab import CollabWriter
from evaluation.systems.models import ModelFolder
from evaluation.systems.remote import RemoteWriter
from evaluation.systems.rewards import ModelReward
from evaluation.systems.tokens import TokenizerCodec
from evaluation.systems.ways import available_ways
from fusionroute.client import RouterClient
from fusionroute.questions import Options
from fusionroute.remote_models import RemoteModel


@dataclass(slots=True)
class Heard:
    """What has come.

    Attributes:
        notes: of the systems, in the order of the tables.
        outcomes: answers to questions, judged.
        views: of texts: log-probabilities, and as score the share of tokens that were the first choice.
        slots: of the routers' checkpoints.
        models: who answered: the router's checkpoint and the experts' models; under "others" those of further
            routers, by address.
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
    async with reached_routers(router, suite.systems) as routers:
        own = routers[""]
        slots = tuple(dict.fromkeys(slot for each in routers.values() for slot in each.slots))
        others = {address: each.models for address, each in routers.items() if address}
        heard = Heard(slots=slots, models={**own.models, **({"others": others} if others else {})})
        systems = list(suite.systems) or _everybody(own.slots, own.rules)
        asker = _Asker(suite, output, routers, heard, on_progress)
        for table in systems:
            heard.notes.append(
                SystemNote(table.name, table.label or table.name, _kind(table), _note(table, routers))
            )
            await asker.ask(table, tasks)
        heard.views = await view_texts(suite, texts, systems, routers, output / "answers", on_progress)
    return heard


class _Asker:
    def __init__(
        self,
        suite: Suite,
        output: Path,
        routers: Mapping[str, Reached],
        heard: Heard,
        on_progress: OnProgress,
    ) -> None:
        self._suite, self._output, self._routers, self._heard = suite, output, routers, heard
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
        own = self._routers[""]
        reward = await asyncio.to_thread(ModelReward.load, Path(table.reward))
        codec = await asyncio.to_thread(TokenizerCodec.load, self._suite.tokenizer)
        who = {
            "kind": table.kind,
            **own.models,
            "reward": table.reward,
            "chunk_tokens": table.chunk_tokens,
        }
        for task in tasks:
            writer = CollabWriter(own.client, own.slots, reward, codec, task.verify, table.chunk_tokens)
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

    def _ask_of(self, table: SystemTable, verify: Verify, seed: int, model: RemoteModel | None) -> Ask:
        sampling = self._suite.sampling
        if model is not None:
            return RemoteWriter(model, verify, sampling.temperature, sampling.top_p, seed).ask
        router = self._routers[table.address].client
        return RouterWriter(router, way_of(table), verify, self._sampling(seed)).ask

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
        if model is not None:
            return {"model": model.identity}
        return {**self._routers[table.address].models, "way": repr(way_of(table))}

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


def _note(table: SystemTable, routers: Mapping[str, Reached]) -> str:
    if not table.address:
        return ""
    return f"asked of {table.address}, checkpoint {routers[table.address].models['checkpoint']}"


@asynccontextmanager
async def _nobody() -> AsyncIterator[None]:
    yield None
