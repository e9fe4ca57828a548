"""Does a gate hold beyond the lab? Tasks with two views, and gates that have never seen one kind of gap.

nice -n 10 python benchmarks/gate_beyond_lab.py --seeds 0 1 2 --work models/gate

Trains demo-size families where they are not in the work folder yet, one thread, and writes docs/results/gate.json and
the tables of docs/results/gate.md, whose words stay as they are. `--small` shows in a CPU minute that all of it works.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import torch

from evaluation.findings import Cell, Comparison
from evaluation.questions import RIGHT, Answer, Outcome, Question, Verdict
from evaluation.statistics.cells import cells
from evaluation.statistics.comparing import compare
from fusionroute.lab.views import Part
from trainer.lab_beyond import measuring, views_family
from trainer.lab_beyond.first_choices import ANY_MIXTURE, ANY_SELECTION, ANY_SUM
from trainer.lab_beyond.gap_families import FAMILIES
from trainer.lab_beyond.measuring import COVERED, GATES, NOTHING, Asked, Measured
from trainer.lab_family.recipe import RECIPES, Recipe, Stage

VIEWS_PER_TASK = 20
"""Items of a task with two views for each of a task of the lab; one in eleven of `skew` is rare in both."""
RULES = ("mixture", "select", "gated_sum")
VIEW_SYSTEMS = (
    "linear/sum", *(f"{gate}/{rule}" for rule in RULES for gate in GATES if (gate, rule) != ("reaching", "gated_sum")),
    "linear/route", "linear/router", "rows", ANY_SELECTION, ANY_MIXTURE, ANY_SUM,
)  # fmt: skip
PAGE, MARKS = Path("docs/results/gate.md"), ("<!-- tables: begin -->", "<!-- tables: end -->")
SMALL = (Stage(60, 32, 4e-3), Stage(40, 32, 2e-3), Stage(20, 16, 1e-3), Stage(40, 128, 1e-2))


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    began, lab, views, per_task = time.process_time(), list[Outcome](), list[Outcome](), arguments.per_task
    seconds = list[int]()
    recipe, views_recipe = RECIPES[arguments.size], views_family.RECIPE
    if arguments.small:
        recipe, views_recipe = _small(recipe), _small(views_recipe)
    for seed in arguments.seeds:
        size = f"{arguments.size}-small" if arguments.small else arguments.size
        folder, tell = arguments.work / f"{size}-{seed}", _tell(seed, began)
        (folder / "views").mkdir(parents=True, exist_ok=True)
        if arguments.only != "views":
            ask = partial(_lab, folder, recipe, seed, per_task, tell)
            lab += _outcomes(_kept(folder / f"lab-{per_task}.json", ask, seconds), seed)
        if arguments.only != "lab":
            ask = partial(measuring.two_views, folder / "views", views_recipe, seed, VIEWS_PER_TASK * per_task, tell)
            views += _outcomes(_kept(folder / f"views-{per_task}.json", ask, seconds), seed)
    if arguments.only:
        return
    facts = {
        "seeds": arguments.seeds,
        "size": arguments.size + (", small" if arguments.small else ""),
        "items": {"lab, each task": per_task, "views, each task": VIEWS_PER_TASK * per_task},
        "cpu_seconds": sum(seconds),
    }
    _write(arguments.output, facts, lab, views)
    print(arguments.output)


def _lab(folder: Path, recipe: Recipe, seed: int, per_task: int, tell: measuring.Tell) -> Measured:
    tell("lab: base, experts, router")
    return measuring.left_out_families(
        measuring.build_lab(folder / "lab", recipe, seed), recipe, seed, per_task, tell
    )


def _kept(path: Path, measure: Callable[[], Measured], seconds: list[int]) -> Measured:
    """What an earlier run has left in the work folder, or measured now; `seconds` gets its CPU seconds."""
    if not path.exists():
        began = time.process_time()
        found = asdict(measure()) | {"cpu_seconds": round(time.process_time() - began)}
        path.write_text(json.dumps(found), encoding="utf-8")
    values = json.loads(path.read_text(encoding="utf-8"))
    seconds.append(values.get("cpu_seconds", 0))
    return Measured(tuple(Asked(**item) for item in values["items"]), values["right"])


def _outcomes(measured: Measured, seed: int) -> Iterable[Outcome]:
    for number, item in enumerate(measured.items):
        question = Question(item.id, item.id.partition("/")[0], "", cluster=item.cluster, strata={"part": item.part})
        for system, right in measured.right.items():
            verdict = RIGHT if right[number] else Verdict(0.0)
            yield Outcome(question, system, seed, Answer("", is_complete=True), verdict)


def _write(page: Path, facts: dict[str, Any], lab: list[Outcome], views: list[Outcome]) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    lab_systems = sorted({outcome.system for outcome in lab})
    parts = [f"part={part}" for part in (*FAMILIES, COVERED)]
    of_lab = cells(lab, lab_systems, parts)
    of_views = cells(views, VIEW_SYSTEMS, [f"part={part}" for part in Part])
    lost = _lost(lab)
    pairs = [("linear/sum", other) for other in VIEW_SYSTEMS[1:]]
    gained = compare(views, pairs, [f"part={Part.EVEN}", f"part={Part.SKEW_RARE}"])
    tables = "\n\n".join(
        [
            f"Seeds {facts['seeds']}, size {facts['size']}, {facts['cpu_seconds']} CPU seconds of one core.",
            "### Tasks with two views", _table(of_views, [part.value for part in Part]),
            "Differences of the plain sum to each other rule, paired:", _differences(gained),
            "### One kind of gap left out of the gate's data", _left_out(of_lab),
            "What leaving it out costs (all rows minus rows without that kind), paired:", _differences(lost),
        ]
    )  # fmt: skip
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS) + "\n"
    pattern = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}", text), encoding="utf-8")
    values = {
        "facts": facts,
        "cells": [asdict(cell) for cell in (*of_views, *of_lab)],
        "comparisons": [asdict(each) for each in (*gained, *lost)],
    }
    page.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _lost(lab: list[Outcome]) -> list[Comparison]:
    """For each kind of gap: what a gate that has seen it gets right more than one that has not."""
    systems = {outcome.system for outcome in lab}
    found: list[Comparison] = []
    for family in FAMILIES:
        pairs = [(f"{gate}/{NOTHING}/{rule}", f"{gate}/{family}/{rule}") for gate in GATES for rule in RULES]
        asked = [pair for pair in pairs if pair[0] in systems]
        named = {system for pair in asked for system in pair}
        found += compare([each for each in lab if each.system in named], asked, [f"part={family}"])
    return found


def _table(found: Sequence[Cell], parts: Sequence[str]) -> str:
    lines = [f"| system | {' | '.join(parts)} |", f"|---|{'---|' * len(parts)}"]
    for system in dict.fromkeys(cell.system for cell in found):
        row = [next(c for c in found if c.system == system and c.stratum == f"part={part}") for part in parts]
        lines.append(f"| {system} | {' | '.join(_shown(cell) for cell in row)} |")
    return "\n".join(lines)


def _left_out(found: Sequence[Cell]) -> str:
    """One line for each gate and rule: each kind of gap seen and left out, then covered tasks."""
    by = {(cell.system, cell.stratum.partition("=")[2]): cell for cell in found}
    heads = [f"{family}, {how}" for family in FAMILIES for how in ("seen", "left out")]
    lines = [f"| gate, rule | {' | '.join(heads)} | covered |", f"|---|{'---|' * (len(heads) + 1)}"]
    for rule in (*RULES, "sum", "router"):
        for gate in GATES:
            if (f"{gate}/{NOTHING}/{rule}", COVERED) not in by or (gate == "mlp" and rule not in RULES):
                continue
            row = [
                by[f"{gate}/{left_out}/{rule}", family] for family in FAMILIES for left_out in (NOTHING, family)
            ]
            row.append(by[f"{gate}/{NOTHING}/{rule}", COVERED])
            lines.append(f"| {gate}, {rule} | {' | '.join(_shown(cell) for cell in row)} |")
    return "\n".join(lines)


def _differences(found: Sequence[Comparison]) -> str:
    lines = ["| first | second | items | difference | p (Holm) |", "|---|---|---|---|---|"]
    for each in found:
        d = each.difference
        lines.append(
            f"| {each.first} | {each.second} | {each.stratum.partition('=')[2]} | {d.value:+.3f} [{d.low:+.3f}, "
            f"{d.high:+.3f}] | {each.p_adjusted:.3f} |"
        )
    return "\n".join(lines)


def _shown(cell: Cell) -> str:
    estimate = cell.estimate
    return f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _small(recipe: Recipe) -> Recipe:
    base, expert, router, gates = SMALL
    return replace(recipe, base=base, expert=expert, router=router, gates=gates, num_router_items=300)


def _tell(seed: int, began: float) -> measuring.Tell:
    return lambda what: print(f"seed {seed}, {time.process_time() - began:.0f} CPU s: {what}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=sorted(RECIPES), default="demo")
    parser.add_argument("--only", choices=["lab", "views"], help="measure this, for a later run that writes the tables")
    parser.add_argument("--per-task", type=int, default=60, help="of the lab's tasks; 20 times as many of views")
    parser.add_argument("--work", type=Path, default=Path("models/gate"), help="where models are kept")
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--small", action="store_true", help="models that know nothing, to see that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
