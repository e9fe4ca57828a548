"""The single checks of `fusionroute doctor`. Each looks at one thing and gives its verdict; none raises."""

from __future__ import annotations

import asyncio
import os
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]

GIB = 2**30
MIN_MEMORY_BYTES = 2 * GIB
MIN_DISK_BYTES = 1 * GIB
MIN_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Check:
    """What was found of one thing, and what to do about it."""

    name: str
    verdict: Verdict
    finding: str
    advice: str = ""


def all_checks(stack_folder: Path, port: int) -> list[Check]:
    """All checks, in the order in which trouble would come."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("redis", check_redis),
        ("port", lambda: check_port(port, stack_folder)),
        ("cache", check_cache),
        ("memory", check_memory),
        ("threads", check_threads),
        ("kernels", check_kernels),
        ("device", check_device),
        ("stack", lambda: check_stack(stack_folder)),
    ]
    return [_guarded(name, look) for name, look in checks]


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    try:
        return look()
    except Exception as error:
        return Check(name, "fail", f"the check itself failed: {type(error).__name__}: {error}")


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """The interpreter."""
    finding = f"{platform.python_implementation()} {'.'.join(map(str, version))} on {platform.machine()}"
    if version < MIN_PYTHON:
        return Check("python", "fail", finding, "FusionRoute needs Python 3.11 or newer.")
    return Check("python", "ok", finding)


def check_packages(version_of: Callable[[str], str] = metadata.version) -> Check:
    """Whether each declared dependency is there in a version that it may have."""
    from packaging.requirements import Requirement

    wrong, shown = [], []
    for text in metadata.requires("fusionroute") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = version_of(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in ("torch", "transformers", "grpcio"):
            shown.append(f"{requirement.name} {version}")
    if wrong:
        return Check("packages", "fail", "; ".join(wrong), "Install FusionRoute anew into this environment.")
    return Check("packages", "ok", ", ".join(shown))


def check_redis() -> Check:
    """The Redis that a router would use: REDIS_URL's, or a private one."""
    from fusionroute import private_redis
    from fusionroute.errors import FusionRouteError

    url = os.environ.get("FUSIONROUTE_ROUTER_REDIS_URL") or os.environ.get("REDIS_URL")
    try:
        if not url:
            return Check("redis", "ok", f"private, started from {private_redis.find_redis_server()}")
        asyncio.run(_ping_redis(url))
    except FusionRouteError as error:
        return Check("redis", "fail", error.message)
    return Check("redis", "ok", f"{private_redis.masked_url(url)} answers")


async def _ping_redis(url: str) -> None:
    from fusionroute import private_redis

    client = private_redis.connect(url)
    try:
        await private_redis.check(client)
    finally:
        await client.aclose()


def check_port(port: int, stack_folder: Path) -> Check:
    """Whether the router's port is free, or taken by our own stack."""
    from fusionroute.stack_state import load_state

    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            pass
        else:
            return Check("port", "ok", f"{port} is free")
    state = load_state(stack_folder)
    if state is not None and state.alive and f":{port}" in state.router_address:
        return Check("port", "ok", f"{port} is taken by the stack {stack_folder.name!r}")
    return Check(
        "port", "warn", f"{port} is taken by another program", "Give `fusionroute up` another --port."
    )


def check_cache() -> Check:
    """Whether there is a place for the lab's models."""
    import shutil

    folder = Path(os.environ.get("FUSIONROUTE_CACHE_DIR") or "~/.cache/fusionroute").expanduser()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return Check("cache", "fail", f"{folder} cannot be written", "Set FUSIONROUTE_CACHE_DIR.")
    free_bytes = shutil.disk_usage(existing).free
    families = sorted(path.parent.name for path in folder.glob("lab/*/COMPLETE"))
    known = f"lab families: {', '.join(families)}" if families else "no lab family built yet"
    finding = f"{folder}, {free_bytes / GIB:.1f} GiB free, {known}"
    if free_bytes < MIN_DISK_BYTES:
        return Check("cache", "warn", finding, "Little room for models: set FUSIONROUTE_CACHE_DIR elsewhere.")
    return Check("cache", "ok", finding)


def check_memory() -> Check:
    """Whether router and experts of the lab fit."""
    import psutil

    free_bytes = psutil.virtual_memory().available
    finding = f"{free_bytes / GIB:.1f} GiB available"
    if free_bytes < MIN_MEMORY_BYTES:
        return Check("memory", "warn", finding, "Four small processes need about 2 GiB.")
    return Check("memory", "ok", finding)


def check_threads() -> Check:
    """How many threads each process of a stack of four would get."""
    from fusionroute.local_stack import threads_for

    cores = len(os.sched_getaffinity(0))
    each = threads_for(4)
    finding = f"{cores} cores, {each} torch thread{'s' if each > 1 else ''} for each of 4 processes"
    if cores < 2:
        return Check("threads", "warn", finding, "Everything works on one core, slowly.")
    return Check("threads", "ok", finding)


def check_kernels(version_of: Callable[[str], str] = metadata.version) -> Check:
    """Whether forwards of few rows can have kernels of their own on a CPU."""
    try:
        finding = f"numba {version_of('numba')}, for forwards of few rows on a CPU"
    except metadata.PackageNotFoundError:
        advice = "On a CPU decoding takes up to twice as long: pip install 'fusionroute[cpu]'."
        return Check("kernels", "warn", "numba is not installed", advice)
    return Check("kernels", "ok", finding)


def check_device() -> Check:
    """Which devices torch can use."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Check("device", "ok", f"cpu, {', '.join(f'cuda:{n} {name}' for n, name in enumerate(names))}")
    return Check("device", "ok", "cpu only")


def check_stack(stack_folder: Path) -> Check:
    """Whether the local stack, if one is up, is complete and serves."""
    from fusionroute.health_probe import status_of
    from fusionroute.stack_state import load_state

    name = stack_folder.name
    state = load_state(stack_folder)
    if state is None:
        return Check("stack", "ok", f"{name!r} is not up")
    mend = f"Look at `fusionroute logs --name {name}`, then `fusionroute down --name {name}` and up again."
    gone = sorted({record.name for record in state.processes} - {record.name for record in state.alive})
    if gone:
        return Check("stack", "fail", f"{name!r}: {', '.join(gone)} ended", mend)
    for address in state.router_address.split(","):
        if (health := status_of(address)) != "SERVING":
            return Check("stack", "fail", f"{name!r}: the router on {address} is {health}", mend)
    slots = asyncio.run(_slots(state.router_address.split(",")[0]))
    missing = [slot for slot, is_ready in slots.items() if not is_ready]
    if missing:
        return Check("stack", "fail", f"{name!r}: not ready in the registry: {', '.join(missing)}", mend)
    return Check("stack", "ok", f"{name!r} serves on {state.router_address} with {', '.join(slots)}")


async def _slots(address: str) -> dict[str, bool]:
    """The slots of a router's checkpoint and whether an expert serves each; empty when it does not answer."""
    from fusionroute.client import RouterClient
    from fusionroute.errors import FusionRouteError

    async with RouterClient.open(address) as router:
        try:
            return {slot.slot: slot.ready for slot in (await router.info()).slots}
        except FusionRouteError:
            return {}
