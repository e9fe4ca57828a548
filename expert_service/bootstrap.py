"""Puts the expert service together, from settings to exit code."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

import grpc
import structlog

from expert_service.registrar import Registrar, Registration
from expert_service.served_model import LoadAnew, ServedModel
from expert_service.servicer import ExpertServicer
from expert_service.settings import ExpertSettings
from expert_service.watching import exposition, needs_registration
from fusionroute import streamed_rows, tracing
from fusionroute.access import ClientAccess, ServerAccess
from fusionroute.background import end_task
from fusionroute.engine import Engine, LoadedModel, load_model
from fusionroute.errors import ModelRejected
from fusionroute.grpc_runtime import (
    PortTaken,
    Progress,
    RunningServer,
    Service,
    channel,
    check_port_free,
    serve_until_signalled,
    server,
)
from fusionroute.model_settings import DeviceMissing, prepare_torch
from fusionroute.settings import ExitCode
from fusionroute.v1 import expert_pb2, expert_pb2_grpc, registry_pb2
from fusionroute.watch_server import Watched, check_watch_port_free, watching
from fusionroute.wire import identity_to_message, load_to_message

log = structlog.get_logger(__name__)

SERVICE_NAME = expert_pb2.DESCRIPTOR.services_by_name["ExpertService"].full_name


def run(settings: ExpertSettings) -> ExitCode:
    """Loads the model and serves it until a signal."""
    try:
        if settings.tensor_parallel > 1:
            from expert_service.split import run_split

            return run_split(settings)
        prepare_torch(settings)
        check_port_free(settings.host, settings.port)
        check_watch_port_free(settings)
        with tracing.exporting("expert-service", settings.otel_endpoint):
            asyncio.run(serve(settings, _load(settings)))
    except tracing.TracingMissing as error:
        log.error("bad_settings", message=str(error))
        return ExitCode.BAD_SETTINGS
    except DeviceMissing as error:
        log.error("device_missing", message=str(error))
        return ExitCode.BAD_SETTINGS
    except PortTaken as error:
        log.error("port_taken", message=str(error))
        return ExitCode.PORT_TAKEN
    except ModelRejected as error:
        log.error("model_rejected", reason=error.reason.value, message=error.message)
        return ExitCode.MODEL_REJECTED
    return ExitCode.STOPPED


def _load(settings: ExpertSettings) -> LoadedModel:
    started_at = time.monotonic()
    log.info("loading", model=settings.model, device=settings.device)
    model = load_model(settings.model, dtype=settings.dtype, device=settings.device)
    facts = model.facts
    log.info(
        "model_loaded",
        model=facts.name,
        family=facts.family,
        dtype=facts.dtype,
        logits_width=facts.logits_width,
        epoch=facts.epoch,
        seconds=round(time.monotonic() - started_at, 3),
    )
    return model


@dataclass(frozen=True, slots=True)
class RunningExpert:
    """An expert that serves, and its parts for whoever must look inside."""

    server: RunningServer
    servicer: ExpertServicer
    served: ServedModel
    registrar: Registrar | None
    watch_address: str | None = None

    @property
    def engine(self) -> Engine:
        """The one that serves now."""
        return self.served.engine

    async def drain(self, timeout_seconds: float) -> None:
        """Says so to the registry, refuses new steps, finishes the running ones and leaves the registry."""
        if self.registrar is not None:
            self.registrar.begin_drain()
        await self.served.drain(timeout_seconds)
        if self.registrar is not None:
            await self.registrar.leave()


@asynccontextmanager
async def running_expert(
    settings: ExpertSettings, model: LoadedModel, load_anew: LoadAnew | None = None
) -> AsyncIterator[RunningExpert]:
    """Serves a model within the context.

    Args:
        load_anew: for a reload; None = from where the settings say.

    Raises:
        PortTaken: naming the address.
    """
    async with AsyncExitStack() as stack:
        engine = Engine(model, settings.engine_limits())
        del model  # a reload frees it
        served = ServedModel(engine, load_anew or (lambda: asyncio.to_thread(_load, settings)))
        del engine
        await stack.enter_async_context(served)
        servicer = ExpertServicer(
            served, settings.slot, settings.max_message_bytes, takes_lines=settings.is_reached_directly
        )
        registrar: Registrar | None = None
        access = ServerAccess.of(settings)
        running = await stack.enter_async_context(
            server(
                [service_of(servicer)],
                host=settings.host,
                port=settings.port,
                progress=lambda: progress_of(served.engine),
                why_not_ready=needs_registration(settings.router is not None, lambda: registrar),
                frozen_after_seconds=settings.frozen_after_seconds,
                access=access,
                max_message_bytes=settings.max_message_bytes,
            )
        )
        registrar = await _enter_registrar(stack, settings, running, served)
        watched = Watched(running.health, exposition(served, registrar), keys=access.keys)
        watch_address = await stack.enter_async_context(watching(settings, watched))
        yield RunningExpert(running, servicer, served, registrar, watch_address)


async def serve(
    settings: ExpertSettings,
    model: LoadedModel,
    load_anew: LoadAnew | None = None,
    ended: asyncio.Future[str] | None = None,
) -> None:
    """Serves a model until a signal, or until `ended` says why not longer. Raises as `running_expert`."""
    async with (
        running_expert(settings, model, load_anew) as expert,
        _standing_by(settings, expert.registrar),
    ):
        del model  # a reload frees it
        await serve_until_signalled(
            expert.server,
            drain=expert.drain,
            drain_seconds=settings.drain_seconds,
            ready_file=settings.ready_file,
            watch_address=expert.watch_address,
            ended=ended,
        )


def service_of(servicer: ExpertServicer) -> Service:
    """The servicer as `grpc_runtime.server` takes it."""

    def register(grpc_server: grpc.aio.Server) -> None:
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(servicer, grpc_server)
        streamed = grpc.stream_stream_rpc_method_handler(
            servicer.StepStream,
            request_deserializer=expert_pb2.StepStreamRequest.FromString,
            response_serializer=streamed_rows.encode,
        )
        grpc_server.add_registered_method_handlers(SERVICE_NAME, {"StepStream": streamed})

    return Service(
        SERVICE_NAME,
        register,
        on_stop=servicer.end_streams,
    )


def progress_of(engine: Engine) -> Progress:
    """The engine's pulse: forwards must happen while steps wait."""
    load = engine.load()
    return Progress(pending=load.queue_depth > 0, tick=load.num_forwards)


async def _enter_registrar(
    stack: AsyncExitStack, settings: ExpertSettings, running: RunningServer, served: ServedModel
) -> Registrar | None:
    """Registers with the router, if one is named; serving does not wait for it."""
    if settings.router is None:
        return None
    access = ClientAccess.of(settings)
    channels = [
        await stack.enter_async_context(channel(address, access=access))
        for address in settings.router_addresses()
    ]
    registration = Registration(
        instance_id=f"{settings.slot}-{uuid4().hex[:12]}",
        slot=settings.slot,
        address=settings.advertise or running.address,
        model=identity_to_message(served.engine.facts),
        standby=settings.standby,
    )
    registrar = Registrar(
        channels,
        registration,
        lambda: load_to_message(served.engine.load()),
        refused_retry_seconds=settings.refused_retry_seconds,
    )
    served.on_reload = lambda facts: registrar.announce(identity_to_message(facts))
    return await stack.enter_async_context(registrar)


@asynccontextmanager
async def _standing_by(settings: ExpertSettings, registrar: Registrar | None) -> AsyncIterator[None]:
    """Within the context, an expert that waits in vain to be swapped in ends this process as a signal would."""
    if registrar is None or not settings.standby:
        yield
        return
    task = asyncio.create_task(_give_up_standby(registrar, settings.standby_seconds))
    try:
        yield
    finally:
        await end_task(task)


async def _give_up_standby(registrar: Registrar, standby_seconds: float) -> None:
    await asyncio.sleep(standby_seconds)
    if registrar.state in (registry_pb2.EXPERT_STATE_STANDBY, registry_pb2.EXPERT_STATE_UNSPECIFIED):
        log.warning("standby_given_up", standby_seconds=standby_seconds, note="nobody has swapped it in")
        signal.raise_signal(signal.SIGTERM)
