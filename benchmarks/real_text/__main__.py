"""nice -n 5 python -m benchmarks.real_text --output docs/results

Trains what the work folder does not have yet, serves it, asks it, and writes real_text.md and real_text.json. The
folder of benchmarks is named by FUSIONROUTE_DATA_DIR. `--quick` needs none: made-up texts, models that know nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.real_text.made_up import MadeUp
from benchmarks.real_text.running import Plan, run_all
from benchmarks.real_text.sizes import FULL, QUICK
from benchmarks.real_text.texts import DataFolder, Source


def main() -> None:
    parser = argparse.ArgumentParser(description="Does FusionRoute help on real text at small scale?")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("models/real_text"), help="where models are kept")
    parser.add_argument("--seeds", type=int, nargs="+", help="of training; 1 2 3, or 1 with --quick")
    parser.add_argument("--processes", type=int, default=1, help="seeds at a time")
    parser.add_argument("--quick", action="store_true", help="made-up texts, to see that it runs")
    parser.add_argument("--phase-one", action="store_true", help="leave out pairs and CDPO: half of the time")
    arguments = parser.parse_args()
    source: Source = MadeUp()
    if not arguments.quick:
        folder = os.environ.get("FUSIONROUTE_DATA_DIR")
        if not folder:
            parser.error("FUSIONROUTE_DATA_DIR must name the folder of benchmarks (or give --quick)")
        source = DataFolder(Path(folder))
    sizes = QUICK if arguments.quick else FULL
    seeds = tuple(arguments.seeds or ([1] if arguments.quick else [1, 2, 3]))
    plan = Plan(source, sizes, seeds, arguments.work, arguments.processes, not arguments.phase_one)
    print(run_all(plan, arguments.output))


if __name__ == "__main__":
    main()
