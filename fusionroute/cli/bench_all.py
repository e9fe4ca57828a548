"""`fusionroute bench all`: every suite as docs/performance.md publishes it, one after the other, a file for each."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from fusionroute.cli.group import Failure

END_SECONDS = 60.0
GENLM, WITHOUT_GENLM = "--genlm-python", "--without-genlm"


@dataclass(frozen=True, slots=True)
class Published:
    """One result of the page.

    Attributes:
        name: of its file, and the heading of its tables.
        words: of the command, without `fusionroute bench`.
        minutes: that it takes on two cores.
    """

    name: str
    words: tuple[str, ...]
    minutes: float

    @property
    def command(self) -> str:
        """As the page shows it."""
        return " ".join(("fusionroute bench", *self.words, f"--output benchmarks/results/{self.name}.json"))


def _published(name: str, words: str, minutes: float) -> Published:
    return Published(name, tuple(words.split()), minutes)


PLAN = (
    _published("decode-demo", "decode", 0.8),
    _published("decode-h512", "decode --shape h512 --dtype bfloat16 --tokens 32 --runs 5 --threads 2", 2.5),
    _published(
        "throughput-h512",
        "throughput --shape h512 --tokens 32 --sessions 1 --sessions 16 --sessions 64 --threads 1",
        6.0,
    ),
    _published("experts", "experts", 1.0),
    _published("experts-h512", "experts --shape h512 --dtype bfloat16 --tokens 64", 3.0),
    _published("rules", "rules", 0.6),
    _published("context", "context", 0.8),
    _published("memory", "memory", 2.0),
    _published("prefix", "prefix --shape h256", 0.4),
    _published("speculation", "speculation", 4.0),
    _published("wire", "wire", 0.5),
    _published("http", "http", 0.6),
    _published("peers-demo", "peers", 4.0),
    _published("peers-h256", "peers --shape h256 --tokens 64 --without-genlm", 1.5),
)  # fmt: skip

Start = Callable[[Sequence[str]], int]
"""Runs `fusionroute bench` with these words to its end; its exit code."""


@click.command("all")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("benchmarks/results"),
              show_default=True, metavar="DIR", help="Where the JSON of each suite goes.")  # fmt: skip
@click.option("--again", is_flag=True, help="Measure anew what has a file already.")
@click.option("--only", multiple=True, type=click.Choice([each.name for each in PLAN]), metavar="NAME",
              help="Only this result; give several.")  # fmt: skip
@click.option("--genlm-python", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Python of an environment that has genlm-control; else one is made in the cache.")  # fmt: skip
@click.option("--list", "only_list", is_flag=True, help="Say what would be measured and how long it takes.")
def all_suites(
    output: Path, again: bool, only: tuple[str, ...], genlm_python: Path | None, only_list: bool
) -> None:
    """Measure everything that docs/performance.md shows: about half an hour on a machine with nothing else to do.

    A result whose file is there is not measured again, so a run that was ended goes on where it was. A suite that
    fails is named at the end, and the others are measured all the same. Afterwards `python docs/performance.py`
    fills the page.

    \b
    Example:
      fusionroute bench all --list
      fusionroute bench all --output results --again --only wire
    """
    asked = [each for each in PLAN if not only or each.name in only]
    wanted = [each for each in asked if again or not file_of(output, each).exists()]
    for each in asked:
        kept = "" if each in wanted else "  (measured already)"
        click.echo(f"{each.minutes:5.1f} min  {each.name:16} {' '.join(each.words)}{kept}")
    minutes = sum(each.minutes for each in wanted)
    click.echo(f"{minutes:5.1f} min  in all, on two cores")
    if only_list:
        return
    extra = ("--install-peers",) if genlm_python is None else (GENLM, str(genlm_python))
    failed = measure_all(wanted, output, peers_words=extra, start=run_bench)
    if failed:
        raise Failure("not measured: " + ", ".join(failed))


def file_of(output: Path, published: Published) -> Path:
    """Where a result lies."""
    return output / f"{published.name}.json"


def measure_all(
    wanted: Sequence[Published], output: Path, *, peers_words: Sequence[str], start: Start
) -> list[str]:
    """Measures one after the other; a file is there whole or not at all.

    Args:
        peers_words: further words for `peers`, which needs genlm-control.

    Returns:
        The names of those that failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for number, each in enumerate(wanted, 1):
        click.echo(f"\n[{number} of {len(wanted)}] {each.command}", err=True)
        began = time.monotonic()
        partial = output / f".{each.name}.partial"
        needs_genlm = each.words[0] == "peers" and WITHOUT_GENLM not in each.words
        further = peers_words if needs_genlm else ()
        try:
            code = start((*each.words, *further, "--output", str(partial)))
            if code == 0 and partial.exists():
                partial.replace(file_of(output, each))
                told = summary(file_of(output, each))
            else:
                failed.append(each.name)
                told = f"FAILED, exit code {code}"
        finally:
            partial.unlink(missing_ok=True)
        click.echo(f"{each.name}: {told}; {(time.monotonic() - began) / 60:.1f} min", err=True)
    return failed


def summary(file: Path) -> str:
    """How many aims a result meets, and which it misses."""
    findings = json.loads(file.read_text(encoding="utf-8"))["findings"]
    aimed = [each for each in findings if each["is_met"] is not None]
    missed = [each for each in aimed if not each["is_met"]]
    lines = "".join(f"\n  missed: {each['what']}: {each['median']:.3g}, {each['aim']}" for each in missed)
    return f"{len(aimed) - len(missed)} of {len(aimed)} aims met{lines}"


def run_bench(words: Sequence[str]) -> int:
    """In a process of its own, which may fail alone and whose threads and memory end with it."""
    return run_process([sys.executable, "-m", "fusionroute.cli", "bench", *words])


def run_process(command: Sequence[str]) -> int:
    """Runs a command to its end; its exit code.

    It leads a session of its own, so that Ctrl-C reaches it once, through us, and it can stop what it has started.
    """
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
            raise
