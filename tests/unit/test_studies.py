"""Studies: bad experts are bad, halves are halves, chances are those of drawing, and pages keep people's words."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from random import Random

import numpy as np
import pytest
import torch

from benchmarks.studies import plan
from benchmarks.studies.__main__ import NAMES
from benchmarks.studies.catalogue import BAD, STUDIES
from benchmarks.studies.experts import HALVES, add_noise, half_row, lie, text_of
from benchmarks.studies.judging import Judge, drawn_shares, fused_rows, item_scores
from benchmarks.studies.page import write_page
from benchmarks.studies.picture import write_picture
from benchmarks.studies.plan import Cdpo, Extended, Level, Panel, Sft, Study
from benchmarks.studies.results import judge_seed, results_of
from benchmarks.studies.running import recipe_of
from benchmarks.studies.workshop import TEXTS, Workshop
from fusionroute.lab.tasks import DOMAIN_TASKS, Payloads, Split, evaluation_items, make_item
from fusionroute.lab.tokenizer import build_tokenizer
from fusionroute.router_model import Heads, load_checkpoint
from fusionroute.sampling import Sampling, pick
from trainer.lab_beyond.first_choices import gold_of
from trainer.lab_family.build import Family
from trainer.lab_family.quality import fused_choices, row_set
from trainer.lab_family.recipe import EXPERT_SLOTS
from trainer.lab_family.router_stage import write_rows
from trainer.lab_family.training import new_model

PER_TASK = 2
TWO = Sft(("strings", "format"))
SMALL = Study(
    name="small",
    title="A small study",
    question="Does it run?",
    levels=(
        Level("1/2", "half", {"sft": TWO, "cdpo": Cdpo(TWO)}),
        Level("noisy", "noisy", {"sft": TWO}, {"strings": "strings~0.5"}),
        Level("added", "added", {"sft": Extended(TWO)}),
    ),
    lines=("sft/sum", "cdpo/sum", "sft/router"),
    panels=(Panel("gap tasks", "coverage=gap", ("1/2", "noisy", "added"), "experts"),),
    baseline="1/2",
)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A family that knows nothing and has no routers yet."""
    folder, recipe = tmp_path_factory.mktemp("studies") / "quick-1", recipe_of("quick")
    experts = {slot: folder / "experts" / slot for slot in EXPERT_SLOTS}
    for place, target in enumerate([folder / "base", *experts.values()]):
        torch.manual_seed(place)
        new_model(recipe).save_pretrained(target)
        build_tokenizer().save_pretrained(target)
    items = evaluation_items(Split.TRAIN, per_task=1)
    rows = [{"prompt": item.prompt, "completion": item.answer} for item in items]
    write_rows(folder / TEXTS, rows)
    facts = {"seed": 1, "recipe": recipe.to_json()}
    return Family(
        folder, folder / "base", experts, folder / "router_sft", folder / "router", folder / "data", facts
    )


def heads(num_experts, hidden_size):
    """Random routing head and gates."""
    rows = {"routing": num_experts, "gate": num_experts + 1, "sum_gate": 1}
    values: dict[str, torch.Tensor] = {}
    for name, count in rows.items():
        values |= {f"{name}_weight": torch.randn(count, hidden_size), f"{name}_bias": torch.randn(count)}
    return Heads(**values)


def test_a_lie_is_wrong_and_always_the_same():
    random = Random("lies")
    for task in [task for tasks in DOMAIN_TASKS.values() for task in tasks]:
        for _ in range(40):
            item = make_item(task, Payloads(random, Split.TRAIN))
            if item.answer == "".join(sorted(item.answer)) and task in ("rev", "sort", "up"):
                continue  # of four letters in order, several operations make the same
            told = lie(item)
            assert told.prompt == item.prompt and len(told.owners) == len(told.answer)
            assert told.answer not in (item.answer, ""), item
            assert lie(item) == told


@pytest.mark.parametrize(("one", "other"), [("add_sub", "mul"), ("rev_up", "sort"), ("box_ans", "two")])
def test_no_half_learns_the_other_halfs_work(one, other):
    for name, forbidden in ((one, other), (other, one)):
        make, random = half_row(HALVES[name]), Random(name)
        for _ in range(150):
            text = text_of(make(random).ids)
            assert HALVES[name].prompts.search(text)
            assert not HALVES[forbidden].prompts.search(text) or ";" in text, text


@pytest.mark.parametrize("drawing", [Sampling(temperature=0.5), Sampling(temperature=1.0, top_p=0.6)])
def test_chances_are_the_shares_that_the_product_draws(drawing):
    row = torch.from_numpy(np.random.default_rng(3).normal(0, 1.5, (1, 8))).float()
    chances, number = drawn_shares(row, drawing)[0].numpy(), 2000
    drawn = Counter(pick(row[0].numpy(), drawing, position) for position in range(number))
    for token, chance in enumerate(chances):
        room = 4.5 * np.sqrt(chance * (1 - chance) / number)
        assert abs(drawn[token] / number - chance) <= room, token


def test_nearly_no_temperature_is_the_best_token():
    rows = row_set(evaluation_items(per_task=3))
    gold = gold_of(rows)
    scores = torch.nn.functional.one_hot(gold, 65).float() + torch.rand(len(gold), 65) * 1.06
    greedy = item_scores(scores, gold, rows, Sampling())
    assert 0.1 < np.mean(greedy) < 0.9
    assert item_scores(scores, gold, rows, Sampling(temperature=1e-7)) == pytest.approx(greedy, abs=1e-3)
    first, last = next(pairwise(rows.target_starts))
    drawn = item_scores(scores, gold, rows, Sampling(temperature=1.0))
    assert drawn[0] == pytest.approx(
        float(torch.softmax(scores.double(), 1)[range(first, last), gold[first:last]].prod())
    )


def test_fused_rows_choose_what_the_labs_quality_chooses():
    torch.manual_seed(5)
    states, router, experts = torch.randn(300, 6), torch.randn(300, 9), torch.randn(3, 300, 9)
    given = heads(3, 6)
    expected = fused_choices(states, router, experts, given.tensors())
    rows, chosen = fused_rows(states, router, experts, given)
    for rule in ("sum", "route", "select", "mixture"):
        assert torch.equal(rows[rule].argmax(1), expected[rule]), rule
    assert torch.equal(rows["router"], router)
    assert set(chosen["select"].tolist()) == {0, 1, 2, 3}


def test_noise_is_of_the_size_that_is_asked_for():
    weights, scale = torch.randn(300, 300) * 0.2, torch.ones(300)
    before = weights.clone()
    add_noise({"matrix": weights, "norm": scale}, 0.0, "none")
    assert torch.equal(weights, before)
    add_noise({"matrix": weights, "norm": scale}, 0.5, "some")
    assert float((weights - before).std() / before.std()) == pytest.approx(0.5, rel=0.05)
    assert torch.equal(scale, torch.ones(300))


def test_every_study_says_what_its_panels_need():
    assert tuple(STUDIES) == NAMES
    for study in STUDIES.values():
        names = {level.name for level in study.levels}
        for panel in study.panels:
            assert set(panel.levels) <= names, study.name
            assert (study.baseline or panel.levels[0]) in panel.levels, study.name
        made = [plan.digest_of(router) for level in study.levels for router in level.phases.values()]
        assert all(len(digest) == 12 for digest in made)
    assert plan.experts_of(BAD.level("liar").phases["sft"]) == (*EXPERT_SLOTS, "liar")


@pytest.mark.whole
def test_a_router_of_other_texts_learns_them(family):
    workshop = Workshop(family, lambda told: None)
    told = []
    for router, count in ((Sft(num_items=9), 9), (Sft(gap_share=1.0), recipe_of("quick").num_router_items)):
        texts = workshop.router(router).parent / TEXTS
        told.append(gzip.decompress(texts.read_bytes()).decode().splitlines())
        assert len(told[-1]) == count
    assert not set(told[0]) & set(told[1])


@pytest.mark.whole
def test_a_study_trains_what_is_missing_once_and_keeps_what_people_wrote(family, tmp_path):
    told: list[str] = []
    items = evaluation_items(per_task=PER_TASK)
    workshop = Workshop(family, told.append)
    found = judge_seed(SMALL, Judge(workshop, items))
    assert [name.partition("-")[0] for name in told] == ["sft", "cdpo", "pairs", "expert", "extended"]
    assert judge_seed(SMALL, Judge(Workshop(family, told.append), items)) == found
    assert len(told) == 5
    extended = load_checkpoint(workshop.router(Extended(TWO)))
    assert [expert.slot for expert in extended.manifest.experts] == ["strings", "format", "math"]
    before = load_checkpoint(workshop.router(TWO)).heads.routing_weight
    assert torch.equal(extended.heads.routing_weight[:2], before)

    results = results_of(SMALL, PER_TASK, {1: found, 2: found})
    page = write_page(results, {"size": "quick"}, tmp_path)
    page.write_text(page.read_text().replace("Does it run?", "It does."))
    write_page(results, {"size": "quick"}, tmp_path)
    text = page.read_text()
    assert "It does." in text and "| noisy |" in text and "| half (baseline) |" in text
    assert text.count("not shown |") + text.count("** |") == 2  # the router alone is no rule to compare
    values = json.loads(page.with_suffix(".json").read_text())
    assert len(values["cells"]) == 7 and values["facts"]["seeds"] == [1, 2]
    assert write_picture(results, tmp_path).stat().st_size > 10_000
