"""Schemathesis over /openapi.json: a point for each operation without a 5xx, and with answers as the document says.

The last point is that no request is refused that fits the document's schema.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from tests.judges.scoring import Score

MAX_EXAMPLES = 4
DOCUMENT = "/openapi.json"
"""Which it reads and does not try."""
METHODS = ("get", "post", "delete")
TOO_STRICT = "ST202"
"""Schemathesis's code for a request that fits its schema and is refused."""


def main() -> None:
    """Judges."""
    score = Score()
    with urllib.request.urlopen(f"{score.url}{DOCUMENT}", timeout=30) as answer:  # noqa: S310 (http, by the test)
        document = json.load(answer)
    operations = [
        f"{method.upper()} {path}"
        for path, methods in document["paths"].items()
        for method in methods
        if method in METHODS and path != DOCUMENT
    ]
    report, output = run(score.url)
    failures = report["failures"]
    print(f"{report['test_cases']['generated']} requests")
    with score.point("it has tried every operation"):
        facts = {name: report[name] for name in ("operations", "complete", "stop_reason", "errors")}
        assert report["operations"]["tested"] == len(operations) and report["complete"], facts
    for operation in operations:
        with score.point(operation):
            assert not (found := codes(failures, operation)), f"{found}\n{output}"
    with score.point("methods that are not in the document"):
        others = {each for failure in failures for each in failure["operations"]} - set(operations)
        assert not others, f"{others}\n{output}"
    with score.point("requests that fit their schema are not refused"):
        refused = [
            each for failure in failures if failure["code"] == TOO_STRICT for each in failure["operations"]
        ]
        assert not refused, f"refused by {', '.join(refused)}"
    score.end()


def codes(failures: list[dict[str, Any]], operation: str) -> list[str]:
    """What is wrong with an operation."""
    return [
        f"{failure['code']} {failure['title']}"
        for failure in failures
        if failure["code"] != TOO_STRICT and operation in failure["operations"]
    ]


def run(url: str) -> tuple[dict[str, Any], str]:
    """Its report, and what it has printed, without the bodies."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [
            str(Path(sys.executable).with_name("st")),
            "run",
            f"{url}{DOCUMENT}",
            "--checks=all",
            "--phases=examples,coverage,fuzzing",
            f"--max-examples={MAX_EXAMPLES}",
            "--seed=1",
            "--request-timeout=30",
            "--continue-on-failure",
            "--no-shrink",
            "--report=json",
            f"--report-json-path={path}",
        ]
        process = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        output = "\n".join(line[:200] for line in process.stdout.splitlines())
        return json.loads(path.read_text()), output + process.stderr[-2000:]


main()
