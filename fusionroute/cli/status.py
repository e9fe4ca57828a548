"""`fusionroute status`: what runs, where, and how busy it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import EXIT_FAILED, EXIT_NOBODY_THERE, Failure
from fusionroute.cli.target import folder_of, json_option, name_option

if TYPE_CHECKING:
    from fusionroute.stack_state import StackState
    from fusionroute.v1.common_pb2 import Load, ModelIdentity
    from fusionroute.v1.registry_pb2 import ExpertEntry
    from fusionroute.v1.router_pb2 import GetRouterInfoResponse


@dataclass(frozen=True, slots=True)
class Row:
    """One process as `status` shows it."""

    process: str
    pid: int
    # "ready", "draining", "running" (lives, but is not in the registry or does not answer), "gone"
    state: str
    address: str
    model: str = ""
    epoch: int = 0
    kv_tokens_used: int = 0
    kv_tokens_limit: int = 0
    num_sessions: int = 0
    queue_depth: int = 0
    # HOST:PORT for probes and metrics; empty without one
    watch: str = ""
    # URL for applications; empty without one
    http: str = ""


@click.command()
@name_option
@json_option
def status(name: str, as_json: bool) -> None:
    """Show the processes of the local stack: pid, state, address, epoch, key-value memory.

    Exit code 0: all are ready. 1: some are not. 3: the stack is not up.

    \b
    Example:
      fusionroute status --json
    """
    from fusionroute.stack_state import StackError, load_state

    try:
        state = load_state(folder_of(name))
    except StackError as error:
        raise Failure(str(error)) from None
    if state is None:
        raise Failure(f"no stack {name!r} is up", EXIT_NOBODY_THERE)
    routers, experts = asyncio.run(_ask(state.router_address))
    rows = describe(state, routers, experts, _answering(state))
    if as_json:
        click.echo(json.dumps({"name": name, "processes": [asdict(row) for row in rows]}, indent=2))
    else:
        _print_table(rows)
    if any(row.state != "ready" for row in rows):
        raise click.exceptions.Exit(EXIT_FAILED)


async def _ask(addresses: str) -> tuple[dict[str, GetRouterInfoResponse], list[ExpertEntry]]:
    """What the routers that answer say, by address, and the experts that one of them knows."""
    from fusionroute.client import RouterClient
    from fusionroute.errors import FusionRouteError

    routers: dict[str, GetRouterInfoResponse] = {}
    experts: list[ExpertEntry] = []
    for address in filter(None, addresses.split(",")):
        async with RouterClient.open(address) as router:
            try:
                routers[address] = await router.info(3.0)
                experts = experts or await router.list_experts(3.0)
            except FusionRouteError:
                continue
    return routers, experts


def _answering(state: StackState) -> set[str]:
    """Which of the processes without a model answer."""
    from fusionroute import private_redis
    from fusionroute.health_probe import status_of
    from fusionroute.local_stack import REDIS, TRAINER

    found = set()
    if (address := state.addresses.get(TRAINER)) and status_of(address) == "SERVING":
        found.add(TRAINER)
    if (socket := state.addresses.get(REDIS)) and private_redis.answers(Path(socket)):
        found.add(REDIS)
    return found


def describe(
    state: StackState,
    routers: Mapping[str, GetRouterInfoResponse],
    experts: list[ExpertEntry],
    answering: Collection[str] = (),
) -> list[Row]:
    """One row for each process of the stack, from its own records and from what the services say."""
    from fusionroute import processes
    from fusionroute.client import expert_state_name

    entries = {entry.address: entry for entry in experts}
    rows = []
    for record in state.processes:
        address = state.addresses.get(record.name, "")
        if processes.find(record) is None:
            rows.append(Row(record.name, record.pid, "gone", address))
        elif (info := routers.get(address)) is not None:
            rows.append(_busy(Row(record.name, record.pid, "ready", address), info.model, info.load))
        elif (entry := entries.get(address)) is not None:
            row = Row(record.name, record.pid, expert_state_name(entry.state), entry.address)
            rows.append(_busy(row, entry.model, entry.load))
        else:
            what = "ready" if record.name in answering else "running"
            rows.append(Row(record.name, record.pid, what, address))
    return [
        replace(
            row, watch=state.watch_addresses.get(row.process, ""), http=state.http_urls.get(row.process, "")
        )
        for row in rows
    ]


def _busy(row: Row, model: ModelIdentity, load: Load) -> Row:
    return Row(
        row.process, row.pid, row.state, row.address, model.name, model.epoch,
        load.kv_tokens_used, load.kv_tokens_limit, load.num_sessions, load.queue_depth,
    )  # fmt: skip


def _print_table(rows: list[Row]) -> None:
    from fusionroute.cli.console import console, table

    numbers = ("pid", "kv tokens", "sessions", "queue")
    watch = ("watch",) if any(row.watch for row in rows) else ()
    shown = table("process", "pid", "state", "address", "epoch", *numbers[1:], *watch, right=numbers)
    for row in rows:
        known = row.kv_tokens_limit > 0
        kv = f"{row.kv_tokens_used} / {row.kv_tokens_limit}" if known else "-"
        sessions, queue = (str(row.num_sessions), str(row.queue_depth)) if known else ("-", "-")
        epoch = f"{row.epoch:x}" if row.epoch else "-"
        cells = [row.process, str(row.pid), row.state, row.address or "-", epoch, kv, sessions, queue]
        shown.add_row(*cells, *([row.watch or "-"] if watch else []))
    console().print(shown)
    for row in rows:
        if row.http:
            console().print(f"{row.process} over HTTP: {row.http}", markup=False)
