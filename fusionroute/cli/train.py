"""`fusionroute train`: router checkpoints and what they are made of, by a trainer service or right here."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.group import EXIT_FAILED, CommandGroup, Failure
from fusionroute.cli.target import json_option, name_option
from fusionroute.cli.train_config import KINDS, read_config

if TYPE_CHECKING:
    from fusionroute.cli.train_local import LocalResult
    from fusionroute.v1.trainer_pb2 import Job
    from trainer.config import JobConfig

train = CommandGroup(
    name="train",
    commands_at={
        "template": "fusionroute.cli.train_checks:template",
        "validate": "fusionroute.cli.train_checks:validate",
        "label": "fusionroute.cli.train:label",
        "sft": "fusionroute.cli.train:sft",
        "pairs": "fusionroute.cli.train:pairs",
        "cdpo": "fusionroute.cli.train:cdpo",
        "extend": "fusionroute.cli.train:extend",
        "report": "fusionroute.cli.train_checks:report",
    },
    help="""Make router checkpoints: labels of the experts, phase I (sft), pairs, phase II (cdpo).

    A job goes to the trainer service of the local stack, or with --local runs in this process.

    \b
    Example:
      fusionroute train template sft > sft.toml
      fusionroute train validate sft.toml
      fusionroute train sft sft.toml --local
    """,
)

CONFIG = click.Path(exists=True, dir_okay=False, path_type=Path)
KINDS_OF_CHECKPOINTS = ("sft", "cdpo", "extend")


def _job_command(kind: str, help_text: str, example: str) -> click.Command:
    """The command of one kind of job; all take the same options."""

    def run(config: Path, **options: Any) -> None:
        _train(kind, config, **options)

    for decorate in reversed(_options(kind)):
        run = decorate(run)
    lines = ["Example:", *(f"  {line}" for line in example.splitlines())]
    return click.command(kind, help=help_text + "\n\n\b\n" + "\n".join(lines))(run)


def _options(kind: str) -> list[Callable[[Any], Any]]:
    output = click.option(
        "--output",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Move the finished checkpoint there (with --local); must not exist yet.",
    )
    from_url = click.option(
        "--from-url",
        metavar="URL",
        help="Ask the model of this server (TGI, or OpenAI's API) instead of the router; as remote.url (with --local).",
    )
    return [
        click.argument("config", type=CONFIG),
        click.option(
            "--set", "changes", multiple=True, metavar="KEY=VALUE",
            help="Change a field of CONFIG, for example training.epochs=4. May be given again.",
        ),
        click.option("--local", is_flag=True, help="Run here, without any service. Ctrl-C saves and stops."),
        click.option(
            "--run-folder",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="DIR",
            help="Of a local run; what an earlier one left there is continued.  [default: runs/NAME-KIND]",
        ),
        *([output] if kind in KINDS_OF_CHECKPOINTS else []),
        *([from_url] if kind == "pairs" else []),
        click.option("--detach", is_flag=True, help="Submit the job and return; see `fusionroute jobs`."),
        click.option(
            "--key", metavar="TEXT", help="Idempotency key: the same one again finds the job it made.  [default: drawn]"
        ),
        click.option(
            "--trainer",
            metavar="HOST:PORT",
            help="Trainer service; else $FUSIONROUTE_TRAINER, else the local stack's.",
        ),
        name_option,
        json_option,
    ]  # fmt: skip


label = _job_command(
    "label",
    "Ask every expert about every target of a data set, once, and keep the answers.",
    "fusionroute train label label.toml --local",
)
sft = _job_command(
    "sft",
    "Phase I: router and routing head from labelled texts, then the gates.",
    "fusionroute train sft sft.toml --local --output checkpoints/sft\n"
    "fusionroute train sft sft.toml --set training.epochs=4 --detach",
)
pairs = _job_command(
    "pairs",
    "Collect wrong answers of the serving router as rejected ones beside the gold answers.",
    "fusionroute train pairs pairs.toml --local",
)
cdpo = _job_command(
    "cdpo",
    "Phase II: preference pairs mixed with SFT rows, from a checkpoint of phase I.",
    "fusionroute train cdpo cdpo.toml --local --output checkpoints/cdpo",
)
extend = _job_command(
    "extend",
    "Add an expert to an existing router: one new row of its head, everything else as it was.",
    "fusionroute train extend extend.toml --local --output checkpoints/extended",
)
assert {label.name, sft.name, pairs.name, cdpo.name, extend.name} == set(KINDS)


def _train(
    kind: str,
    path: Path,
    *,
    changes: tuple[str, ...],
    local: bool,
    run_folder: Path | None,
    detach: bool,
    key: str | None,
    trainer: str | None,
    name: str,
    as_json: bool,
    output: Path | None = None,
    from_url: str | None = None,
) -> None:
    if local and (detach or key or trainer):
        raise click.UsageError("--local runs here: leave --detach, --key, --trainer out")
    if not local and (run_folder or output):
        raise click.UsageError(
            "--run-folder and --output are for --local; a service publishes its checkpoints itself"
        )
    if from_url:
        changes = (*changes, f"remote.url={json.dumps(from_url)}")
    config = read_config(kind, path, changes)
    if not local and getattr(config, "remote", None) is not None:
        raise click.UsageError("--from-url and remote are for --local: a service shows its keys to nobody's servers")
    if local:
        from fusionroute.cli.train_local import run_here

        folder = run_folder or Path("runs") / f"{config.name}-{kind}"
        print_result(run_here(config, folder, output), as_json)
        return
    from fusionroute.cli.target import trainer_address

    asyncio.run(
        _submit(kind, config, trainer_address(trainer, name), key or uuid.uuid4().hex, detach, as_json)
    )


def print_result(result: LocalResult, as_json: bool) -> None:
    """What a local run has made, for people or for scripts."""
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2, default=float))
        return
    click.echo(f"{'checkpoint' if result.is_checkpoint else 'made':<12}{result.artifact}")
    if result.report is not None:
        click.echo(f"{'report':<12}{result.report}")
    plain = {
        name: value
        for name, value in result.metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    room = max(map(len, plain), default=0)
    for name, value in plain.items():
        click.echo(f"  {name:<{room}}  {value:.6g}")


async def _submit(kind: str, config: JobConfig, address: str, key: str, detach: bool, as_json: bool) -> None:
    from fusionroute.trainer_client import TrainerClient, state_name

    async with TrainerClient.open(address) as trainer:
        submitted = await trainer.submit(kind, config.to_json(), key)
        job = submitted.job
        if not detach:
            click.echo(
                f"job {job.job_id} {'submitted' if submitted.created else 'was submitted before'}", err=True
            )
            try:
                job = await _watch(trainer.watch(job.job_id))
            except (asyncio.CancelledError, KeyboardInterrupt):
                click.echo(f"the job goes on; fusionroute jobs watch|cancel {job.job_id}", err=True)
                raise
    if as_json:
        click.echo(json.dumps(_job_facts(kind, job), indent=2))
    elif detach:
        click.echo(job.job_id)
    elif job.checkpoint_id:
        click.echo(f"checkpoint  {job.checkpoint_id}\nfolder      {job.folder}")
        click.echo(f"serve it: fusionroute checkpoints promote {job.checkpoint_id}", err=True)
    elif state_name(job.state) == "succeeded":
        click.echo(job.state_reason)
    if not detach and state_name(job.state) != "succeeded":
        reason = f": {job.state_reason}" if job.state_reason else ""
        raise Failure(
            f"job {job.job_id} {state_name(job.state)}{reason}\nits log: fusionroute jobs logs {job.job_id}",
            EXIT_FAILED,
        )


async def _watch(jobs: Any) -> Job:
    """Shows a job's progress until it has ended; its last state."""
    from contextlib import aclosing

    from fusionroute.cli.train_progress import progress_of, shown_progress

    latest: Job | None = None
    with shown_progress() as show:
        async with aclosing(jobs):
            async for job in jobs:
                latest = job
                if job.progress.stage:
                    show(progress_of(job.progress))
    assert latest is not None, "a watch begins with the job as it is"
    return latest


def _job_facts(kind: str, job: Job) -> dict[str, Any]:
    from fusionroute.trainer_client import state_name

    return {
        "job_id": job.job_id,
        "kind": kind,
        "state": state_name(job.state),
        "state_reason": job.state_reason,
        "checkpoint_id": job.checkpoint_id,
        "folder": job.folder,
        "num_attempts": job.num_attempts,
        "metrics": dict(job.progress.metrics),
    }
