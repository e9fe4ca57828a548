"""The page of measurements says what the results say."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from docs import performance
from evaluation.bench_report import Finding, Report, Table
from evaluation.bench_runs import Spread
from fusionroute.cli.bench_all import PLAN
from tests.unit.test_docs import assert_it_parses, programs, shell_lines

PLACE = "<!-- results of wire: begin -->\nold\n<!-- results of wire: end -->"


def result(suite: str = "wire", value: float = 0.23456) -> dict[str, object]:
    finding = Finding("ms a row", Spread(value, 0.2, 1234.5), at_most=0.25, unit="ms")
    made = Report(
        suite,
        "How long?",
        {"cpu": "X1", "cores": 2, "runs": 5, "lengths": [4, 5]},
        [finding],
        [Table("Rows", ("way", "bytes"), [["a|b", 513024], ["c", None]])],
        notes=("Not measured: carrier pigeons: none here", "Ratios are ratios."),
    )
    return json.loads(json.dumps(made.to_json()))


def test_a_result_stands_where_its_suite_belongs_and_nothing_else_changes() -> None:
    page = performance.filled(f"before\n{PLACE}\nafter", [("wire-tiny", result())])
    assert page.startswith("before\n<!-- results of wire: begin -->\n\n#### wire-tiny\n")
    assert page.endswith("<!-- results of wire: end -->\nafter")
    assert "old" not in page
    assert "| ms a row | 0.235 ms | 0.2 to 1,234 | at most 0.25 | met |" in page
    assert "| a\\|b | 513,024 |" in page and "| c | - |" in page
    assert "2 cores of X1. runs 5, lengths 4/5." in page
    assert "- Not measured: carrier pigeons: none here" in page and "Ratios are" not in page


def test_filling_twice_is_filling_once_and_several_results_of_a_suite_stand_below_each_other() -> None:
    results = [("one", result()), ("two", result(value=9.0))]
    once = performance.filled(PLACE, results)
    assert performance.filled(once, results) == once
    assert once.index("#### one") < once.index("#### two")
    assert once.count("| missed |") == 1


def test_a_suite_without_a_place_and_a_file_of_something_else_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no place for the suite 'context'"):
        performance.filled(PLACE, [("x", result("context"))])
    with pytest.raises(ValueError, match=r"x: not a result"):
        performance.filled(PLACE, [("x", {"a": 1})])


def test_the_page_has_a_place_for_every_suite_and_says_what_the_committed_results_say() -> None:
    from fusionroute.cli.bench import bench

    page = performance.PAGE.read_text()
    assert set(re.findall(r"<!-- results of (\w+): begin -->", page)) == set(bench.list_commands(None)) - {
        "all"
    }
    assert performance.main(["--check"]) == 0


def test_the_commands_of_the_page_are_those_that_measure_everything() -> None:
    lines = [line for line in shell_lines(performance.PAGE) if line.startswith("fusionroute bench")]
    assert [line for line in lines if line.split()[2] != "all"] == [each.command for each in PLAN]


def test_every_command_of_the_page_is_understood_and_each_suite_has_one() -> None:
    suites = set()
    for line in shell_lines(performance.PAGE):
        program, *words = shlex.split(line)
        if program == "fusionroute":
            suites.add(words[1])
            assert_it_parses(programs()[program], words)
    assert suites == {"all", *re.findall(r"<!-- results of (\w+): begin -->", performance.PAGE.read_text())}
