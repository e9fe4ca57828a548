"""`fusionroute eval` as people type it: from nothing to a report, gone on with, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.lab_family import build


def fusionroute(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusionroute.cli", "eval", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=dict(os.environ))


@pytest.mark.whole
@pytest.mark.lab
@pytest.mark.timeout(900)
def test_from_a_family_to_a_report_and_once_more_without_asking(tmp_path: Path) -> None:
    build("demo", seed=0)
    run = (
        "run",
        "--suite",
        "lab-quick",
        "--variants",
        "none",
        "--per-task",
        "1",
        "--output",
        str(tmp_path / "out"),
    )
    first = fusionroute(*run)
    assert first.returncode == 0, first.stderr
    assert "FusionRoute: sum" in first.stdout and "report.md" in first.stdout
    report = (tmp_path / "out" / "report.json").read_bytes()
    names = [system["name"] for system in json.loads(report)["systems"]]
    assert {"expert/math", "select/oracle", "sft/route", "sft/proxy", "cdpo/sum", "cdpo/select"} <= set(names)
    assert b"/tmp" not in report and json.loads(report)["facts"]["command"].startswith(
        "fusionroute eval run --suite"
    )
    again = fusionroute(*run, "--json")
    assert again.returncode == 0, again.stderr
    assert "starting" not in again.stderr, "nothing had to be started"
    assert again.stdout.encode() == report == (tmp_path / "out" / "report.json").read_bytes()
    compared = fusionroute(
        "compare", str(tmp_path / "out"), "oracle/token", "expert/math", "--stratum", "group=gap"
    )
    assert compared.returncode == 0 and compared.stdout.startswith("No difference shown"), compared.stdout


def test_what_cannot_be_run_is_said() -> None:
    refused = fusionroute("run", "--suite", "no-such", "--output", "unused")
    assert refused.returncode == 1 and "lab-quick" in refused.stderr
    listed = fusionroute("list")
    assert listed.stdout.splitlines()[0].startswith("lab ") and "training seeds 1, 2, 3" in listed.stdout
