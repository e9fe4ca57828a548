"""What the commands that change experts have in common: launchers, policies, progress, and how failures end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fusionroute.cli.group import EXIT_FAILED, EXIT_REFUSED, Failure
from fusionroute.cli.target import folder_of, router_address

if TYPE_CHECKING:
    from fusionroute.launching import Launcher
    from fusionroute.swapping.parts import OnProgress, Parts, Policy, Timing
    from fusionroute.v1.registry_pb2 import ExpertEntry, ListExpertsResponse

Command = TypeVar("Command", bound=Callable[..., Any])
Result = TypeVar("Result")

LAUNCHERS = ("process", "docker")
POLICIES = ("migrate", "finish")
NUM_TRIES = 10


def launcher_options(command: Command) -> Command:
    """--launcher and --project: how experts are started and stopped, and found."""
    project = click.option(
        "--project",
        default="",
        metavar="NAME",
        help="Compose project of the docker launcher; else the only one.",
    )
    launcher = click.option(
        "--launcher",
        type=click.Choice(LAUNCHERS),
        default="process",
        show_default=True,
        help="Experts are processes of the local stack, or containers of a compose project.",
    )
    return launcher(project(command))


def policy_option(command: Command) -> Command:
    """--policy: what becomes of running turns."""
    return click.option(
        "--policy",
        type=click.Choice(POLICIES),
        default="migrate",
        show_default=True,
        help="Running answers move to another expert at their next token, or finish with the one that drains.",
    )(command)


def drain_seconds_option(command: Command) -> Command:
    """--drain-seconds: patience with sessions."""
    return click.option(
        "--drain-seconds",
        type=click.FloatRange(0),
        default=60.0,
        show_default=True,
        help="Longest wait for sessions to leave before the expert is stopped.",
    )(command)


def device_option(command: Command) -> Command:
    """--device: of an expert that is started."""
    return click.option(
        "--device", default="", metavar="NAME", help="Where it runs; else where the slot's expert does."
    )(command)


def start_seconds_option(command: Command) -> Command:
    """--start-seconds: patience with an expert that is started."""
    return click.option(
        "--start-seconds",
        type=click.FloatRange(0.1),
        default=300.0,
        show_default=True,
        help="Longest wait for the new expert to load.",
    )(command)


def policy_of(name: str) -> Policy:
    """The policy as the registry knows it."""
    from fusionroute.v1.registry_pb2 import DRAIN_POLICY_FINISH, DRAIN_POLICY_MIGRATE

    return DRAIN_POLICY_FINISH if name == "finish" else DRAIN_POLICY_MIGRATE


def run_with_parts(
    work: Callable[[Parts], Awaitable[Result]],
    *,
    address: str | None,
    name: str,
    launcher: str,
    project: str,
    timing: Timing | None = None,
) -> Result:
    """Does asynchronous work with a registry and a launcher; what goes wrong becomes a Failure."""
    from fusionroute.access import ClientAccess
    from fusionroute.launching import LaunchFailed
    from fusionroute.swapping.expert_client import ExpertClient
    from fusionroute.swapping.parts import Parts, SwapFailed, SwapRefused, Timing
    from fusionroute.swapping.registry_client import RegistryClient

    router, access = router_address(address, name), ClientAccess.from_environment()

    async def run() -> Result:
        async with RegistryClient.open(router, access) as registry:
            parts = Parts(
                registry,
                _launcher(launcher, name, project),
                lambda at: ExpertClient.open(at, access),
                _progress(),
                timing or Timing(),
            )
            return await work(parts)

    try:
        return asyncio.run(run())
    except SwapFailed as error:
        code = EXIT_REFUSED if isinstance(error, SwapRefused) else EXIT_FAILED
        raise Failure(f"{error.step.value}: {error}", code, _quoted(error.log_tail)) from None
    except LaunchFailed as error:
        raise Failure(str(error), EXIT_FAILED, _quoted(error.log_tail)) from None


async def decide(parts: Parts, decision: Callable[[ListExpertsResponse], Awaitable[Result]]) -> Result:
    """A decision about the registry as it is now; made anew when something else changed it meanwhile.

    Raises:
        FusionRouteError: as the decision does; REVISION_CONFLICT when it changes all the time.
    """
    from fusionroute.errors import FusionRouteError, Reason

    for left in reversed(range(NUM_TRIES)):
        try:
            return await decision(await parts.registry.list())
        except FusionRouteError as error:
            if error.reason is not Reason.REVISION_CONFLICT or not left:
                raise
            await asyncio.sleep(parts.timing.poll_seconds)
    raise AssertionError("the last try returns or raises")


def entry_of(listing: ListExpertsResponse, instance: str) -> ExpertEntry:
    """The living entry of an instance, named by its id or its address. Raises Failure."""
    for entry in listing.experts:
        if instance in (entry.instance_id, entry.address):
            return entry
    known = ", ".join(entry.instance_id for entry in listing.experts) or "none"
    raise Failure(f"no instance {instance!r} is in the registry; known: {known}", EXIT_REFUSED)


def _launcher(kind: str, name: str, project: str) -> Launcher:
    if kind == "docker":
        from fusionroute.launching.docker_launcher import DockerLauncher, connect

        return DockerLauncher(connect(), project)
    from fusionroute.launching.process_launcher import ProcessLauncher

    return ProcessLauncher(folder_of(name))


def _progress() -> OnProgress:
    started_at = time.monotonic()

    def tell(step: object, detail: str) -> None:
        click.echo(f"{time.monotonic() - started_at:6.1f} s  {step.value:<9} {detail}", err=True)  # type: ignore[attr-defined]

    return tell


def _quoted(lines: list[str]) -> str:
    return "\n".join(f"  | {line}" for line in lines)
