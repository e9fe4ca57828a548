"""Fills the tables of docs/performance.md from what `fusionroute bench SUITE --output FILE` has written.

python docs/performance.py                    from all of benchmarks/results/
python docs/performance.py FILE...            from these; suites without a file keep their tables
python docs/performance.py --check [FILE...]  exit code 1 if the page says something else
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "performance.md"
RESULTS = DOCS.parent / "benchmarks" / "results"
# told in words of their own, or of no use to a reader of tables
NOT_LISTED = ("cpu", "cores", "load_before", "hidden", "layers", "vocabulary", "dtype", "model")

Result: TypeAlias = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page or checks it; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(arguments)
    files = asked.files or sorted(RESULTS.glob("*.json"))
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before, [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in files])
    if not asked.check:
        PAGE.write_text(after, encoding="utf-8")
    elif before != after:
        print(f"{PAGE} is stale: run python docs/performance.py", file=sys.stderr)
        return 1
    return 0


def filled(page: str, results: Iterable[tuple[str, Result]]) -> str:
    """The page with the tables of these results, of one suite in the order given.

    Args:
        results: with the names they go by.

    Raises:
        ValueError: the page has no place for a suite, or a result is none of a suite.
    """
    by_suite: dict[str, list[str]] = {}
    for name, result in results:
        if not isinstance(result.get("suite"), str):
            raise ValueError(f"{name}: not a result of `fusionroute bench`, it names no suite")
        by_suite.setdefault(result["suite"], []).append(section(name, result))
    for suite, sections in by_suite.items():
        begin, end = f"<!-- results of {suite}: begin -->", f"<!-- results of {suite}: end -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
        if not place.search(page):
            raise ValueError(
                f"{PAGE.name} has no place for the suite {suite!r}: it needs {begin!r} and {end!r}"
            )
        text = "\n\n".join([begin, *sections, end])
        page = place.sub(lambda found, text=text: text, page)  # type: ignore[misc]  # a lambda with a default
    return page


def section(name: str, result: Result) -> str:
    """One result: where it was measured, what it says, its tables."""
    parts = [f"#### {name}", configuration(result["configuration"])]
    if result["findings"]:
        rows = [
            [each["what"], _with_unit(each), f"{shown(each['low'])} to {shown(each['high'])}", *_aim(each)]
            for each in result["findings"]
        ]
        parts.append(table(("finding", "median", "least to most", "aim", ""), rows))
    for each in result["tables"]:
        parts += [f"{each['title']}:", table(each["columns"], each["rows"])]
    parts += [f"- {note}" for note in result["notes"] if note.startswith("Not measured")]
    return "\n\n".join(parts)


def configuration(facts: Mapping[str, Any]) -> str:
    """In a sentence: sizes, machine, then the rest by name."""
    sizes = ""
    if "hidden" in facts:
        sizes = (
            f"{facts.get('model', 'model')}, hidden {facts['hidden']}, {facts['layers']} layers, "
            f"vocabulary {facts['vocabulary']:,}, {facts['dtype']}; "
        )
    machine = f"{facts['cores']} cores of {facts['cpu']}" if "cpu" in facts else ""
    others = [f"{name} {_fact(value)}" for name, value in facts.items() if name not in NOT_LISTED]
    return f"{sizes}{machine}. {', '.join(others)}."


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; the first column to the left, all others to the right."""
    rule = ["---", *["--:"] * (len(columns) - 1)]
    lines = [columns, rule, *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    """A cell: three digits that say something, thousands apart."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _with_unit(finding: Mapping[str, Any]) -> str:
    return f"{shown(finding['median'])} {finding['unit']}".strip()


def _aim(finding: Mapping[str, Any]) -> tuple[str, str]:
    return finding["aim"], {True: "met", False: "missed", None: ""}[finding["is_met"]]


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_fact(each)}" for name, each in value.items()) + ")"
    if isinstance(value, list):
        return "/".join(_fact(each) for each in value)
    return shown(value)


if __name__ == "__main__":
    sys.exit(main())
