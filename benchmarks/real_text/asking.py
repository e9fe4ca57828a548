"""Every system's view of the held-out texts: of routers and experts over the running services, of models in folders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.real_text.models import Family, write_rows
from benchmarks.real_text.sizes import EXPERTS
from evaluation.journal import Journal
from evaluation.judged import JudgedText, Opinion
from evaluation.questions import Outcome, digest_of
from evaluation.running import ask_all
from evaluation.suites.texts import Text, load_texts, outcome_of
from evaluation.systems.judging import RouterJudge
from evaluation.systems.models import ModelFolder
from evaluation.systems.ways import ENSEMBLE, GATED, PROXY, ROUTER_ALONE, ROUTING_ONLY, SUM, Way, expert_ways
from fusionroute.client import RouterClient

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_SLOT = "base"
NUM_CONCURRENT = 8
RULES = (SUM, *GATED, ROUTING_ONLY, ROUTER_ALONE, PROXY)
ALONE = expert_ways(EXPERTS)
WAYS: Mapping[str, Sequence[Way]] = {
    "sft": (*ALONE, ENSEMBLE, *RULES),
    "mixture_sft": (SUM, *GATED, ROUTING_ONLY, ROUTER_ALONE),
    "cdpo": RULES,
}
"""What each router checkpoint is asked for."""
ORACLE, ORACLE_TEXT = "oracle/token", "oracle/text"

Serve = Callable[[Path, Mapping[str, Path]], AbstractContextManager[str]]
"""Router checkpoint and models by slot, `BASE_SLOT` among them; gives the router's address."""

Judged = Mapping[str, JudgedText]
"""By id of the text."""


@contextmanager
def serve_processes(checkpoint: Path, models: Mapping[str, Path]) -> Iterator[str]:
    """The stack as plain processes, as `fusionroute up` starts them. Raises Failure: it does not start."""
    from fusionroute.cli.stack import temporary_stack
    from fusionroute.local_stack import StackPlan

    plan = StackPlan(
        router_checkpoint=str(checkpoint),
        experts={slot: str(path) for slot, path in models.items()},
        base_slot=BASE_SLOT,
        port=0,
        isolated=True,
    )
    with temporary_stack(plan) as (state, _):
        yield state.router_address


def held_out_texts(family: Family, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """As token ids, with what decides statistics: domain and document."""
    found: list[Text] = []
    for domain, rows in family.texts.held_out.items():
        path = family.folder / "held_out" / f"{domain}.jsonl"
        write_rows(path, [row.to_json() for row in rows])
        found += load_texts(path, domain, tokenizer, max_tokens=family.sizes.max_tokens)
    return found


def judge_all(
    family: Family, texts: Sequence[Text], serve: Serve, *, phase_two: bool = True
) -> dict[str, Judged]:
    """By router checkpoint and model; trains phase II between, since its pairs come from the router that serves.

    Raises:
        FusionRouteError: as services and jobs do.
    """
    found = {}
    for name, folder in family.models.items():
        _judge_model(family, name, folder, texts)
        found[name] = _read(family, name)
    models = {**family.experts, BASE_SLOT: family.base}
    checkpoints = {"sft": family.sft, "mixture_sft": family.mixture_sft}
    if phase_two:
        checkpoints["cdpo"] = family.cdpo
    for name, checkpoint in checkpoints.items():
        if name == "cdpo":
            family.train_cdpo()
        wants_pairs = phase_two and name == "sft" and not family.pairs.exists()
        if wants_pairs or not _is_known(family, name, texts):
            with serve(checkpoint, models) as address:
                asyncio.run(_judge_router(family, name, address, texts))
                family.tell(f"judged: {name}")
                if wants_pairs:
                    family.collect_pairs(address)
        found[name] = _read(family, name)
    return found


def outcomes_of(judged: Mapping[str, Judged], texts: Sequence[Text], seed: int) -> Iterator[Outcome]:
    """One for each system and text; systems are named as in "sft/sum", experts and models by themselves."""
    for text in texts:
        id_ = text.question.id
        for checkpoint in (each for each in WAYS if each in judged):
            for way in WAYS[checkpoint]:
                outcome = outcome_of(text, judged[checkpoint][id_], way.name, seed)
                yield replace(outcome, system=system_name(checkpoint, way))
        for name in (each for each in judged if each not in WAYS):
            yield outcome_of(text, judged[name][id_], name, seed)
        chosen = {ORACLE: by_token(judged["sft"][id_]), ORACLE_TEXT: by_text(judged["sft"][id_])}
        oracles = JudgedText(text.ids, chosen)
        for name in oracles.opinions:
            yield outcome_of(text, oracles, name, seed)


def system_name(checkpoint: str, way: Way) -> str:
    """Experts and their mean are the same whatever router serves."""
    return way.name if way in ALONE or way is ENSEMBLE else f"{checkpoint}/{way.name}"


def by_token(judged: JudgedText) -> Opinion:
    """At each token the expert that finds the right one most probable."""
    opinions = [judged.opinions[way.name] for way in ALONE]
    best = [
        max(range(len(opinions)), key=lambda number: opinions[number].logprobs[place])
        for place in range(len(judged.ids))
    ]
    return Opinion(
        tuple(opinions[number].best_ids[place] for place, number in enumerate(best)),
        tuple(opinions[number].logprobs[place] for place, number in enumerate(best)),
        tuple(EXPERTS[number] for number in best),
    )


def by_text(judged: JudgedText) -> Opinion:
    """The expert that finds the whole text most probable."""
    return max((judged.opinions[way.name] for way in ALONE), key=lambda opinion: sum(opinion.logprobs))


async def _judge_router(family: Family, name: str, address: str, texts: Sequence[Text]) -> None:
    by_id = {text.question.id: text for text in texts}
    async with RouterClient.open(address) as router:
        judge = RouterJudge(
            router, WAYS[name], lambda asked: (by_id[asked.id].prompt_ids, by_id[asked.id].ids)
        )
        with Journal.open(_path(family, name), _what(name, texts)) as journal:
            await ask_all(
                [text.question for text in texts], judge.ask, journal, num_concurrent=NUM_CONCURRENT
            )


def _judge_model(family: Family, name: str, folder: Path, texts: Sequence[Text]) -> None:
    if _is_known(family, name, texts):
        return
    by_id = {text.question.id: text for text in texts}
    questions = [text.question for text in texts]
    model = ModelFolder.load(name, folder)
    found = model.judge(questions, lambda asked: (by_id[asked.id].prompt_ids, by_id[asked.id].ids))
    with Journal.open(_path(family, name), _what(name, texts)) as journal:
        for question, judged in zip(questions, found, strict=True):
            journal.add(question.id, judged.to_json())


def _is_known(family: Family, name: str, texts: Sequence[Text]) -> bool:
    path = _path(family, name)
    return path.exists() and Journal.read(path).keys() >= {text.question.id for text in texts}


def _read(family: Family, name: str) -> Judged:
    return {id_: JudgedText.from_json(entry) for id_, entry in Journal.read(_path(family, name)).items()}


def _path(family: Family, name: str) -> Path:
    return family.folder / "answers" / f"{name}.jsonl"


def _what(name: str, texts: Sequence[Text]) -> dict[str, object]:
    ways = [way.name for way in WAYS.get(name, ())]
    return {"who": name, "ways": ways, "texts": digest_of(text.question for text in texts)}
