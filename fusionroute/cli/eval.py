"""`fusionroute eval`: how well systems answer, with intervals, and whether one is better than another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import CommandGroup, Failure
from fusionroute.cli.target import json_option

if TYPE_CHECKING:
    from evaluation.lab.plan import LabPlan

evaluation_group = CommandGroup(
    name="eval",
    commands_at={
        "run": "fusionroute.cli.eval:run",
        "compare": "fusionroute.cli.eval:compare",
        "list": "fusionroute.cli.eval:list_suites",
        "judge": "fusionroute.cli.eval_judge:judge",
        "harness": "fusionroute.cli.eval_harness:harness",
    },
    help="""How well systems answer, with intervals, and whether one is better than another.

    \b
    Example:
      fusionroute eval run --suite lab --output results/lab
      fusionroute eval compare results/lab cdpo/sum sft/route
    """,
)


@click.command("run")
@click.option("--suite", required=True, metavar="NAME|FILE", help="A suite of `eval list`, or a TOML file.")
@click.option("--output", type=click.Path(path_type=Path), required=True, metavar="DIR",
              help="Where answers and report go; an earlier run there is gone on with.")  # fmt: skip
@click.option("--seeds", metavar="N,N,...", help="Training seeds instead of the suite's (lab suites).")
@click.option(
    "--per-task", type=click.IntRange(1), metavar="N", help="Questions of each task instead of the suite's."
)
@click.option("--variants", "names", metavar="NAME,...|all|none",
              help="Further routers and models instead of the suite's (lab suites).")  # fmt: skip
@click.option("--address", metavar="HOST:PORT", help="The router to ask (suites in files).")
@json_option
def run(
    suite: str,
    output: Path,
    seeds: str | None,
    per_task: int | None,
    names: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Ask every system every question, and write a report: Markdown, JSON, pictures.

    The lab's suites need nothing: models are trained (or found in the cache), served, asked and compared. A suite in a
    file names tasks and systems, and asks a running router. What was answered is kept as it comes, so a stopped run is
    gone on with by the same command.

    \b
    Example:
      fusionroute eval run --suite lab-quick --output results/quick
      fusionroute eval run --suite my-suite.toml --address 127.0.0.1:50050 --output results/mine
    """
    from evaluation.lab.plan import PLANS
    from evaluation.report import print_main_table
    from fusionroute.cli.console import console

    screen = console(stderr=True)
    if suite in PLANS:
        from fusionroute.cli.eval_lab import run_lab

        findings = run_lab(_plan(PLANS[suite], seeds, per_task, names), output, screen)
    elif suite.endswith(".toml"):
        from fusionroute.cli.eval_suite import run_suite

        findings = run_suite(Path(suite), output, address, per_task, screen)
    else:
        raise Failure(f"--suite {suite} is neither a file that ends with .toml nor one of {', '.join(PLANS)}")
    if as_json:
        click.echo((output / "report.json").read_text(encoding="utf-8"), nl=False)
        return
    print_main_table(findings, console())
    click.echo(f"\nreport: {output / 'report.md'}")


@click.command("compare")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("first")
@click.argument("second")
@click.option("--with", "other", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR",
              help="Another evaluation of the same questions, in which SECOND is found.")  # fmt: skip
@click.option("--stratum", "strata", multiple=True, metavar="DIVISION=PART",
              help="On these questions; repeatable.  [default: all, and every part of every division]")  # fmt: skip
@json_option
def compare(
    folder: Path, first: str, second: str, other: Path | None, strata: tuple[str, ...], as_json: bool
) -> None:
    """Is FIRST better than SECOND? Paired on the same questions, with intervals, adjusted for looking many times.

    \b
    Example:
      fusionroute eval compare results/lab cdpo/sum sft/route --stratum coverage=gap
      fusionroute eval compare results/new sum sum --with results/old
    """
    import json
    from dataclasses import asdict

    from evaluation.pairing import compare_scores
    from evaluation.scores import Scores
    from evaluation.statistics.verdicts import verdict_sentence

    mine = Scores.read(folder)
    theirs = mine if other is None else Scores.read(other)
    try:
        found, labels = compare_scores(mine, first, theirs, second, strata)
    except ValueError as error:
        raise Failure(str(error)) from None
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=2))
        return
    for each in found:
        click.echo(verdict_sentence(each, labels))


@click.command("list")
def list_suites() -> None:
    """The suites that come with the project.

    \b
    Example:
      fusionroute eval list
    """
    from evaluation.lab.plan import PLANS

    for plan in PLANS.values():
        seeds = ", ".join(map(str, plan.seeds))
        click.echo(
            f"{plan.name:<14} models of size {plan.size}, training seeds {seeds}; {plan.per_task} held-out and "
            f"{plan.per_task_seen} seen questions of each task; {len(plan.variants)} further routers and models"
        )


def _plan(plan: LabPlan, seeds: str | None, per_task: int | None, names: str | None) -> LabPlan:
    from dataclasses import replace

    from fusionroute.cli.lab import parse_seeds, parse_variants

    if names is not None:
        plan = replace(plan, variants=parse_variants("" if names == "none" else names))

    if seeds is not None:
        plan = replace(plan, seeds=tuple(parse_seeds(seeds)))
    if per_task is not None:
        plan = replace(
            plan,
            per_task=per_task,
            per_task_seen=min(plan.per_task_seen, per_task),
            per_task_written=min(plan.per_task_written, per_task),
        )
    return plan
