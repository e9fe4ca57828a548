"""A study's page: words that stay as people wrote them, around tables that are written anew; and its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.studies.plan import Panel, Study
from benchmarks.studies.results import Results, baseline_of
from evaluation.findings import Cell, Comparison
from evaluation.statistics.verdicts import is_shown, shown_difference, shown_p

MARKS = ("<!-- tables: begin -->", "<!-- tables: end -->")
LINE_LABELS = {
    "sft/sum": "sum, phase I",
    "cdpo/sum": "sum, phase II",
    "sft/route": "routing only, phase I",
    "cdpo/route": "routing only, phase II",
    "sft/select": "select (gate)",
    "sft/mixture": "mixture (gate)",
    "sft/router": "router alone, phase I",
    "cdpo/router": "router alone, phase II",
}


def write_page(results: Results, facts: Mapping[str, Any], folder: Path) -> Path:
    """Writes NAME.md and NAME.json into a folder; the words outside the marks stay."""
    page = folder / f"{results.study.name}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else _empty_page(results.study)
    pattern = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    tables = "\n\n".join(_tables(results, facts))
    page.write_text(pattern.sub(lambda _: f"{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}", text), encoding="utf-8")
    page.with_suffix(".json").write_text(_json(results, facts), encoding="utf-8")
    return page


def label_of(line: str) -> str:
    """A line of a picture or column of a table, for people."""
    return LINE_LABELS[line]


def _empty_page(study: Study) -> str:
    return (
        f"# {study.title}\n\n{study.question}\n\n"
        f"```sh\nnice -n 10 python -m benchmarks.studies {study.name}\n```\n\n"
        f"![{study.title}]({study.name}.png)\n\n{MARKS[0]}\n{MARKS[1]}\n"
    )


def _tables(results: Results, facts: Mapping[str, Any]) -> Iterator[str]:
    seeds = ", ".join(map(str, results.seeds))
    yield (
        f"Size {facts['size']}, training seeds {seeds}, {results.per_task} held-out items of each of 23 tasks a seed; "
        "brackets: 95 % (bootstrap over seeds and facts; one seed: Wilson). Differences are paired. Would show = the "
        "smallest true difference that these questions would show in four of five cases; not shown = p after Holm over "
        "the page is not below 0.05, or the interval holds 0, as it easily does with few seeds."
    )
    for panel in results.study.panels:
        yield f"### {panel.title[0].upper()}{panel.title[1:]}"
        yield _table(results, panel)
        if found := results.comparisons.get(panel.title):
            yield _comparison_table(results, found)
    yield "### Who was chosen"
    yield _share_table(results)


def _table(results: Results, panel: Panel) -> str:
    study, names = results.study, list(results.study.lines)
    lines = [f"| {panel.axis} | {' | '.join(map(label_of, names))} |", f"|---|{'---|' * len(names)}"]
    for level in panel.levels:
        cells = (results.cell(level, name, panel.stratum) for name in names)
        row = " | ".join("" if cell is None else shown_cell(cell) for cell in cells)
        label = " ".join(study.level(level).label.split())
        lines.append(f"| {label}{' (baseline)' if level == baseline_of(study, panel) else ''} | {row} |")
    return "\n".join(lines)


def shown_cell(cell: Cell) -> str:
    """As in "0.953 [0.93, 0.97]"."""
    estimate = cell.estimate
    return f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _comparison_table(results: Results, found: Sequence[Comparison]) -> str:
    lines = ["| first | second | difference | p (Holm) | would show | finding |", "|---|---|---|---|---|---|"]
    for each in found:
        finding = "not shown"
        if is_shown(each):
            finding = f"**{'ahead' if each.difference.value > 0 else 'behind'}**"
        cells = (
            _name(results, each.first),
            _name(results, each.second),
            shown_difference(each),
            shown_p(each.p_adjusted).removeprefix("p ").removeprefix("= "),
            f"{each.detectable:.3f}",
            finding,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(results: Results, system: str) -> str:
    level, phase, rule = system.rsplit("/", 2)
    return f"{' '.join(results.study.level(level).label.split())}: {label_of(f'{phase}/{rule}')}"


def _share_table(results: Results) -> str:
    """Share of the tokens that each expert was chosen for, by routing head and gate; the same ones stand once."""
    lines = ["| level, phase | routing head | gate |", "|---|---|---|"]
    seen: set[str] = set()
    for name, rules in results.shares.items():
        cells = " | ".join(_shares(rules.get(rule, {})) for rule in ("route", "select"))
        level, _, phase = name.rpartition("/")
        label = " ".join(results.study.level(level).label.split())
        if cells not in seen:
            lines.append(f"| {label}, {phase} | {cells} |")
        seen.add(cells)
    return "\n".join(lines)


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name or 'router'} {share:.3f}" for name, share in shares.items() if name or share > 0)


def _json(results: Results, facts: Mapping[str, Any]) -> str:
    """One line for each cell and comparison."""
    compared = [
        {"panel": title, **asdict(each)} for title, found in results.comparisons.items() for each in found
    ]
    values = {
        "study": results.study.name,
        "question": results.study.question,
        "facts": {**facts, "seeds": results.seeds, "per_task": results.per_task},
        "shares": results.shares,
    }
    lists = {"cells": [asdict(cell) for cell in results.cells], "comparisons": compared}
    parts = [f'"{name}": {json.dumps(_rounded(value))}' for name, value in values.items()]
    for name, rows in lists.items():
        lines = ",\n  ".join(json.dumps(_rounded(row)) for row in rows)
        parts.append(f'"{name}": [\n  {lines}\n ]')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def _rounded(value: Any) -> Any:
    """Six digits are more than anything here is worth, and a file of readable size."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value
