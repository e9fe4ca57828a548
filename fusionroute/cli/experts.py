"""`fusionroute experts`: who serves which slot."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import CommandGroup
from fusionroute.cli.target import address_options, json_option, router_address

if TYPE_CHECKING:
    from fusionroute.v1.registry_pb2 import ExpertEntry
    from fusionroute.v1.router_pb2 import GetRouterInfoResponse

experts = CommandGroup(
    name="experts",
    commands_at={
        "list": "fusionroute.cli.experts:list_experts",
        "add": "fusionroute.cli.expert_changes:add",
        "swap": "fusionroute.cli.expert_changes:swap",
        "rollback": "fusionroute.cli.expert_upkeep:rollback",
        "drain": "fusionroute.cli.expert_upkeep:drain",
        "remove": "fusionroute.cli.expert_upkeep:remove",
        "reload": "fusionroute.cli.expert_upkeep:reload",
    },
    help="""The experts that a router can call, and changing them while answers are being written.

    \b
    Example:
      fusionroute experts list
      fusionroute experts swap math --model models/math-v2
    """,
)


@click.command("list")
@address_options
@json_option
def list_experts(address: str | None, name: str, as_json: bool) -> None:
    """List the slots of the router's checkpoint and who serves them.

    \b
    Example:
      fusionroute experts list --json
    """
    info, entries = asyncio.run(_ask(router_address(address, name)))
    if as_json:
        from google.protobuf.json_format import MessageToDict

        slots = [slot.slot for slot in info.slots]
        known = [MessageToDict(entry, preserving_proto_field_name=True) for entry in entries]
        click.echo(json.dumps({"slots": slots, "experts": known}, indent=2))
        return
    _print_table(info, entries)


async def _ask(address: str) -> tuple[GetRouterInfoResponse, list[ExpertEntry]]:
    from fusionroute.client import RouterClient

    async with RouterClient.open(address) as router:
        return await router.info(), await router.list_experts()


def _print_table(info: GetRouterInfoResponse, entries: list[ExpertEntry]) -> None:
    from fusionroute.cli.console import console, table
    from fusionroute.client import expert_state_name

    headings = ("slot", "state", "instance", "epoch", "address", "family", "dtype", "kv tokens", "lease s")
    shown = table(*headings, "model")
    for slot in info.slots:
        serving = [entry for entry in entries if entry.slot == slot.slot]
        if not serving:
            shown.add_row(slot.slot, "nobody", *["-"] * len(headings[1:]))
        for entry in serving:
            shown.add_row(
                entry.slot,
                expert_state_name(entry.state),
                entry.instance_id,
                str(entry.epoch or "-"),
                entry.address,
                entry.model.family,
                _dtype_name(entry.model.dtype),
                f"{entry.load.kv_tokens_used} / {entry.load.kv_tokens_limit}",
                f"{entry.lease_remaining_seconds:.1f}",
                entry.model.name,
            )
    console().print(shown)


def _dtype_name(dtype: int) -> str:
    from fusionroute.v1.common_pb2 import Dtype

    return Dtype.Name(Dtype.ValueType(dtype)).removeprefix("DTYPE_").lower()
