"""Judges before LLMBar and HH-RLHF, read from FUSIONROUTE_DATA_DIR: a taste for length is found out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evaluation.judging.journal import JudgingJournal
from evaluation.judging.pairs import read_labelled_pairs
from evaluation.judging.report import JudgingReport, report_of
from evaluation.judging.running import Plan, judge_pairs
from fusionroute.remote_models import RemoteApi, RemoteModel
from tests.judging_fakes import FakeJudge, serving

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def data() -> Path:
    named = os.environ.get("FUSIONROUTE_DATA_DIR")
    if not named:
        pytest.skip("FUSIONROUTE_DATA_DIR names no folder of benchmarks")
    return Path(named)


async def calibrated(file: Path, folder: Path) -> JudgingReport:
    """A judge that prefers the longer answer."""
    read = read_labelled_pairs(file)
    plan = Plan(num_concurrent=4)
    with serving(FakeJudge()) as url:
        async with RemoteModel.open(url, api=RemoteApi.OPENAI) as model:
            with JudgingJournal.open(folder / "j.jsonl", plan.facts(model, read.pairs)) as journal:
                await judge_pairs(model, read.pairs, plan, journal, lambda *_: None)
            return report_of(
                read.pairs,
                journal.judgements,
                plan,
                judge=model.identity,
                names=("the better answer", "the worse one"),
                is_calibration=True,
                num_left_out=read.num_unlabelled,
            )


async def test_length_is_no_guide_to_llmbars_adversarial_pairs(data, tmp_path):
    report = await calibrated(data / "llmbar" / "pairs.jsonl.gz", tmp_path)
    assert report.total.num_verdicts + report.num_left_out == 885
    assert report.behaviour.num_unparsable == 0
    by_group = {each.group: each.right for each in report.groups}
    assert by_group["Processed/MT-Bench"].low > 0.5
    for name in ("Neighbor", "GPTInst", "Manual"):
        assert by_group[f"LLMBar/Adversarial/{name}"].high < 0.5


def test_hh_rlhf_is_read_whole(data):
    read = read_labelled_pairs(data / "hh_harmless" / "test_pairs.jsonl.gz")
    assert len(read.pairs) + read.num_left_out == 2308
