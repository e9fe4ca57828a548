"""Runs studies: trains what is missing, judges, writes pages and pictures.

nice -n 10 python -m benchmarks.studies all
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

NAMES = ("experts", "corrupted", "lambda", "beta", "tokens", "added", "bad", "sampling", "halves", "data")
QUICK = "quick"


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = _arguments(words)
    names = NAMES if "all" in arguments.names else tuple(dict.fromkeys(arguments.names))
    size = QUICK if arguments.quick else arguments.size

    from benchmarks.studies.running import run_studies

    run_studies(names, size, arguments.seeds, arguments.output, arguments.cache, arguments.processes)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "names", nargs="+", choices=("all", *NAMES), metavar="NAME", help=", ".join(("all", *NAMES))
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=_seeds, default=(1, 2, 3), help="training seeds, for example 1,2,3")
    parser.add_argument("--size", default="demo", help="a size of the lab: demo (default) or full")
    parser.add_argument("--processes", type=int, default=2, help="each works at one seed")
    parser.add_argument(
        "--cache", type=Path, help="instead of $FUSIONROUTE_CACHE_DIR or ~/.cache/fusionroute"
    )
    parser.add_argument(
        "--quick", action="store_true", help="models that know nothing, to see that all of it runs"
    )
    return parser.parse_args(words)


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
