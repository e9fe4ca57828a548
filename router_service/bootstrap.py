"""Puts the router service together, from settings to exit code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import structlog
from pydantic import SecretStr
from redis.asyncio import Redis

from fusionroute import private_redis, tracing
from fusionroute.access import ClientAccess, ServerAccess
from fusionroute.engine import Engine
from fusionroute.errors import FusionRouteError, ModelRejected, Reason, Unavailable
from fusionroute.fusion import CombineRule, OnExpertUnavailable
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
from fusionroute.promotions import PromotedCheckpoint, Promotion, PromotionStore
from fusionroute.router_loading import LoadedRouter
from fusionroute.settings import ExitCode
from fusionroute.v1 import registry_pb2, registry_pb2_grpc, router_pb2, router_pb2_grpc
from fusionroute.watch_server import Watched, check_watch_port_free, watching
from router_service import metrics
from router_service.admission import Admission
from router_service.asking import LocalModel, Patience
from router_service.draft_experience import Experience
from router_service.drafting import DraftingMode
from router_service.ensemble import Ensemble
from router_service.experts import Directory, RemoteExpert
from router_service.http.service import RouterApi
from router_service.http.serving import serving_apis
from router_service.kv_budget import kv_budget
from router_service.promotion_watch import CheckpointSource, PromotionWatch
from router_service.prompt_scoring import PromptScorer
from router_service.registry_servicer import Admit, RegistryServicer
from router_service.registry_store import RegistryStore
from router_service.servicer import RouterServicer
from router_service.serving import PromotionReport, ServedCheckpoints, Serving
from router_service.session_closing import SessionCloser
from router_service.session_store import SessionStore
from router_service.settings import RouterSettings
from router_service.token_pace import PaceLimit
from router_service.turn_admission import KvBudget, TurnAdmission
from router_service.turn_keeper import TurnKeeper
from router_service.turn_request import Offer
from router_service.turn_runner import TurnLimits
from router_service.watching import RouterGauges, needs_redis

log = structlog.get_logger(__name__)

ROUTER_SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
REGISTRY_SERVICE = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"].full_name


def run(settings: RouterSettings) -> ExitCode:
    """Loads the checkpoint and serves it until a signal."""
    try:
        with ExitStack() as stack:
            prepare_torch(settings)
            check_port_free(settings.host, settings.port)
            check_watch_port_free(settings)
            if settings.http_port is not None:
                check_port_free(settings.http_host, settings.http_port)
            stack.enter_context(tracing.exporting("router-service", settings.otel_endpoint))
            settings = _with_redis(stack, settings)
            first = load_first(settings, asyncio.run(_read_promotion(settings)))
            asyncio.run(serve(settings, first))
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
        log.error("checkpoint_rejected", reason=error.reason.value, message=error.message)
        return ExitCode.MODEL_REJECTED
    except Unavailable as error:
        log.error("redis_unreachable", message=error.message)
        return ExitCode.REDIS_UNREACHABLE
    except FusionRouteError as error:
        log.error("bad_settings", reason=error.reason.value, message=error.message)
        return ExitCode.BAD_SETTINGS
    return ExitCode.STOPPED


@dataclass(slots=True)
class FirstCheckpoint:
    """What a router begins with.

    Attributes:
        loaded: None once it is served, so that its memory is free when another one has taken its place.
        checkpoint_id: empty for the one of the settings.
        report: what became of the promotion that was found.
    """

    loaded: LoadedRouter | None
    checkpoint_id: str = ""
    report: PromotionReport = field(default_factory=PromotionReport)

    def hand_over(self) -> LoadedRouter:
        """What is loaded; once."""
        loaded, self.loaded = self.loaded, None
        assert loaded is not None, "handed over already"
        return loaded


def load_first(settings: RouterSettings, promotion: Promotion | None = None) -> FirstCheckpoint:
    """The promoted checkpoint; the one of the settings where there is none or it cannot be served.

    Raises:
        ModelRejected: the one of the settings cannot be served.
    """
    source = CheckpointSource(settings)
    report = PromotionReport()
    if promotion is not None and promotion.current.checkpoint_id:
        wanted = promotion.current
        log.info("loading", checkpoint=str(source.folder(wanted)), device=settings.device)
        try:
            return FirstCheckpoint(
                source.load(wanted), wanted.checkpoint_id, PromotionReport(promotion.revision)
            )
        except ModelRejected as error:
            log.error("promotion_refused", checkpoint_id=wanted.checkpoint_id, message=error.message)
            report = PromotionReport(promotion.revision, error.message)
    log.info("loading", checkpoint=settings.checkpoint, device=settings.device)
    return FirstCheckpoint(source.load(PromotedCheckpoint()), report=report)


@dataclass(frozen=True, slots=True)
class RunningRouter:
    """A router that serves, and its parts for whoever must look inside."""

    server: RunningServer
    keeper: TurnKeeper
    served: ServedCheckpoints
    directory: Directory
    watch_address: str | None = None
    http_url: str | None = None

    @property
    def engine(self) -> Engine:
        """Of the current checkpoint."""
        return self.served.current.engine


@asynccontextmanager
async def running_router(settings: RouterSettings, first: FirstCheckpoint) -> AsyncIterator[RunningRouter]:
    """Serves within the context, first of all a given checkpoint.

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
        directory = _directory(settings, registry)
        await stack.enter_async_context(directory.running())
        served = ServedCheckpoints(
            await serve_checkpoint(settings, directory, first.hand_over(), first.checkpoint_id),
            promotion=first.report,
        )
        await stack.enter_async_context(served.open())
        admission = turn_admission(settings, served, directory)
        closer = await stack.enter_async_context(SessionCloser(served, directory).running())
        keeper = TurnKeeper(served, store, admission, closer, _turn_limits(settings))
        stack.push_async_callback(keeper.drain, 0.0)
        scorer = PromptScorer(served, admission, closer, lambda: keeper.is_draining)
        if settings.checkpoints_dir is not None:
            watch = _promotion_watch(settings, PromotionStore(redis), served, directory)
            await stack.enter_async_context(watch.running())
        access = ServerAccess.of(settings)
        running = await stack.enter_async_context(
            server(
                [
                    router_service(RouterServicer(keeper, store, served, directory, scorer)),
                    registry_service(RegistryServicer(registry, _admission(settings, served))),
                ],
                host=settings.host,
                port=settings.port,
                progress=lambda: _progress(served),
                why_not_ready=needs_redis(redis),
                frozen_after_seconds=settings.frozen_after_seconds,
                access=access,
                max_message_bytes=settings.max_message_bytes,
            )
        )
        gauges = RouterGauges(served, directory, admission)
        watched = Watched(running.health, gauges.exposition(), keys=access.keys)
        watch_address = await stack.enter_async_context(watching(settings, watched))
        api = RouterApi(
            keeper,
            served,
            directory,
            running.health,
            watched.exposition,
            scorer,
            served_name=settings.served_name,
            max_new_tokens=settings.http_max_new_tokens,
        )
        http_url = await stack.enter_async_context(serving_apis(settings, api, access))
        yield RunningRouter(running, keeper, served, directory, watch_address, http_url)


def _turn_limits(settings: RouterSettings) -> TurnLimits:
    return TurnLimits(settings.alone_seconds, settings.store_patience_seconds, settings.one_off_ttl_seconds)


def _directory(settings: RouterSettings, registry: RegistryStore) -> Directory:
    return Directory(
        registry.entries,
        settings.max_message_bytes,
        lease_seconds=settings.expert_lease_seconds,
        access=ClientAccess.of(settings),
        shared_memory_bytes=settings.shared_memory_bytes,
        local_sockets=settings.local_sockets,
    )


def _promotion_watch(
    settings: RouterSettings, promotions: PromotionStore, served: ServedCheckpoints, directory: Directory
) -> PromotionWatch:
    return PromotionWatch(
        promotions=promotions,
        served=served,
        source=CheckpointSource(settings),
        serve=partial(serve_checkpoint, settings, directory),
        is_served=lambda slot: directory.best(slot) is not None,
    )


def turn_admission(
    settings: RouterSettings, served: ServedCheckpoints, directory: Directory
) -> TurnAdmission:
    """Which turns may begin, by the checkpoint and the experts that serve at that moment."""

    def budget() -> KvBudget:
        return kv_budget(
            settings.kv_tokens, served.current.slots, directory, overcommit=settings.kv_overcommit
        )

    pace = None
    if settings.max_token_seconds is not None:
        pace = PaceLimit(settings.max_token_seconds, most=settings.max_running_turns)
    return TurnAdmission(settings.max_running_turns, budget, pace)


async def serve_checkpoint(
    settings: RouterSettings, directory: Directory, loaded: LoadedRouter, checkpoint_id: str
) -> Serving:
    """A loaded checkpoint with an engine that runs.

    Raises:
        ModelRejected: EXPERTS_MISMATCH, it routes to the slot of the base model.
    """
    checkpoint, model, base_slot = loaded.checkpoint, loaded.model, settings.base_slot
    if base_slot in checkpoint.manifest.slots:
        raise ModelRejected(
            Reason.EXPERTS_MISMATCH,
            f"{str(checkpoint.folder)!r} routes to slot {base_slot!r}, in which the settings have the base model",
        )
    stop = AsyncExitStack()
    limits = replace(settings.engine_limits(), in_groups=settings.in_groups)
    engine = await stop.enter_async_context(Engine(model, limits))
    offer = Offer(
        slots=checkpoint.manifest.slots,
        rules=checkpoint.available_rules(has_base=bool(base_slot)),
        default_rule=CombineRule(checkpoint.manifest.combine),
        logits_width=model.facts.logits_width,
        max_context_tokens=min(model.facts.max_context_tokens, settings.kv_tokens),
        checkpoint=loaded.fingerprint,
        default_policy=OnExpertUnavailable(settings.on_expert_unavailable),
        default_drafting=DraftingMode(settings.drafting),
    )
    metrics.know([*offer.slots, *([base_slot] if base_slot else [])])
    ensemble = Ensemble(
        router=LocalModel(engine),
        experts=[RemoteExpert(directory, slot) for slot in offer.slots],
        layout=checkpoint.heads.layout,
        end_ids=model.end_ids,
        max_context_tokens=offer.max_context_tokens,
        router_patience=Patience(settings.expert_timeout_seconds),
        expert_patience=Patience(
            settings.expert_timeout_seconds,
            attempt_seconds=settings.expert_attempt_seconds,
            hedge_after_seconds=settings.hedge_after_seconds,
        ),
        degrade_after_seconds=settings.degrade_after_seconds,
        experience=Experience(up_to_turns=settings.draft_up_to_turns),
        early=settings.asks_early(),
        top_logits=settings.top_logits,
        base=RemoteExpert(directory, base_slot) if base_slot else None,
    )
    return Serving(checkpoint_id, checkpoint.manifest, engine, ensemble, offer, model.tokenizer, stop)


async def serve(settings: RouterSettings, first: FirstCheckpoint) -> None:
    """Serves until a signal. Raises as `running_router`."""
    async with running_router(settings, first) as router:
        await serve_until_signalled(
            router.server,
            drain=router.keeper.drain,
            drain_seconds=settings.drain_seconds,
            ready_file=settings.ready_file,
            watch_address=router.watch_address,
            http_url=router.http_url,
        )


def router_service(servicer: RouterServicer) -> Service:
    """The router's servicer as `grpc_runtime.server` takes it."""
    return Service(ROUTER_SERVICE, lambda s: router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, s))


def registry_service(servicer: RegistryServicer) -> Service:
    """The registry's servicer as `grpc_runtime.server` takes it."""
    return Service(
        REGISTRY_SERVICE, lambda s: registry_pb2_grpc.add_RegistryServiceServicer_to_server(servicer, s)
    )


def _with_redis(stack: ExitStack, settings: RouterSettings) -> RouterSettings:
    """The settings with the URL of a private Redis where they name none."""
    if settings.redis_url is not None:
        return settings
    private = stack.enter_context(private_redis.PrivateRedis(settings.redis_data_dir))
    log.info("private_redis", pid=private.pid, keeps_data=settings.redis_data_dir is not None)
    return settings.model_copy(update={"redis_url": SecretStr(private.url)})


async def _read_promotion(settings: RouterSettings) -> Promotion | None:
    """What is promoted, if promotions are followed. Finds out early that Redis cannot be used: Unavailable."""
    assert settings.redis_url is not None
    async with private_redis.connect(settings.redis_url.get_secret_value()) as client:
        await private_redis.check(client)
        return await PromotionStore(client).read() if settings.checkpoints_dir is not None else None


async def _enter_redis(stack: AsyncExitStack, settings: RouterSettings) -> Redis:
    if settings.redis_url is None:
        url = (await stack.enter_async_context(private_redis.PrivateRedis(settings.redis_data_dir))).url
    else:
        url = settings.redis_url.get_secret_value()
    client = private_redis.connect(url)
    stack.push_async_callback(client.aclose)
    await private_redis.check(client)
    return client


def _admission(settings: RouterSettings, served: ServedCheckpoints) -> Admit:
    """Judges by the checkpoint that is current at that moment."""
    further = (*settings.spare_slot_names(), *([settings.base_slot] if settings.base_slot else []))
    return lambda slot, model: Admission(served.current.manifest, further)(slot, model)


def _progress(served: ServedCheckpoints) -> Progress:
    loads = [serving.engine.load() for serving in served.all()]
    return Progress(
        pending=any(load.queue_depth > 0 for load in loads), tick=sum(load.num_forwards for load in loads)
    )
