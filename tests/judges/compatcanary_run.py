"""CompatCanary: a point for each of its probes of the profile `modern`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.judges.scoring import Score


def main() -> None:
    """Judges."""
    score = Score()
    program = Path(sys.prefix) / "node_modules" / ".bin" / "compatcanary"
    command = [
        str(program),
        "scan",
        f"--base-url={score.url}/v1",
        "--model=fusionroute",
        "--format=json",
        "--fail-on=never",
    ]
    flat = [part for each in command for part in each.split("=", 1)]  # it knows no --name=value
    process = subprocess.run(flat, capture_output=True, text=True, check=True)
    report = json.loads(process.stdout)
    for probe in report["results"]:
        with score.point(probe["id"]):
            assert probe["status"] == "pass", f"{probe['status']}: {probe['summary']}"
    print(f"its score: {report['score']} of 100")
    score.end()


main()
