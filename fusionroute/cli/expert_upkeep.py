"""`fusionroute experts rollback | drain | remove | reload`: what is done to experts that run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.expert_parts import (
    decide,
    drain_seconds_option,
    entry_of,
    launcher_options,
    policy_of,
    policy_option,
    run_with_parts,
)
from fusionroute.cli.group import EXIT_REFUSED, Failure
from fusionroute.cli.target import address_options, json_option

if TYPE_CHECKING:
    from fusionroute.swapping.parts import Parts, Policy
    from fusionroute.v1.registry_pb2 import ExpertEntry, ListExpertsResponse, RollbackSwapResponse


@click.command()
@click.argument("slot")
@policy_option
@address_options
@json_option
def rollback(slot: str, policy: str, address: str | None, name: str, as_json: bool) -> None:
    """Undo the latest swap of a slot while the old expert still drains.

    A swap that is still waiting for the drain notices, and stops its new expert.

    \b
    Example:
      fusionroute experts rollback math
    """

    async def work(parts: Parts) -> RollbackSwapResponse:
        return await decide(
            parts, lambda listing: parts.registry.roll_back(slot, listing.revision, policy_of(policy))
        )

    done = run_with_parts(work, address=address, name=name, launcher="process", project="")
    serving = list(done.instance_ids)
    _show(
        {"slot": slot, "serving": serving, "epoch": done.epoch},
        f"rolled back: {', '.join(serving)} serves slot {slot} again, epoch {done.epoch}",
        as_json,
    )


@click.command()
@click.argument("instance")
@policy_option
@address_options
@json_option
def drain(instance: str, policy: str, address: str | None, name: str, as_json: bool) -> None:
    """Let an expert take no new answers. The last one of a slot goes on until another one is there.

    \b
    Example:
      fusionroute experts drain math-0123456789ab
    """

    async def work(parts: Parts) -> ExpertEntry:
        return await _drain(parts, instance, policy_of(policy))

    entry = run_with_parts(work, address=address, name=name, launcher="process", project="")
    _show({"instance_id": entry.instance_id, "slot": entry.slot}, f"draining: {entry.instance_id}", as_json)


@click.command()
@click.argument("instance")
@click.option("--force", is_flag=True, help="Also when nobody else serves the slot.")
@drain_seconds_option
@policy_option
@launcher_options
@address_options
@json_option
def remove(
    instance: str,
    force: bool,
    drain_seconds: float,
    policy: str,
    launcher: str,
    project: str,
    address: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Drain an expert, wait until its sessions have left it, and stop it.

    \b
    Example:
      fusionroute experts remove math-0123456789ab
    """
    from fusionroute.swapping.parts import Timing

    async def work(parts: Parts) -> ExpertEntry:
        return await _remove(parts, instance, policy_of(policy), force=force)

    timing = Timing(drain_seconds=drain_seconds)
    entry = run_with_parts(
        work, address=address, name=name, launcher=launcher, project=project, timing=timing
    )
    _show({"instance_id": entry.instance_id, "slot": entry.slot}, f"removed: {entry.instance_id}", as_json)


@click.command()
@click.argument("target", metavar="SLOT|INSTANCE")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(0.1),
    default=300.0,
    show_default=True,
    help="Longest wait for each expert.",
)
@launcher_options
@address_options
@json_option
def reload(
    target: str,
    timeout_seconds: float,
    launcher: str,
    project: str,
    address: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Load an expert's weights anew from where it found them, or those of all experts of a slot.

    The old weights serve until the new ones are ready; a model that does not fit changes nothing. Put new files in
    place by renaming, so that nobody reads half of one.

    \b
    Example:
      fusionroute experts reload math
    """

    async def work(parts: Parts) -> list[dict[str, Any]]:
        return await _reload(parts, target, timeout_seconds)

    done = run_with_parts(work, address=address, name=name, launcher=launcher, project=project)
    lines = [f"reloaded: {each['instance_id']}, weights {each['weights_fingerprint']}" for each in done]
    _show({"reloaded": done}, "\n".join(lines), as_json)


async def _drain(parts: Parts, instance: str, policy: Policy) -> ExpertEntry:
    async def one(listing: ListExpertsResponse) -> ExpertEntry:
        entry = entry_of(listing, instance)
        await parts.registry.drain(entry.instance_id, listing.revision, policy)
        return entry

    return await decide(parts, one)


async def _remove(parts: Parts, instance: str, policy: Policy, *, force: bool) -> ExpertEntry:
    from fusionroute.swapping.parts import ready
    from fusionroute.swapping.retirement import stop_entry, wait_until_idle
    from fusionroute.v1.registry_pb2 import EXPERT_STATE_STANDBY

    listing = await parts.registry.list()
    entry = entry_of(listing, instance)
    others = [each for each in ready(listing.experts, entry.slot) if each.instance_id != entry.instance_id]
    if entry.state != EXPERT_STATE_STANDBY:
        if not others and not force:
            message = (
                f"nobody but {entry.instance_id} serves slot {entry.slot}: add another one, or use --force"
            )
            raise Failure(message, EXIT_REFUSED)
        await _drain(parts, entry.instance_id, policy)
        if others:  # else its sessions would not leave
            await wait_until_idle(parts, [entry], parts.clock() + parts.timing.drain_seconds)
    if not await stop_entry(parts, entry):
        raise Failure(f"{entry.instance_id} was not stopped")
    return entry


async def _reload(parts: Parts, target: str, timeout_seconds: float) -> list[dict[str, Any]]:
    from fusionroute.swapping.reloading import reload_instances

    listing = await parts.registry.list()
    entries = [entry for entry in listing.experts if entry.slot == target] or [entry_of(listing, target)]
    answers = await reload_instances(parts, entries, timeout_seconds)
    return [
        {
            "instance_id": entry.instance_id,
            "slot": entry.slot,
            "weights_fingerprint": answer.model.weights_fingerprint,
            "load_epoch": answer.model.epoch,
        }
        for entry, answer in zip(entries, answers, strict=True)
    ]


def _show(facts: dict[str, Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(facts, indent=2) if as_json else text)
