"""The lab's evaluation over running services: what it says is what the models do, and what is written agrees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
import pytest_asyncio

from evaluation.lab.asking import (
    SeedFolder,
    disagreements,
    is_known,
    judge_by_model,
    judge_by_router,
    read_seed,
    trace_examples,
    ways_of,
    write_by_router,
    written_ways,
)
from evaluation.lab.collab import COLLAB, is_collab_known, read_collab, write_by_collab
from evaluation.lab.plan import CDPO, PLANS, SFT
from evaluation.lab.results import findings_of, gather
from evaluation.lab.systems import FUSIONROUTE, systems_of
from evaluation.systems.ways import SUM, rule_names
from fusionroute.lab.tasks import Group, Item, evaluation_items
from tests.served_stack import Family as ServedFamily
from tests.served_stack import Stack, served
from trainer.lab_family import Family, build
from trainer.lab_family.quality import exact_matches
from trainer.lab_family.reward import reward_of

pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
]
PLAN = replace(PLANS["lab-quick"], per_task=3, per_task_seen=1, per_task_written=1)


@pytest.fixture(scope="module")
def family() -> Family:
    return build("demo", seed=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(family: Family) -> AsyncIterator[Stack]:
    experts = {**family.experts, "base": family.base}
    async with served(ServedFamily(family.router_sft, experts), base_slot="base") as stack:
        yield stack


def quiet(what: str, num_done: int) -> None:
    pass


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(stack: Stack, family: Family, tmp_path_factory: pytest.TempPathFactory) -> SeedFolder:
    """Phase I asked; the same router stands in for that of phase II."""
    place = SeedFolder(
        tmp_path_factory.mktemp("answers"),
        PLAN,
        PLAN.questions(),
        dict.fromkeys((SFT, CDPO, COLLAB, "single_from_base"), "demo"),
    )
    slots = list(family.experts)
    rules = rule_names((await stack.client.info()).available_combine)
    for checkpoint in (SFT, CDPO):
        await judge_by_router(stack.client, place, checkpoint, ways_of(checkpoint, slots, rules), quiet)
        await write_by_router(stack.client, place, checkpoint, written_ways(checkpoint, slots), quiet)
    reward = await asyncio.to_thread(reward_of, family)
    await write_by_collab(stack.client, place, slots, reward, quiet)
    place.keep_examples(await trace_examples(stack.client, FUSIONROUTE, SUM))
    await asyncio.to_thread(judge_by_model, place, "single_from_base", family.base, quiet)
    return place


def same_items(questions: SeedFolder) -> list[Item]:
    return evaluation_items(per_task=PLAN.per_task)


async def test_what_the_services_say_is_what_the_models_do_in_one_process(
    place: SeedFolder, family: Family
) -> None:
    records = read_seed(place, 0, list(family.experts), [SFT, CDPO], ["single_from_base"])
    questions = {question.id: question for question in place.questions}
    held_out = [question.id for question in place.questions if "coverage" in question.strata]
    by_system = {each.note.name: each.answers for each in systems_of(records, questions)}
    plain = await asyncio.to_thread(exact_matches, family.folder, same_items(place))
    names = {f"sft/{rule}": rule for rule in ("sum", "gated_sum", "mixture", "select", "route", "router")}
    names |= {f"expert/{slot}": slot for slot in family.experts} | {"single_from_base": "base"}
    for system, alone in names.items():
        assert [by_system[system][id_][1].is_right for id_ in held_out] == plain[alone], system


async def test_written_answers_are_right_exactly_where_judging_says_so(
    place: SeedFolder, family: Family
) -> None:
    records = read_seed(place, 0, list(family.experts), [SFT, CDPO], [])
    num_compared, differing = disagreements(records)
    assert num_compared == 23 * (3 + 1 + 1 + 3 + 1) and differing == []
    id_ = next(iter(records.written["sft/sum"]))
    answer, verdict = records.written["sft/sum"][id_]
    records.written["sft/sum"][id_] = (answer, replace(verdict, score=1.0 - verdict.score))  # type: ignore[index]
    assert disagreements(records)[1] == [f"sft/sum {id_}"]


async def test_what_is_known_is_not_asked_again(place: SeedFolder, family: Family) -> None:
    slots = list(family.experts)
    assert is_known(place, SFT, slots) and is_known(place, CDPO, slots) and is_collab_known(place)
    assert not is_known(replace(place, plan=replace(PLAN, per_task_written=2)), SFT, slots)


async def test_the_findings_hold_every_system_in_every_division(place: SeedFolder, family: Family) -> None:
    heard = read_seed(place, 0, list(family.experts), [SFT, CDPO], ["single_from_base"])
    records = [replace(heard, unjudged=read_collab(place))]
    gathered = gather(place.questions, records)
    findings = findings_of(PLAN, place.questions, records, gathered, place.examples(), {})
    names = [note.name for note in findings.systems]
    assert {
        "expert/math",
        "select/oracle",
        "oracle/token",
        "sft/ensemble",
        "sft/proxy",
        "cdpo/random",
    } <= set(names)
    cells = {(cell.system, cell.stratum): cell for cell in findings.cells}
    assert cells["sft/route", "coverage=gap"].estimate.value == 0.0
    assert cells["sft/route", "coverage=gap"].num_questions == 6 * 3
    assert cells["sft/route", "seen=covered"].num_questions == 17
    assert cells["oracle/token", f"group={Group.DOMAIN}"].estimate.value > 0.9
    assert {(each.first, each.second) for each in findings.comparisons} >= {
        (FUSIONROUTE, "sft/route"), (FUSIONROUTE, "select/likelihood"), (FUSIONROUTE, COLLAB), ("sft/sum", "sft/route")
    }  # fmt: skip
    assert all(abs(sum(each.shares.values()) - 1.0) < 1e-9 for each in findings.routing)
    overruled = {(each.system, each.stratum): each for each in findings.overrulings}
    assert overruled["sft/sum", "coverage=gap"].num_mended > 0
    assert [example.task for example in findings.examples][:2] == ["box_ms", "ans_s"]
    assert findings.examples[0].tokens[0].by_expert == "["
