"""`fusionroute checkpoints`: what training has published, and which of it routers serve."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.group import CommandGroup, Failure
from fusionroute.cli.target import (
    address_options,
    json_option,
    router_address,
    trainer_address,
    trainer_option,
    trainer_options,
)

if TYPE_CHECKING:
    from fusionroute.v1.router_pb2 import GetRouterInfoResponse
    from fusionroute.v1.trainer_pb2 import Checkpoint, ListCheckpointsResponse

POLL_SECONDS = 0.2

checkpoints = CommandGroup(
    name="checkpoints",
    commands_at={
        "list": "fusionroute.cli.checkpoints:list_checkpoints",
        "show": "fusionroute.cli.checkpoints:show",
        "promote": "fusionroute.cli.checkpoints:promote",
        "rollback": "fusionroute.cli.checkpoints:rollback",
    },
    help="""Router checkpoints that training jobs have published.

    Routers serve the one that is promoted; running answers end on the one they were begun with.

    \b
    Example:
      fusionroute checkpoints list
      fusionroute checkpoints promote run-cdpo-0f2a
      fusionroute checkpoints rollback
    """,
)

_wait_options = (
    click.option("--no-wait", is_flag=True, help="Return before the router serves it."),
    click.option(
        "--timeout",
        "timeout_seconds",
        type=click.FloatRange(0.1),
        default=600.0,
        show_default=True,
        help="Seconds to wait for the router.",
    ),
)


@click.command("list")
@click.option(
    "-n", "--limit", type=click.IntRange(1), default=100, show_default=True, help="Show the newest only."
)
@trainer_options
@json_option
def list_checkpoints(limit: int, trainer: str | None, name: str, as_json: bool) -> None:
    """List published checkpoints, newest first.

    \b
    Example:
      fusionroute checkpoints list --json
    """
    listing = asyncio.run(_list(trainer_address(trainer, name), limit))
    if as_json:
        content = {
            "revision": listing.revision,
            "checkpoints": [_as_dict(each) for each in listing.checkpoints],
        }
        click.echo(json.dumps(content, indent=2))
        return
    from fusionroute.cli.console import console, table

    shown = table("checkpoint", "promoted", "created", "experts", "combine", "fingerprint")
    for each in listing.checkpoints:
        manifest = json.loads(each.manifest)
        slots = ", ".join(expert["slot"] for expert in manifest["experts"])
        mark = "promoted" if each.promoted else ""
        shown.add_row(
            each.checkpoint_id, mark, _date(each), slots, manifest["combine"], each.fingerprint or "-"
        )
    console().print(shown)


@click.command()
@click.argument("checkpoint_id")
@trainer_options
@json_option
def show(checkpoint_id: str, trainer: str | None, name: str, as_json: bool) -> None:
    """Show where a checkpoint comes from: its experts, lineage, switches and metrics.

    \b
    Example:
      fusionroute checkpoints show run-cdpo-0f2a
    """
    found = asyncio.run(_get(trainer_address(trainer, name), checkpoint_id))
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2))
        return
    lines = {
        "checkpoint": found.checkpoint_id + (" (promoted)" if found.promoted else ""),
        "job": found.job_id,
        "created": _date(found),
        "folder": found.folder,
        "fingerprint": found.fingerprint or "-",
    }
    for label, value in lines.items():
        click.echo(f"{label:<12} {value}")
    click.echo(json.dumps(json.loads(found.manifest), indent=2))


@click.command()
@click.argument("checkpoint_id")
@_wait_options[0]
@_wait_options[1]
@trainer_option
@address_options
@json_option
def promote(checkpoint_id: str, **options: Any) -> None:
    """Make a checkpoint the one that routers serve, and wait until the router does.

    Refused when it is broken, or was trained with other experts than those that serve now.

    \b
    Example:
      fusionroute checkpoints promote run-cdpo-0f2a
    """
    _change(checkpoint_id, **options)


@click.command()
@_wait_options[0]
@_wait_options[1]
@trainer_option
@address_options
@json_option
def rollback(**options: Any) -> None:
    """Make the checkpoint before the promoted one the one that routers serve.

    Before the first promotion that is the checkpoint of each router's settings.

    \b
    Example:
      fusionroute checkpoints rollback
    """
    _change(None, **options)


def _change(
    checkpoint_id: str | None,
    *,
    no_wait: bool,
    timeout_seconds: float,
    trainer: str | None,
    address: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Promotes a checkpoint, or rolls back where none is given."""
    from fusionroute.cli.console import console

    at = trainer_address(trainer, name)
    router = None if no_wait else router_address(address, name)
    with console(stderr=True).status("the trainer loads and checks it"):
        promoted_id, revision = asyncio.run(tell_trainer(at, checkpoint_id))
    told = {"checkpoint_id": promoted_id, "revision": revision}
    if router is None:
        what = promoted_id or "the checkpoint of each router's settings"
        click.echo(json.dumps(told) if as_json else f"promoted: {what} (revision {revision})")
        return
    with console(stderr=True).status(f"the router on {router} loads it"):
        info = asyncio.run(wait_for_router(router, revision, timeout_seconds))
    if as_json:
        click.echo(json.dumps(told | {"router": router, "fingerprint": info.checkpoint}))
    else:
        what = info.checkpoint_id or "the checkpoint of its settings"
        click.echo(f"the router on {router} serves {what} (revision {info.promotion_revision})")


async def _list(address: str, limit: int) -> ListCheckpointsResponse:
    from fusionroute.trainer_client import TrainerClient

    async with TrainerClient.open(address) as trainer:
        return await trainer.list_checkpoints(limit)


async def _get(address: str, checkpoint_id: str) -> Checkpoint:
    from fusionroute.trainer_client import TrainerClient

    async with TrainerClient.open(address) as trainer:
        return await trainer.get_checkpoint(checkpoint_id)


async def tell_trainer(address: str, checkpoint_id: str | None) -> tuple[str, int]:
    """Promotes a checkpoint, or rolls back where none is given.

    Returns:
        The id that is promoted now, empty for the routers' own, and the revision.
    """
    from fusionroute.trainer_client import TrainerClient

    async with TrainerClient.open(address) as trainer:
        seen = (await trainer.list_checkpoints(1)).revision
        if checkpoint_id is not None:
            return checkpoint_id, await trainer.promote(checkpoint_id, seen)
        answer = await trainer.rollback(seen)
        return answer.checkpoint.checkpoint_id, answer.revision


async def wait_for_router(address: str, revision: int, timeout_seconds: float) -> GetRouterInfoResponse:
    """What the router says once it has acted upon the revision.

    Raises:
        Failure: it could not serve the checkpoint, or did not act in time.
    """
    from fusionroute.client import RouterClient

    deadline = time.monotonic() + timeout_seconds
    async with RouterClient.open(address) as router:
        while (info := await router.info()).promotion_revision < revision:
            if time.monotonic() > deadline:
                raise Failure(
                    f"the router on {address} has not taken up revision {revision} within {timeout_seconds:g} s"
                    f" (it is at {info.promotion_revision}): does it share the trainer's Redis and checkpoints_dir?"
                )
            await asyncio.sleep(POLL_SECONDS)
    if info.promotion_error:
        raise Failure(f"the router on {address} goes on with what it had: {info.promotion_error}")
    return info


def _as_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    content: dict[str, Any] = MessageToDict(
        checkpoint, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return content | {"manifest": json.loads(checkpoint.manifest)}


def _date(checkpoint: Checkpoint) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(checkpoint.created_at_seconds))
