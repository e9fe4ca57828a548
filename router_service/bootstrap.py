"""Puts the router service together, from settings to exit code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import structlog
from redis.asyncio import Redis

from fusionroute import private_redis
from fusionroute.engine import Engine, LoadedModel, load_model
from fusionroute.errors import FusionRouteError, ModelRejected, Reason, Unavailable
from fusionroute.fusion import CombineRule
from fusionroute.grpc_runtime import (
    PortTaken,
    Progress,
    RunningServer,
    Service,
    check_port_free,
    serve_until_signalled,
    server,
)
from fusionroute.model_settings import DeviceMissing, prepare_torch
from fusionroute.router_model import RouterCheckpoint, load_checkpoint
from fusionroute.settings import ExitCode
from fusionroute.v1 import registry_pb2, registry_pb2_grpc, router_pb2, router_pb2_grpc
from router_service.admission import Admission
from router_service.asking import LocalModel
from router_service.experts import Directory, RemoteExpert
from router_service.generation import Ensemble
from router_service.registry_servicer import RegistryServicer
from router_service.registry_store import RegistryStore
from router_service.servicer import RouterServicer
from router_service.session_store import SessionStore
from router_service.settings import RouterSettings
from router_service.turn_keeper import TurnKeeper, TurnLimits
from router_service.turn_request import Offer

log = structlog.get_logger(__name__)

ROUTER_SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
REGISTRY_SERVICE = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name


def run(settings: RouterSettings) -> ExitCode:
    """Loads the checkpoint and serves it until a signal."""
    try:
        prepare_torch(settings)
        check_port_free(settings.host, settings.port)
        asyncio.run(_check_redis(settings))
        log.info("loading", checkpoint=settings.checkpoint, device=settings.device)
        checkpoint, model = load_router(settings.checkpoint, dtype=settings.dtype, device=settings.device)
        asyncio.run(serve(settings, checkpoint, model))
    except DeviceMissing as error:
        log.error("device_missing", message=str(error))
        return ExitCode.BAD_SETTINGS
    except PortTaken as error:
        log.error("port_taken", message=str(error))
        return ExitCode.PORT_TAKEN
    except ModelRejected as error:
        log.error("checkpoint_rejected", reason=error.reason.value, message=error.message)
        return ExitCode.MODEL_REJECTED
    except Unavailable as error:
        log.error("redis_unreachable", message=error.message)
        return ExitCode.REDIS_UNREACHABLE
    except FusionRouteError as error:
        log.error("bad_settings", reason=error.reason.value, message=error.message)
        return ExitCode.BAD_SETTINGS
    return ExitCode.STOPPED


def load_router(
    folder: str, *, dtype: str = "auto", device: str = "cpu"
) -> tuple[RouterCheckpoint, LoadedModel]:
    """The checkpoint in `folder` and its model with the heads attached. Raises ModelRejected."""
    started = time.monotonic()
    checkpoint = load_checkpoint(folder)
    model = load_model(folder, dtype=dtype, device=device, heads=checkpoint.heads.to_scores(device))
    for field in ("tokenizer_fingerprint", "logits_width"):
        got, wanted = getattr(model.facts, field), getattr(checkpoint.manifest, field)
        if got != wanted:
            raise ModelRejected(
                Reason.VOCABULARY_MISMATCH,
                f"{folder!r}: the router has {field} {got}, its manifest says {wanted}",
            )
    log.info(
        "checkpoint_loaded",
        checkpoint=folder,
        slots=list(checkpoint.manifest.slots),
        combine=checkpoint.manifest.combine,
        seconds=round(time.monotonic() - started, 3),
    )
    return checkpoint, model


def offer_of(checkpoint: RouterCheckpoint, model: LoadedModel, kv_tokens: int) -> Offer:
    """What a router with this checkpoint can do."""
    return Offer(
        slots=checkpoint.manifest.slots,
        rules=checkpoint.available_rules(),
        default_rule=CombineRule(checkpoint.manifest.combine),
        logits_width=model.facts.logits_width,
        max_context_tokens=min(model.facts.max_context_tokens, kv_tokens),
        checkpoint=checkpoint.fingerprint(model.facts.weights_fingerprint),
    )


@dataclass(frozen=True, slots=True)
class RunningRouter:
    """A router that serves, and its parts for whoever must look inside."""

    server: RunningServer
    keeper: TurnKeeper
    engine: Engine
    directory: Directory


@asynccontextmanager
async def running_router(
    settings: RouterSettings, checkpoint: RouterCheckpoint, model: LoadedModel
) -> AsyncIterator[RunningRouter]:
    """Serves a checkpoint within the context.

    Raises:
        PortTaken: naming the address.
        Unavailable: STORE_UNAVAILABLE, naming Redis.
    """
    async with AsyncExitStack() as stack:
        redis = await _enter_redis(stack, settings)
        store = SessionStore(
            redis, ttl_seconds=settings.session_ttl_seconds, lease_seconds=settings.session_lease_seconds
        )
        registry = RegistryStore(redis, lease_seconds=settings.expert_lease_seconds)
        engine = await stack.enter_async_context(Engine(model, settings.engine_limits()))
        directory = Directory(registry.entries, settings.max_message_bytes)
        await stack.enter_async_context(directory.running())
        offer = offer_of(checkpoint, model, settings.kv_tokens)
        ensemble = Ensemble(
            router=LocalModel(engine),
            experts=[RemoteExpert(directory, slot) for slot in offer.slots],
            layout=checkpoint.heads.layout,
            end_ids=model.end_ids,
            max_context_tokens=offer.max_context_tokens,
            timeout_seconds=settings.expert_timeout_seconds,
        )
        limits = TurnLimits(settings.max_running_turns, settings.alone_seconds)
        keeper = TurnKeeper(ensemble, store, offer, model.tokenizer, limits)
        stack.push_async_callback(keeper.drain, 0.0)
        servicer = RouterServicer(keeper, store, engine, directory, offer, model.tokenizer)
        registrar = RegistryServicer(registry, Admission(checkpoint.manifest))
        running = await stack.enter_async_context(
            server(
                [router_service(servicer), registry_service(registrar)],
                host=settings.host,
                port=settings.port,
                progress=lambda: _progress(engine),
                frozen_after_seconds=settings.frozen_after_seconds,
                max_message_bytes=settings.max_message_bytes,
            )
        )
        yield RunningRouter(running, keeper, engine, directory)


async def serve(settings: RouterSettings, checkpoint: RouterCheckpoint, model: LoadedModel) -> None:
    """Serves a checkpoint until a signal. Raises as `running_router`."""
    async with running_router(settings, checkpoint, model) as router:
        await serve_until_signalled(
            router.server,
            drain=router.keeper.drain,
            drain_seconds=settings.drain_seconds,
            ready_file=settings.ready_file,
        )


def router_service(servicer: RouterServicer) -> Service:
    """The router's servicer as `grpc_runtime.server` takes it."""
    return Service(ROUTER_SERVICE, lambda s: router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, s))


def registry_service(servicer: RegistryServicer) -> Service:
    """The registry's servicer as `grpc_runtime.server` takes it."""
    return Service(
        REGISTRY_SERVICE, lambda s: registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, s)
    )


async def _check_redis(settings: RouterSettings) -> None:
    """Finds out before the model is loaded that a named Redis cannot be used. Raises Unavailable."""
    if settings.redis_url is not None:
        async with private_redis.connect(settings.redis_url.get_secret_value()) as client:
            await private_redis.check(client)


async def _enter_redis(stack: AsyncExitStack, settings: RouterSettings) -> Redis:
    if settings.redis_url is None:
        private = private_redis.PrivateRedis(settings.redis_data_dir)
        url = (await stack.enter_async_context(private)).url
        log.info("private_redis", pid=private.pid, keeps_data=settings.redis_data_dir is not None)
    else:
        url = settings.redis_url.get_secret_value()
    client = private_redis.connect(url)
    stack.push_async_callback(client.aclose)
    await private_redis.check(client)
    return client


def _progress(engine: Engine) -> Progress:
    load = engine.load()
    return Progress(pending=load.queue_depth > 0, tick=load.num_forwards)
