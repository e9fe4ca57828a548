"""`fusionroute jobs`: what a trainer is doing, has done and is to do."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import EXIT_FAILED, CommandGroup, Failure
from fusionroute.cli.job_facts import date_of, doing, job_facts, name_of, took
from fusionroute.cli.target import json_option, trainer_address, trainer_options

if TYPE_CHECKING:
    from fusionroute.v1.trainer_pb2 import Job

jobs = CommandGroup(
    name="jobs",
    commands_at={
        "list": "fusionroute.cli.jobs:list_jobs",
        "get": "fusionroute.cli.jobs:get",
        "watch": "fusionroute.cli.jobs:watch",
        "logs": "fusionroute.cli.jobs:logs",
        "cancel": "fusionroute.cli.jobs:cancel",
        "resume": "fusionroute.cli.jobs:resume",
    },
    help="""Training jobs of a trainer service; `fusionroute train` submits them.

    \b
    Example:
      fusionroute jobs list
      fusionroute jobs watch 3f2a90c1d4e5
    """,
)


@click.command("list")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="Most jobs to show."
)
@trainer_options
@json_option
def list_jobs(limit: int, trainer: str | None, name: str, as_json: bool) -> None:
    """List jobs, newest first.

    \b
    Example:
      fusionroute jobs list --json
    """
    found = asyncio.run(_list(trainer_address(trainer, name), limit))
    if as_json:
        click.echo(json.dumps([job_facts(job) for job in found], indent=2))
        return
    from fusionroute.cli.console import console, table
    from fusionroute.trainer_client import kind_name, state_name

    shown = table(
        "job", "kind", "name", "state", "submitted", "took", "tries", "why", right=("took", "tries")
    )
    for job in found:
        shown.add_row(
            job.job_id, kind_name(job.kind), name_of(job), state_name(job.state), date_of(job.submitted_at_seconds),
            took(job), str(job.num_attempts), doing(job),
        )  # fmt: skip
    console().print(shown)


@click.command()
@click.argument("job_id")
@trainer_options
@json_option
def get(job_id: str, trainer: str | None, name: str, as_json: bool) -> None:
    """Show one job: state, progress, configuration, folder.

    \b
    Example:
      fusionroute jobs get 3f2a90c1d4e5
    """
    job = asyncio.run(_get(trainer_address(trainer, name), job_id))
    if as_json:
        click.echo(json.dumps(job_facts(job), indent=2))
        return
    facts = job_facts(job)
    config = facts.pop("config")
    for label, value in facts.items():
        if value not in ("", None, {}):
            click.echo(f"{label:<24}{value}")
    click.echo(json.dumps(config, indent=2))


@click.command()
@click.argument("job_id")
@trainer_options
@json_option
def watch(job_id: str, trainer: str | None, name: str, as_json: bool) -> None:
    """Follow a job until it has ended; a trainer that is restarted meanwhile is waited for.

    Progress goes to standard error: bars on a terminal, lines elsewhere. With --json each change is one line of
    JSON on standard output. Exit code 0: it succeeded. 1: it failed or was cancelled.

    \b
    Example:
      fusionroute jobs watch 3f2a90c1d4e5
    """
    job = asyncio.run(_watch(trainer_address(trainer, name), job_id, as_json))
    _report_end(job, is_told=as_json)


@click.command()
@click.argument("job_id")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job has ended.")
@click.option(
    "--from",
    "from_offset",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="BYTES",
    help="Skip so much.",
)
@trainer_options
def logs(job_id: str, follow: bool, from_offset: int, trainer: str | None, name: str) -> None:
    """Print what a job has logged, in all its attempts.

    \b
    Example:
      fusionroute jobs logs 3f2a90c1d4e5 --follow
    """
    asyncio.run(_print_log(trainer_address(trainer, name), job_id, from_offset, follow))


@click.command()
@click.argument("job_id")
@click.option("--discard", is_flag=True, help="Do not save the steps since the last saved state.")
@click.option("--wait", is_flag=True, help="Return when the job has stopped.")
@trainer_options
@json_option
def cancel(job_id: str, discard: bool, wait: bool, trainer: str | None, name: str, as_json: bool) -> None:
    """Stop a job. It saves its state first and can be resumed.

    \b
    Example:
      fusionroute jobs cancel 3f2a90c1d4e5 --wait
    """
    job = asyncio.run(_cancel(trainer_address(trainer, name), job_id, discard, wait))
    _print_state(job, as_json)


@click.command()
@click.argument("job_id")
@click.option("--watch", "watching", is_flag=True, help="Follow the job until it has ended.")
@trainer_options
@json_option
def resume(job_id: str, watching: bool, trainer: str | None, name: str, as_json: bool) -> None:
    """Queue a cancelled or failed job again; it goes on from its last saved state.

    \b
    Example:
      fusionroute jobs resume 3f2a90c1d4e5 --watch
    """
    address = trainer_address(trainer, name)
    job = asyncio.run(_resume(address, job_id))
    if not watching:
        _print_state(job, as_json)
        return
    _report_end(asyncio.run(_watch(address, job_id, as_json)), is_told=as_json)


async def _list(address: str, limit: int) -> list[Job]:
    from fusionroute.trainer_client import TrainerClient

    async with TrainerClient.open(address) as client:
        return await client.list_jobs(limit)


async def _get(address: str, job_id: str) -> Job:
    from fusionroute.trainer_client import TrainerClient

    async with TrainerClient.open(address) as client:
        return await client.get(job_id)


async def _watch(address: str, job_id: str, as_json: bool) -> Job:
    """Shows every change; the job as it ended."""
    from fusionroute.cli.train_progress import progress_of, shown_progress
    from fusionroute.trainer_client import TrainerClient

    latest: Job | None = None
    async with TrainerClient.open(address) as client, aclosing(client.watch(job_id)) as changes:
        if as_json:
            async for latest in changes:
                click.echo(json.dumps(job_facts(latest)))
        else:
            with shown_progress() as show:
                async for latest in changes:
                    if latest.progress.stage:
                        show(progress_of(latest.progress))
    assert latest is not None, "a watch begins with the job as it is"
    return latest


async def _print_log(address: str, job_id: str, from_offset: int, follow: bool) -> None:
    from fusionroute.trainer_client import TrainerClient

    async with (
        TrainerClient.open(address) as client,
        aclosing(client.read_log(job_id, from_offset, follow=follow)) as pieces,
    ):
        async for piece in pieces:
            # Bytes as they are: a piece may end within a character.
            sys.stdout.buffer.write(piece.text)
            sys.stdout.buffer.flush()


async def _cancel(address: str, job_id: str, discard: bool, wait: bool) -> Job:
    from fusionroute.trainer_client import TrainerClient

    async with TrainerClient.open(address) as client:
        job = await client.cancel(job_id, discard=discard)
        if wait:
            async with aclosing(client.watch(job_id)) as changes:
                async for changed in changes:
                    job = changed
    return job


async def _resume(address: str, job_id: str) -> Job:
    from fusionroute.trainer_client import TrainerClient

    async with TrainerClient.open(address) as client:
        return await client.resume(job_id)


def _report_end(job: Job, *, is_told: bool) -> None:
    """Says how a job ended; a failure unless it succeeded."""
    from fusionroute.trainer_client import state_name

    if state_name(job.state) != "succeeded":
        reason = f": {job.state_reason}" if job.state_reason else ""
        raise Failure(f"job {job.job_id} {state_name(job.state)}{reason}", EXIT_FAILED)
    if not is_told:
        click.echo(f"{'checkpoint':<12}{job.checkpoint_id}" if job.checkpoint_id else job.state_reason)


def _print_state(job: Job, as_json: bool) -> None:
    from fusionroute.trainer_client import state_name

    if as_json:
        click.echo(json.dumps(job_facts(job), indent=2))
    else:
        reason = f": {job.state_reason}" if job.state_reason else ""
        click.echo(f"{job.job_id} {state_name(job.state)}{reason}")
