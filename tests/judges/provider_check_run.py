"""trustedrouter-provider-check: a point for each of its checks, tiers 1 to 6."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.judges.scoring import Score

HIGHEST_TIER = 6


def main() -> None:
    """Judges."""
    score = Score()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [
            str(Path(sys.executable).with_name("trustedrouter-provider-check")),
            f"--base-url={score.url}/v1",
            "--model=fusionroute",
            f"--tier={HIGHEST_TIER}",
            f"--json={path}",
        ]
        subprocess.run(command, capture_output=True, check=False)
        report = json.loads(path.read_text())
    for check in report["checks"]:
        with score.point(check["id"]):
            measured = json.dumps(check.get("measured"))[:300]
            assert check["status"] == "pass", f"{check['status']}: {measured}"
    print(f"its conformance gate: {report['summary']['conformance_gate']}")
    score.end()


main()
