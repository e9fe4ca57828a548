"""All suites one after the other: what is there is kept, what fails is named, and no file is ever half."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from fusionroute.cli.bench_all import PLAN, all_suites, file_of, measure_all, summary

NAMES = {each.name for each in PLAN}


def finding(median: float, is_met: bool | None) -> dict[str, object]:
    return {"what": "a / b", "median": median, "aim": "at most 1", "is_met": is_met}


class Bench:
    """Stands for `fusionroute bench`: writes the file that it is told, or fails."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked = failing, list[list[str]]()

    def __call__(self, words: Sequence[str]) -> int:
        self.asked.append(list(words))
        Path(words[-1]).write_text(json.dumps({"findings": [finding(0.5, True)]}))
        return 7 if words[0] in self.failing else 0


def test_each_suite_writes_its_file_and_one_that_fails_is_named_and_leaves_none(tmp_path: Path) -> None:
    bench = Bench("wire")
    failed = measure_all(PLAN, tmp_path / "new", peers_words=("--genlm-python", "py"), start=bench)
    assert failed == ["wire"]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        f"{name}.json" for name in NAMES - {"wire"}
    }
    assert [words[: len(each.words)] for words, each in zip(bench.asked, PLAN, strict=True)] == [
        list(each.words) for each in PLAN
    ]
    with_genlm = [words for words in bench.asked if "--genlm-python" in words]
    assert [(words[0], "--without-genlm" in words) for words in with_genlm] == [("peers", False)]


def test_a_suite_that_is_interrupted_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    def interrupted(words: Sequence[str]) -> int:
        Path(words[-1]).write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_all(PLAN[:1], tmp_path, peers_words=(), start=interrupted)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_measured_again_unless_asked(tmp_path: Path) -> None:
    def listed(*words: str) -> str:
        return CliRunner().invoke(all_suites, ["--output", str(tmp_path), "--list", *words]).stdout

    file_of(tmp_path, PLAN[0]).write_text("{}")
    assert listed().count("measured already") == 1
    assert "measured already" not in listed("--again")
    assert [line.split()[2] for line in listed("--only", "wire").splitlines()] == ["wire", "in"]


def test_a_summary_names_what_was_missed(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"findings": [finding(0.5, True), finding(2.0, False), finding(3.0, None)]}))
    assert summary(file) == "1 of 2 aims met\n  missed: a / b: 2, at most 1"


def test_an_interruption_reaches_the_suite_that_runs_and_waits_until_it_has_ended(tmp_path: Path) -> None:
    """As Ctrl-C: the suite has stacks to stop."""
    suite = tmp_path / "suite.py"
    suite.write_text(
        "import pathlib, time\n"
        "try:\n    print('runs', flush=True)\n    time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(tmp_path / 'ended')!r}).touch()\n"
    )
    runner = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whoever runs the tests may have it ignored
        "from fusionroute.cli.bench_all import run_process\n"
        f"run_process([{sys.executable!r}, {str(suite)!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", runner], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"runs\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    assert (tmp_path / "ended").exists()
