"""Table of exact match per task group, or per task, for every system of a lab family.

python benchmarks/lab_quality.py --size demo --seed 0 --per-task 300
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fusionroute.lab.tasks import TASKS, Group, evaluation_items
from trainer.lab_family.quality import SYSTEMS, exact_matches


def main() -> None:
    arguments = _arguments()
    if arguments.family is None:
        from trainer.lab_family import build, shown

        with shown() as progress:
            arguments.family = build(arguments.size, seed=arguments.seed, progress=progress).folder
    start = time.perf_counter()
    items = evaluation_items(per_task=arguments.per_task)
    matches = exact_matches(arguments.family, items)
    print(f"{arguments.family}: {len(items)} items in {time.perf_counter() - start:.1f} s")
    rows = [*TASKS] if arguments.tasks else []
    width = max(len(name) for name in SYSTEMS) + 1
    print(f"{'':10}" + "".join(f"{name:>{width}}" for name in SYSTEMS))
    for name in [*rows, *Group, "all"]:
        kept = [index for index, item in enumerate(items) if name in (item.task, item.group, "all")]
        shares = (sum(matches[system][index] for index in kept) / len(kept) for system in SYSTEMS)
        print(f"{name:10}" + "".join(f"{share:{width}.3f}" for share in shares))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", type=Path, help="folder of a built family; else from the cache, or built")
    parser.add_argument("--size", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-task", type=int, default=300)
    parser.add_argument("--tasks", action="store_true", help="a line for each of the 23 tasks as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
