"""The real-text study on made-up texts: from nothing to the page, served in one process, and its parts."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.real_text.asking import ALONE, BASE_SLOT, by_text, by_token
from benchmarks.real_text.made_up import MadeUp
from benchmarks.real_text.page import MARKS
from benchmarks.real_text.running import Plan, run_all
from benchmarks.real_text.sizes import ASKED, EXPERTS, GAP, QUICK, UNSEEN
from benchmarks.real_text.stories import FOLDER, read_model, read_tokenizer
from benchmarks.real_text.texts import texts_of
from evaluation.findings import ALL, NLL
from evaluation.judged import JudgedText, Opinion
from evaluation.report.encoding import read_findings
from tests.served_stack import Family, served

READY_SECONDS = 60.0


@contextmanager
def serve_here(checkpoint: Path, models: Mapping[str, Path]) -> Iterator[str]:
    """Services of this process on a loop of their own."""
    addresses: list[str] = []
    up, done = threading.Event(), threading.Event()

    async def run() -> None:
        async with served(Family(checkpoint, dict(models)), base_slot=BASE_SLOT) as stack:
            addresses.append(stack.router.server.address)
            up.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert up.wait(READY_SECONDS)
        yield addresses[0]
    finally:
        done.set()
        thread.join()


@pytest.mark.whole
def test_one_command_goes_from_nothing_to_a_page_and_takes_up_what_it_has(tmp_path: Path) -> None:
    plan = Plan(MadeUp(), QUICK, (1,), tmp_path / "work", serve=serve_here)
    page = run_all(plan, tmp_path / "out")
    findings = read_findings(page.with_suffix(".json"))
    loss = {
        cell.system: cell.estimate.value
        for cell in findings.cells
        if (cell.stratum, cell.measure) == (ALL, NLL)
    }
    assert loss["oracle/token"] < loss["oracle/text"] <= min(loss[way.name] for way in ALONE)
    assert loss["cdpo/sum"] != loss["sft/sum"] != loss["sft/router"]
    assert set(findings.divisions["task"]) == set(ASKED)

    def nothing(checkpoint: Path, models: Mapping[str, Path]) -> Iterator[str]:
        raise AssertionError("nothing is served where all is known")

    words = f"my words\n{MARKS[0]}\nold\n{MARKS[1]}\nmore words\n"
    before = page.read_text()
    page.write_text(words)
    again = run_all(replace(plan, serve=nothing), tmp_path / "out")  # type: ignore[arg-type]
    assert again.read_text() == before.replace(MARKS[0], f"my words\n{MARKS[0]}", 1) + "more words\n"
    with pytest.raises(ValueError, match="other sizes"):
        run_all(replace(plan, sizes=replace(QUICK, gate_steps=5)), tmp_path / "out")


def test_nobody_sees_a_row_of_somebody_else_and_no_expert_sees_a_gap(tmp_path: Path) -> None:
    source = MadeUp()
    source.save_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    one, other = (texts_of(source, QUICK, seed, tokenizer) for seed in (1, 2))
    groups = [*one.experts.values(), one.router, one.pairs, *one.held_out.values()]
    rows = [row for group in groups for row in group]
    assert len(rows) == len(set(rows))
    assert one.held_out == other.held_out and one.router != other.router
    letters = {
        domain: set("".join(row.prompt for row in one.held_out[domain])) - {"\n"} for domain in (GAP, UNSEEN)
    }
    learnt = set("".join(row.prompt + row.answer for rows in one.experts.values() for row in rows))
    assert not letters[GAP] & learnt and not letters[UNSEEN] & learnt
    of_router = set("".join(row.prompt for row in one.router))
    assert letters[GAP] <= of_router and not letters[UNSEEN] & of_router
    switching = one.held_out["mixed"][0]
    assert switching.prompt not in {
        row.prompt for rows in one.held_out.values() for row in rows if row != switching
    }


def test_oracles_take_the_surest_expert_of_a_token_or_of_a_text() -> None:
    logprobs = [(-1.0, -3.0), (-2.0, -1.0), (-4.0, -4.0)]
    judged = JudgedText(
        (7, 8),
        {
            way.name: Opinion((number, number), values, (slot, slot))
            for number, (way, slot, values) in enumerate(zip(ALONE, EXPERTS, logprobs, strict=True))
        },
    )
    assert by_token(judged) == Opinion((0, 1), (-1.0, -1.0), EXPERTS[:2])
    assert by_text(judged).logprobs == (-2.0, -1.0)


@pytest.mark.data
def test_the_imported_base_says_what_an_independent_forward_pass_says() -> None:
    folder = os.environ.get("FUSIONROUTE_DATA_DIR")
    if not folder:
        pytest.skip("FUSIONROUTE_DATA_DIR is not set")
    source = Path(folder) / FOLDER
    oracle = json.loads((source / "oracle.json").read_text())
    oracle = oracle[0] if isinstance(oracle, list) else oracle
    tokenizer = read_tokenizer(source / "tok512.bin")
    assert tokenizer(oracle["probe_text"])["input_ids"] == oracle["probe_ids"]
    assert tokenizer.decode(oracle["probe_ids"], skip_special_tokens=True) == oracle["probe_text"]
    assert tokenizer.decode(tokenizer("x:\n  é")["input_ids"], skip_special_tokens=True) == "x:\n  é"
    ids = torch.tensor([oracle["probe_ids"]])
    with torch.no_grad():
        rows = read_model(source / "stories260K.bin")(ids).logits[0]
    losses = -rows[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert losses.tolist() == pytest.approx(oracle["probe_nll_per_token"], abs=2e-4)
    best = rows[-1].topk(3)
    assert best.indices.tolist() == [token for token, _ in oracle["probe_last_top10"][:3]]
    assert best.values.tolist() == pytest.approx(
        [score for _, score in oracle["probe_last_top10"][:3]], abs=1e-3
    )
