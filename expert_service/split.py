"""A model that is split over several processes, started by torchrun: process 0 serves it, the others follow.

    torchrun --nproc-per-node 2 --no-python expert-service --tensor-parallel 2 --device cuda --model ...

They live and die together. When one ends, process 0 fails the steps that run, leaves the registry and ends; the others
end when process 0 does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from types import FrameType

import structlog
import torch

from expert_service.bootstrap import serve
from expert_service.settings import ExpertSettings
from fusionroute import tracing
from fusionroute.engine import LoadedModel
from fusionroute.engine.parallel import (
    LaunchedWrongly,
    LeadingModel,
    Place,
    follow,
    linked,
    load_part,
    process_group,
    this_place,
)
from fusionroute.engine.parallel_link import FollowerEnd, LeadEnd, PeerLost
from fusionroute.errors import ModelRejected, Reason
from fusionroute.grpc_runtime import check_port_free
from fusionroute.model_settings import prepare_torch
from fusionroute.settings import ExitCode
from fusionroute.watch_server import check_watch_port_free

log = structlog.get_logger(__name__)

LOAD_SECONDS = 3600.0
"""How much longer one process may take to load its part than another one."""
PARTING_SECONDS = 10.0
"""After a loss process 0 ends within so long, even if it waits within a GPU operation that cannot be broken off."""


def run_split(settings: ExpertSettings) -> ExitCode:
    """Loads this process's part of the model; serves it, or follows. Raises ModelRejected, PortTaken, DeviceMissing."""
    try:
        place = this_place(settings.tensor_parallel)
        _take_device(settings, place)
        if place.rank == 0:
            check_port_free(settings.host, settings.port)
            check_watch_port_free(settings)
        with (
            process_group(place, settings.device, settings.peer_seconds),
            linked(place, settings.device) as link,
        ):
            part = _load(settings, place, link)
            if isinstance(link, FollowerEnd):
                return _follow(part, link)
            return _lead(settings, LeadingModel(part, link), link)
    except LaunchedWrongly as error:
        log.error("bad_settings", message=str(error))
        return ExitCode.BAD_SETTINGS
    except PeerLost as error:
        log.error("process_lost", message=str(error))
        return ExitCode.PEER_LOST


def _take_device(settings: ExpertSettings, place: Place) -> None:
    """Tries this process's device. Raises DeviceMissing, LaunchedWrongly."""
    if settings.device == "cpu":
        if (accelerator := torch.accelerator.current_accelerator()) is not None:
            raise LaunchedWrongly(
                f"device = 'cpu' with tensor_parallel = {settings.tensor_parallel}: transformers would take"
                f" {accelerator.type!r}; hide it (CUDA_VISIBLE_DEVICES=) or set device"
            )
        prepare_torch(settings)
    else:
        prepare_torch(settings.model_copy(update={"device": f"{settings.device}:{place.local_rank}"}))


def _load(settings: ExpertSettings, place: Place, link: LeadEnd | FollowerEnd) -> LoadedModel:
    started_at = time.monotonic()
    log.info("loading", model=settings.model, device=settings.device, rank=place.rank, of=place.size)
    part = load_part(
        settings.model,
        place,
        link,
        dtype=settings.dtype,
        device=settings.device,
        timeout_seconds=LOAD_SECONDS,
    )
    seconds = round(time.monotonic() - started_at, 3)
    log.info("model_loaded", model=part.facts.name, rank=place.rank, of=place.size, seconds=seconds)
    return part


def _lead(settings: ExpertSettings, model: LeadingModel, link: LeadEnd) -> ExitCode:
    async def serve_while_whole() -> None:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[str] = loop.create_future()

        def end(why: str) -> None:
            log.error("process_lost", message=why)
            parting = threading.Timer(PARTING_SECONDS, os._exit, (int(ExitCode.PEER_LOST),))
            parting.daemon = True
            parting.start()
            loop.call_soon_threadsafe(ended.set_result, why)

        link.watch(end)
        await serve(settings, model, _refuse_reload, ended)

    with tracing.exporting("expert-service", settings.otel_endpoint):
        asyncio.run(serve_while_whole())
    return ExitCode.STOPPED if link.lost is None else ExitCode.PEER_LOST


async def _refuse_reload() -> LoadedModel:
    message = (
        "a model that is split over several processes is not reloaded: start other processes and swap them in"
    )
    raise ModelRejected(Reason.MODEL_UNSUPPORTED, message)


def _follow(part: LoadedModel, link: FollowerEnd) -> ExitCode:
    def note(number: int, _frame: FrameType | None) -> None:
        log.info("waiting", signal=signal.Signals(number).name, note="this process ends with process 0")
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, note)
    try:
        follow(part, link)
    except PeerLost:
        raise
    except Exception as error:
        log.exception("follower_failed", message=f"{type(error).__name__}: {error}")
        return ExitCode.PEER_LOST
    log.info("stopped")
    return ExitCode.STOPPED
