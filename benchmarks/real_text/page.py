"""The page in docs/results: tables between two marks are written anew, the words around them stay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.real_text.findings import MEANING, STRATA
from evaluation.findings import ACCURACY, ALL, NLL, Cell, Comparison, Findings
from evaluation.report.encoding import to_text
from evaluation.statistics.verdicts import is_shown

MARKS = ("<!-- tables: begin -->", "<!-- tables: end -->")
NAME = "real_text"


def write_page(findings: Findings, folder: Path) -> Path:
    """Writes `real_text.md` and `real_text.json` and returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{NAME}.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS) + "\n"
    tables = "\n\n".join(_tables(findings))
    pattern = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}", text), encoding="utf-8")
    page.with_suffix(".json").write_text(to_text(findings), encoding="utf-8")
    return page


def _tables(findings: Findings) -> Iterator[str]:
    facts = findings.facts
    yield (
        f"`{facts['command']}`: seeds {', '.join(map(str, facts['seeds']))}; "
        f"{facts['sizes']['documents']} held-out texts of each domain, {facts['tokens']} judged tokens of each seed. "
        "Intervals are of the bootstrap over seeds and texts, 95 %."
    )
    yield "\n".join(["| domain | what it is |", "|---|---|", *(f"| {k} | {v} |" for k, v in MEANING.items())])
    for measure, title in (
        (NLL, "Negative log-probability, nats per token (less is better)"),
        (ACCURACY, "Share of tokens that are the system's first choice (more is better)"),
    ):
        yield f"### {title}"
        yield _cells(findings, [cell for cell in findings.cells if cell.measure == measure])
    yield "### Differences, first minus second, paired by text"
    losses = [each for each in findings.comparisons if each.measure == NLL]
    yield (
        "Of negative log-probability, so that below 0 the first is better; in **bold** where it is shown: after Holm "
        f"over all {len(losses)} of them, and by the interval over seeds and texts too."
    )
    yield _differences(findings, losses)
    yield "The same of the share of right tokens; above 0 the first is better."
    yield _differences(findings, [each for each in findings.comparisons if each.measure == ACCURACY])
    yield "### Whom tokens went to"
    yield _routing(findings)


def _cells(findings: Findings, cells: Sequence[Cell]) -> str:
    by = {(cell.system, cell.stratum): cell for cell in cells}
    lines = _head("system")
    for note in findings.systems:
        row = [by[note.name, stratum].estimate for stratum in STRATA]
        lines.append(
            f"| {note.label} | "
            + " | ".join(f"{e.value:.3f} [{e.low:.2f}, {e.high:.2f}]" for e in row)
            + " |"
        )
    return "\n".join(lines)


def _differences(findings: Findings, comparisons: Sequence[Comparison]) -> str:
    labels = {note.name: note.label for note in findings.systems}
    by = {(each.first, each.second, each.stratum): each for each in comparisons}
    lines = _head("first − second")
    for first, second in dict.fromkeys((each.first, each.second) for each in comparisons):
        row = [_difference(by[first, second, stratum]) for stratum in STRATA]
        lines.append(f"| {labels[first]} − {labels[second]} | {' | '.join(row)} |")
    return "\n".join(lines)


def _difference(each: Comparison) -> str:
    value = f"{each.difference.value:+.3f}"
    interval = f"[{each.difference.low:+.2f}, {each.difference.high:+.2f}]"
    return f"**{value}** {interval}" if is_shown(each) else f"{value} {interval}"


def _routing(findings: Findings) -> str:
    slots = [*findings.slots, ""]
    lines = [
        f"| system | texts | {' | '.join(slot or 'router' for slot in slots)} |",
        "|---" * (2 + len(slots)) + "|",
    ]
    for each in findings.routing:
        where = "all" if each.stratum == ALL else each.stratum.partition("=")[2]
        shares = " | ".join(f"{100 * each.shares[slot]:.0f} %" for slot in slots)
        lines.append(f"| {each.system} | {where} | {shares} |")
    return "\n".join(lines)


def _head(first: str) -> list[str]:
    names = [stratum.partition("=")[2] or stratum for stratum in STRATA]
    return [f"| {first} | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
