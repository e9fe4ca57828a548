"""On-policy preference pairs: wrong answers of the serving router itself as rejected ones, gold answers as chosen.

Or, off-policy, wrong answers of a single model behind somebody else's server (`remote`).

every prompt ── greedy ──> wrong: a pair
                   └─────> right ── a few samples ──> one wrong: a pair
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from fusionroute.background import end_task
from fusionroute.client import RouterClient
from fusionroute.errors import InvalidRequest, ModelRejected, Reason, TrainingFailed, invalid
from fusionroute.remote_models import RemoteApi, RemoteModel
from fusionroute.router_model import COMPLETE_FILE
from fusionroute.vocabulary import load_tokenizer, tokenizer_fingerprint
from trainer.answering import Answer, Answerer, Ending, RemoteAnswerer, ServedAnswerer
from trainer.config import PairsJob
from trainer.data import GoldPrompt, load_prompts
from trainer.pace import Pace
from trainer.pair_journal import Journal, Outcome, Verdict
from trainer.remote_table import RemoteTable
from trainer.run_context import RunContext, RunProgress, RunResult
from trainer.verifiers import VERIFIERS

if TYPE_CHECKING:
    from fusionroute.v1.router_pb2 import GetRouterInfoResponse

STAGE = "pairs"
WRITTEN_FILE = "written.sha256"
STOP_POLL_SECONDS = 0.1
_REPLACEMENT = "\ufffd"

log = structlog.get_logger(__name__)


def collect_pairs(config: PairsJob, context: RunContext) -> RunResult:
    """Asks the router, or the remote model, every prompt and writes the pairs to `config.output`.

    What was asked before is not asked again.

    Returns:
        The file, and as metrics how many prompts came to what; with experts also the pairs' bias.

    Raises:
        InvalidRequest: DATA_INVALID, or INVALID_FIELD: the output exists already, or is no JSONL file.
        TrainingFailed: CHECKPOINT_CHANGED, the router began to serve another one meanwhile; DATA_INVALID, no pair.
        FusionRouteError: as the router means it.
        Stopped: the context asked for it.
    """
    context.folder.mkdir(parents=True, exist_ok=True)
    _check_output(config.output, context.folder)
    prompts, outcomes, folder = asyncio.run(_ask(config, context))
    rows = list(pair_rows(prompts, outcomes))
    facts: dict[str, Any] = dict(summary(outcomes))
    log.info("pairs_collected", output=str(config.output), **facts)
    if not rows:
        raise TrainingFailed(
            Reason.DATA_INVALID, f"none of {len(prompts)} prompts gave a wrong answer: {facts}"
        )
    write_rows(rows, config.output, context.folder)
    if config.experts:
        from trainer.pair_review import review_pairs

        facts |= {"bias": review_pairs(config, folder, context)}
    return RunResult(config.output, is_checkpoint=False, metrics=facts)


async def _ask(config: PairsJob, context: RunContext) -> tuple[list[GoldPrompt], dict[int, Outcome], Path]:
    """The prompts, what became of each, and the folder of the checkpoint that they are for."""
    if config.remote is not None:
        return await _ask_remote(config, config.remote, context)
    async with RouterClient.open(config.router) as router:
        info = await router.info()
        folder = checkpoint_folder(config, info)
        prompts = await asyncio.to_thread(_prompts, config, folder, info, context)
        answerer = ServedAnswerer(router, config.combine, config.max_new_tokens)
        return prompts, await _ask_and_note(prompts, answerer, config, info.checkpoint, context), folder


async def _ask_remote(
    config: PairsJob, remote: RemoteTable, context: RunContext
) -> tuple[list[GoldPrompt], dict[int, Outcome], Path]:
    """As `_ask`, of somebody else's server; the checkpoint's tokenizer only says which prompts are too long."""
    folder = _readable_checkpoint(
        config.checkpoint, "a folder, readable here, of the checkpoint that the pairs are for"
    )
    prompts = await asyncio.to_thread(load_prompts, config.data, load_tokenizer(str(folder)), context)
    api = None if remote.api == "auto" else RemoteApi(remote.api)
    async with RemoteModel.open(
        remote.url, api=api, model=remote.model, api_key_file=remote.api_key_file
    ) as model:
        log.info("pairs_from_remote", url=model.url, api=model.api.value, model=model.name)
        answerer = RemoteAnswerer(model, config.max_new_tokens)
        return prompts, await _ask_and_note(prompts, answerer, config, model.identity, context), folder


async def _ask_and_note(
    prompts: Sequence[GoldPrompt], answerer: Answerer, config: PairsJob, writer: str, context: RunContext
) -> dict[int, Outcome]:
    """What became of each prompt, by the journal where it says so already; `writer` names whose answers they are."""
    header = {"format": "1", "asked": _digest(config, prompts), "checkpoint": writer}
    with Journal.open(context.folder, header) as journal:
        await ask_all(prompts, answerer, config, writer, journal, context)
        return journal.outcomes


async def ask_all(
    prompts: Sequence[GoldPrompt],
    answerer: Answerer,
    config: PairsJob,
    checkpoint: str,
    journal: Journal,
    context: RunContext,
) -> None:
    """Asks every prompt that the journal does not know of, `config.concurrency` at a time, and notes the outcomes.

    Args:
        checkpoint: fingerprint of the one that must have written every answer.

    Raises:
        TrainingFailed: CHECKPOINT_CHANGED.
        Stopped: the context asked for it; running answers are broken off.
    """
    waiting = iter([number for number in range(len(prompts)) if number not in journal.outcomes])
    pace = Pace(context, STAGE, len(prompts), len(journal.outcomes))

    async def work() -> None:
        for number in waiting:
            outcome = await judge(number, prompts[number], answerer, config, checkpoint)
            journal.add(number, outcome)
            pace.advance(metrics=summary(journal.outcomes))

    tasks = [asyncio.create_task(work()) for _ in range(config.concurrency)]
    running = set(tasks)
    try:
        while running:
            done, running = await asyncio.wait(
                running, timeout=STOP_POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                task.result()
            context.stop.check()
    finally:
        await asyncio.gather(*(end_task(task) for task in tasks))
    context.report(RunProgress(STAGE, len(prompts), len(prompts), metrics=summary(journal.outcomes)))


async def judge(
    number: int, prompt: GoldPrompt, answerer: Answerer, config: PairsJob, checkpoint: str
) -> Outcome:
    """What becomes of one prompt: its greedy answer, and where that is right samples until one is wrong."""
    for attempt in range(1 + config.samples):
        temperature = config.temperature if attempt else 0.0
        answer = await answerer.answer(prompt, temperature, seed_of(config.seed, number, attempt))
        if answer.ending is not Ending.REFUSED and answer.checkpoint != checkpoint:
            raise TrainingFailed(
                Reason.CHECKPOINT_CHANGED,
                f"the router serves checkpoint {answer.checkpoint} since another was promoted; the pairs so far are "
                f"of {checkpoint}: start again to collect them from the new one",
            )
        verdict = judged(answer, prompt.gold, config.verifier)
        if verdict is Verdict.GREEDY_WRONG and attempt:
            verdict = Verdict.SAMPLE_WRONG
        if verdict in (Verdict.GREEDY_WRONG, Verdict.SAMPLE_WRONG):
            return Outcome(verdict, answer.text, answer.ending is Ending.ENDED)
        if verdict is Verdict.UNUSABLE and not attempt:
            return Outcome(verdict)
    return Outcome(Verdict.RIGHT)


def judged(answer: Answer, gold: str, verifier: str) -> Verdict:
    """RIGHT, GREEDY_WRONG, or UNUSABLE: empty, not to be written back as text, or the gold text without its end.

    An answer that was cut off is judged by what it says so far; to be exactly right it must have ended too.
    """
    text = answer.text
    if answer.ending is Ending.REFUSED or not text.strip() or _REPLACEMENT in text:
        return Verdict.UNUSABLE
    if VERIFIERS[verifier](text, gold):
        is_right = answer.ending is Ending.ENDED or verifier != "exact"
        return Verdict.RIGHT if is_right else Verdict.UNUSABLE
    return Verdict.GREEDY_WRONG


def seed_of(seed: int, number: int, attempt: int) -> int:
    """The seed of one answer: 64 bits, apart for each prompt and attempt."""
    digest = hashlib.sha256(f"{seed}:{number}:{attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def summary(outcomes: dict[int, Outcome]) -> dict[str, float]:
    """How many prompts came to what; `cut` of the rejected answers did not end by themselves."""
    counts = Counter(outcome.verdict for outcome in outcomes.values())
    wrong, sampled = counts[Verdict.GREEDY_WRONG], counts[Verdict.SAMPLE_WRONG]
    return {
        "asked": len(outcomes),
        "pairs": wrong + sampled,
        "greedy_wrong": wrong,
        "sampled_wrong": sampled,
        "right": counts[Verdict.RIGHT],
        "unusable": counts[Verdict.UNUSABLE],
        "cut": sum(not outcome.ended for outcome in outcomes.values()),
    }


def pair_rows(prompts: Sequence[GoldPrompt], outcomes: dict[int, Outcome]) -> Iterator[dict[str, Any]]:
    """The pairs in TRL's format, in the order of the prompts; conversational where the prompt is."""
    for number, prompt in enumerate(prompts):
        outcome = outcomes[number]
        if not outcome.rejected:
            continue
        chosen, rejected = prompt.gold, outcome.rejected
        is_text = isinstance(prompt.prompt, str)
        row: dict[str, Any] = {
            "prompt": prompt.prompt if is_text else list(prompt.prompt),
            "chosen": chosen if is_text else [{"role": "assistant", "content": chosen}],
            "rejected": rejected if is_text else [{"role": "assistant", "content": rejected}],
            "source": outcome.verdict.value,
        }
        if not outcome.ended:
            row["rejected_ended"] = False
        yield row


def write_rows(rows: Sequence[dict[str, Any]], output: Path, folder: Path) -> None:
    """Writes the file whole or not at all. Raises InvalidRequest when another file lies there."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    data = gzip.compress(text, mtime=0) if output.suffix == ".gz" else text
    (folder / WRITTEN_FILE).write_text(hashlib.sha256(data).hexdigest(), encoding="utf-8")
    _check_output(output, folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.draft")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)


def checkpoint_folder(config: PairsJob, info: GetRouterInfoResponse) -> Path:
    """Where the checkpoint that the router serves can be read.

    Raises:
        InvalidRequest: the folder that is configured, or that the router names, is no checkpoint here.
    """
    limit = "a folder, readable here, of the checkpoint that the router serves"
    return _readable_checkpoint(config.checkpoint or info.model.name, limit)


def _readable_checkpoint(name: str, limit: str) -> Path:
    folder = Path(name).expanduser()
    if not name or not (folder / COMPLETE_FILE).is_file():
        raise invalid("checkpoint", name, limit)
    return folder


def _prompts(
    config: PairsJob, folder: Path, info: GetRouterInfoResponse, context: RunContext
) -> list[GoldPrompt]:
    tokenizer = load_tokenizer(str(folder))
    mine, theirs = tokenizer_fingerprint(tokenizer), info.model.tokenizer_fingerprint
    if mine != theirs:
        raise ModelRejected(
            Reason.VOCABULARY_MISMATCH,
            f"tokenizer of checkpoint {str(folder)!r} has fingerprint {mine}, that of the router {theirs}",
        )
    return load_prompts(config.data, tokenizer, context)


def _digest(config: PairsJob, prompts: Sequence[GoldPrompt]) -> str:
    """Of everything on which outcomes depend, but for the checkpoint."""
    wanted = config.model_dump(
        mode="json", include={"combine", "max_new_tokens", "samples", "temperature", "seed", "verifier"}
    )
    hasher = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode())
    for prompt in prompts:
        hasher.update(json.dumps([prompt.prompt_ids, prompt.gold]).encode())
    return hasher.hexdigest()[:32]


def _check_output(output: Path, folder: Path) -> None:
    if output.suffixes[-1:] != [".jsonl"] and output.suffixes[-2:] != [".jsonl", ".gz"]:
        raise invalid("output", str(output), "a name that ends in .jsonl or .jsonl.gz")
    if not output.exists():
        return
    written = folder / WRITTEN_FILE
    is_ours = (
        written.exists() and written.read_text("utf-8") == hashlib.sha256(output.read_bytes()).hexdigest()
    )
    if not is_ours:
        raise InvalidRequest(
            Reason.INVALID_FIELD, f"output = {str(output)!r} exists already; it is not overwritten"
        )
