"""The lab's reward model: learnt from gold answers beside wrong ones, the same for the same seed, asked in suites."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.findings import ALL
from evaluation.judged import JudgedText, Opinion
from evaluation.lab.asking import SeedFolder
from evaluation.lab.collab import COLLAB, LabCodec, collab_questions, is_collab_known, read_collab
from evaluation.lab.plan import CDPO, PLANS, SFT
from evaluation.lab.results import findings_of, gather
from evaluation.lab.systems import FUSIONROUTE, SeedRecords
from evaluation.questions import Answer, Question, Verdict
from evaluation.systems.rewards import Candidate, ModelReward
from evaluation.systems.ways import ROUTING_ONLY, SUM, expert_ways
from fusionroute.lab.tokenizer import build_tokenizer, encode
from trainer.lab_family.build import Family
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe, Stage
from trainer.lab_family.reward import bradley_terry, train_reward
from trainer.lab_family.router_stage import pair_items
from trainer.lab_family.training import new_model, seed_torch

FEW = Stage(1, 4, 1e-3)
RECIPE = Recipe(16, 1, 2, 24, FEW, FEW, 4, FEW, FEW, 60, FEW, 1)
STAGE = Stage(60, 16, 1e-2, warmup_steps=2)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Experts that know nothing: all that they write is wrong."""
    folder = tmp_path_factory.mktemp("lab") / "family"
    seed_torch("here")
    for name in ("base", *(f"experts/{slot}" for slot in EXPERT_SLOTS)):
        new_model(RECIPE).save_pretrained(folder / name)
    (folder / "facts.json").write_text(json.dumps({"recipe": RECIPE.to_json(), "seed": 3, "size": "tiny"}))
    (folder / "data").mkdir()
    row = {"prompt": "7+4 kg=", "chosen": "11 kg", "rejected": "11 ju"}
    (folder / "data" / "pairs.jsonl.gz").write_bytes(gzip.compress((json.dumps(row) + "\n").encode()))
    return Family.at(folder)


@pytest.mark.whole
def test_it_is_the_same_for_the_same_seed(family: Family, tmp_path: Path):
    few = replace(STAGE, num_steps=3)
    facts = [train_reward(family, tmp_path / name, lambda step, loss: None, few) for name in ("one", "two")]
    assert facts[0]["loss"] == facts[1]["loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


@pytest.mark.whole
def test_it_likes_right_answers_better(family: Family, tmp_path: Path):
    facts = train_reward(family, tmp_path / "one", lambda step, loss: None, STAGE)
    assert facts["num_pairs"] > 40 and facts["loss"] < 0.5 and facts["held_back_right"] > 0.7
    reward = ModelReward.load(tmp_path / "one")
    items = pair_items(RECIPE, 3)[:20]
    num_right = 0
    for item in items:
        question = Question("q", item.task, item.prompt)
        both = [Candidate(item.answer, True), Candidate("ZZZZZZZZZZZZZZZZZZZZZZZZ", False)]
        right, wrong = reward.rewards(question, both)
        assert [right] == pytest.approx(reward.rewards(question, both[:1]), abs=1e-5), (
            "padding changes nothing"
        )
        num_right += right > wrong
    assert num_right > 15


def test_the_loss_is_of_the_difference():
    margins = torch.tensor([0.0, 2.0])
    assert bradley_terry(margins).item() == pytest.approx((0.693147 + 0.126928) / 2, abs=1e-5)


def test_the_labs_characters_are_its_tokenizers():
    question = Question("q", "t", "pls 12-5= [A] ü")
    assert LabCodec().encode(question) == build_tokenizer()("pls 12-5= [A] ü")["input_ids"]
    ids = [*encode("7, ok?"), 1, 0]
    assert LabCodec().decode(ids) == build_tokenizer().decode(ids, skip_special_tokens=True) == "7, ok?"


def test_suites_ask_it_some_questions_of_each_task_and_know_when_they_have(tmp_path: Path):
    plan = replace(PLANS["lab"], per_task=20, per_task_written=15)
    questions = plan.questions()
    place = SeedFolder(tmp_path, plan, questions, {COLLAB: "here"})
    asked = collab_questions(place)
    assert len(asked) == 10 * 23
    assert {each.id for each in asked} < {each.id for each in plan.written(questions)}
    assert not is_collab_known(place)
    entry = {"text": "7", "complete": True, "tokens": 2, "logprob": None, "experts": ["math", "format"]}
    lines = [{"id": each.id, **entry, "score": 1.0, "note": "", "parts": {}} for each in asked]
    place.written(COLLAB).write_text("{}\n" + "".join(json.dumps(line) + "\n" for line in lines))
    assert is_collab_known(place)
    heard = read_collab(place)[COLLAB]
    assert heard[asked[0].id] == (Answer("7", True, 2, None, ("math", "format")), Verdict(1.0))
    none_written = SeedFolder(tmp_path, PLANS["lab-ablations"], questions, {})
    assert is_collab_known(none_written) and read_collab(none_written) == {}


def test_findings_compare_it_on_what_it_was_asked():
    plan = replace(PLANS["lab-quick"], per_task=8, per_task_seen=0, variants=())
    questions = plan.questions()
    ids = (5, 1)
    opinion = Opinion(ids, (-0.1, -0.1), ("math", "math"))
    ways = [*(way.name for way in expert_ways(EXPERT_SLOTS)), ROUTING_ONLY.name, SUM.name]
    judged = {each.id: JudgedText(ids, dict.fromkeys(ways, opinion)) for each in questions}
    wrong = (Answer("?", True, 2, None, ("math", "format")), Verdict(0.0))
    some = {each.id: wrong for each in plan.written(questions)}
    records = SeedRecords(0, EXPERT_SLOTS, {SFT: judged, CDPO: judged}, unjudged={COLLAB: some})
    findings = findings_of(plan, questions, [records], gather(questions, [records]), [], {})
    (cell,) = [each for each in findings.cells if each.system == COLLAB and each.stratum == ALL]
    assert (cell.num_questions, cell.estimate.value) == (23 * plan.per_task_written, 0.0)
    (found,) = [each for each in findings.comparisons if each.second == COLLAB and each.stratum == ALL]
    assert (found.first, found.num_questions, found.difference.value) == (FUSIONROUTE, len(some), 1.0)
    assert [note.kind for note in findings.systems if note.name == COLLAB] == ["served"]
