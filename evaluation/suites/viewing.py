"""What everybody of a suite makes of its texts; what is known already is not asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.journal import Journal
from evaluation.judged import JudgedText
from evaluation.questions import Outcome, digest_of
from evaluation.running import ask_all
from evaluation.suites.config import Suite, SystemTable
from evaluation.suites.reached import Reached, way_of
from evaluation.suites.texts import Text, outcome_of
from evaluation.systems.judging import MOST_WAYS, EncodePair, RouterJudge
from evaluation.systems.models import ModelFolder
from fusionroute.errors import invalid

OnProgress = Callable[[str, int], None]
"""Told who is asked what, and how many more questions are done."""

KEPT_TEXTS = 64
"""Texts that a model reads before they are kept."""


async def view_texts(
    suite: Suite,
    texts: Sequence[Text],
    systems: Sequence[SystemTable],
    routers: Mapping[str, Reached],
    answers: Path,
    on_progress: OnProgress,
) -> list[Outcome]:
    """The texts as each served system and each model in a folder sees them; others show no probabilities.

    Args:
        routers: by address, "" for that of the suite.
        answers: folder of the journals.

    Raises:
        FusionRouteError: too many systems ask one router, a model has other tokens, or a service fails.
        ExceptionGroup: of what requests raised; what had come is kept.
    """
    views: list[Outcome] = []
    if not texts:
        return views
    for address, router in routers.items():
        served = [each for each in systems if each.kind == "served" and each.address == address]
        if served:
            views += await _by_router(suite, texts, served, router, answers, on_progress)
    for table in systems:
        if table.kind == "model":
            views += await asyncio.to_thread(_by_model, suite, texts, table, answers, on_progress)
    return views


async def _by_router(
    suite: Suite,
    texts: Sequence[Text],
    served: Sequence[SystemTable],
    router: Reached,
    answers: Path,
    on_progress: OnProgress,
) -> list[Outcome]:
    if len(served) > MOST_WAYS:
        raise invalid("systems", f"{len(served)} that one router serves", f"at most {MOST_WAYS} beside texts")
    ways = [way_of(table) for table in served]
    judge = RouterJudge(router.client, ways, _encoder(texts))
    at = f"@{router.address.replace('/', '+')}" if router.address else ""
    what = {"ways": [repr(way) for way in ways], "texts": _digest(texts), **router.models}
    with Journal.open(answers / f"texts{at}.jsonl", what) as journal:
        await ask_all(
            [text.question for text in texts],
            judge.ask,
            journal,
            num_concurrent=suite.concurrency,
            on_progress=lambda num_done: on_progress(f"{router.address or 'router'}: texts", num_done),
        )
        return [each for way in ways for each in _heard(texts, journal, way.name)]


def _by_model(
    suite: Suite, texts: Sequence[Text], table: SystemTable, answers: Path, on_progress: OnProgress
) -> list[Outcome]:
    what = {"kind": "model", "model": table.model, "texts": _digest(texts)}
    with Journal.open(answers / table.name.replace("/", "+") / "texts.jsonl", what) as journal:
        missing = [text for text in texts if text.question.id not in journal.entries]
        on_progress(f"{table.name}: texts", len(texts) - len(missing))
        if missing:
            model = _model(table, suite.tokenizer)
            for start in range(0, len(missing), KEPT_TEXTS):
                some = missing[start : start + KEPT_TEXTS]
                judged = model.judge([text.question for text in some], _encoder(some))
                for text, each in zip(some, judged, strict=True):
                    journal.add(text.question.id, each.to_json())
                on_progress(f"{table.name}: texts", len(some))
        return list(_heard(texts, journal, table.name))


def _model(table: SystemTable, tokenizer: str) -> ModelFolder:
    """Raises InvalidRequest: its tokens are not those of the texts."""
    from transformers import AutoTokenizer

    model = ModelFolder.load(table.name, Path(table.model))
    vocabulary: dict[str, Any] = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).get_vocab()
    if model.tokenizer.get_vocab() != vocabulary:
        raise invalid(
            f"systems.{table.name}.model",
            table.model,
            f"a model with the tokenizer of {tokenizer}: texts are judged token by token",
        )
    return model


def _encoder(texts: Sequence[Text]) -> EncodePair:
    by_id = {text.question.id: (text.prompt_ids, text.ids) for text in texts}
    return lambda question: by_id[question.id]


def _heard(texts: Sequence[Text], journal: Journal, way: str) -> Iterator[Outcome]:
    for text in texts:
        yield outcome_of(text, JudgedText.from_json(journal.entries[text.question.id]), way)


def _digest(texts: Sequence[Text]) -> str:
    return digest_of(text.question for text in texts)
