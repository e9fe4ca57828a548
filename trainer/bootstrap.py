"""Puts the trainer service together, from settings to exit code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
from redis.asyncio import Redis

from fusionroute import private_redis, tracing
from fusionroute.access import ClientAccess, ServerAccess, child_environment
from fusionroute.background import end_task
from fusionroute.errors import FusionRouteError, Unavailable, invalid
from fusionroute.grpc_runtime import (
    PortTaken,
    Progress,
    RunningServer,
    Service,
    check_port_free,
    serve_until_signalled,
    server,
)
from fusionroute.promotions import PromotionStore
from fusionroute.settings import ExitCode
from fusionroute.v1 import trainer_pb2, trainer_pb2_grpc
from fusionroute.watch_server import Watched, check_watch_port_free, watching
from trainer.checkpoint_store import CheckpointStore
from trainer.jobs.attempt import Workshop
from trainer.jobs.child import JOB_COMMAND
from trainer.jobs.store import JobStore
from trainer.jobs.supervisor import Supervisor
from trainer.promoter import registry_of
from trainer.servicer import TrainerServicer
from trainer.settings import TrainerSettings
from trainer.watching import TrainerGauges

log = structlog.get_logger(__name__)

TRAINER_SERVICE = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
PRIVATE_REDIS_FOLDER = ".redis"
"""In jobs_dir: a private Redis keeps the jobs there, so that they outlive the service."""


def run(settings: TrainerSettings, job_command: Sequence[str] = JOB_COMMAND) -> ExitCode:
    """Serves until a signal.

    Args:
        job_command: what stands before the folder on the command line of a job's process.
    """
    try:
        check_port_free(settings.host, settings.port)
        check_watch_port_free(settings)
        _make_folders(settings)
        with tracing.exporting("trainer-service", settings.otel_endpoint):
            asyncio.run(_serve(settings, job_command))
    except tracing.TracingMissing as error:
        log.error("bad_settings", message=str(error))
        return ExitCode.BAD_SETTINGS
    except PortTaken as error:
        log.error("port_taken", message=str(error))
        return ExitCode.PORT_TAKEN
    except OSError as error:
        log.error(
            "bad_settings", message=f"jobs_dir and checkpoints_dir must be folders to write in: {error}"
        )
        return ExitCode.BAD_SETTINGS
    except Unavailable as error:
        log.error("redis_unreachable", message=error.message)
        return ExitCode.REDIS_UNREACHABLE
    except FusionRouteError as error:
        log.error("bad_settings", reason=error.reason.value, message=error.message)
        return ExitCode.BAD_SETTINGS
    return ExitCode.STOPPED


@dataclass(frozen=True, slots=True)
class RunningTrainer:
    """A trainer that serves, and its parts for whoever must look inside."""

    server: RunningServer
    supervisor: Supervisor
    jobs: JobStore
    watch_address: str | None = None


@asynccontextmanager
async def running_trainer(
    settings: TrainerSettings, job_command: Sequence[str] = JOB_COMMAND
) -> AsyncIterator[RunningTrainer]:
    """Serves and works within the context.

    Raises:
        PortTaken: naming the address.
        Unavailable: STORE_UNAVAILABLE, naming Redis.
    """
    async with AsyncExitStack() as stack:
        redis = await _enter_redis(stack, settings)
        jobs = JobStore(redis, lease_seconds=settings.job_lease_seconds, max_deaths=settings.job_max_deaths)
        workshop = Workshop(
            jobs_dir=settings.jobs_dir.resolve(),
            checkpoints_dir=settings.checkpoints_dir.resolve(),
            heartbeat_seconds=settings.job_heartbeat_seconds,
            stop_seconds=settings.job_stop_seconds,
            retry_seconds=settings.job_retry_seconds,
            command=tuple(job_command),
            environment=child_environment(settings),
        )
        supervisor = Supervisor(jobs, workshop, max_running_jobs=settings.max_running_jobs)
        stack.push_async_callback(supervisor.close)
        servicer = TrainerServicer(
            jobs,
            CheckpointStore(workshop.checkpoints_dir),
            PromotionStore(redis),
            registry_of(settings.router, ClientAccess.of(settings)),
        )
        gauges = TrainerGauges(jobs, supervisor)
        access = ServerAccess.of(settings)
        running = await stack.enter_async_context(
            server(
                [trainer_service(servicer)],
                host=settings.host,
                port=settings.port,
                progress=lambda: Progress(pending=True, tick=supervisor.num_rounds),
                why_not_ready=gauges.needs_store(),
                frozen_after_seconds=settings.frozen_after_seconds,
                access=access,
                max_message_bytes=settings.max_message_bytes,
            )
        )
        taking = asyncio.create_task(supervisor.run(), name="supervisor")
        stack.push_async_callback(end_task, taking)
        watched = Watched(running.health, gauges.exposition(), gauges.refresh, access.keys)
        watch_address = await stack.enter_async_context(watching(settings, watched))
        yield RunningTrainer(running, supervisor, jobs, watch_address)


async def _serve(settings: TrainerSettings, job_command: Sequence[str]) -> None:
    async with running_trainer(settings, job_command) as trainer:
        await serve_until_signalled(
            trainer.server,
            drain=trainer.supervisor.drain,
            drain_seconds=settings.drain_seconds,
            ready_file=settings.ready_file,
            watch_address=trainer.watch_address,
        )


def trainer_service(servicer: TrainerServicer) -> Service:
    """The trainer's servicer as `grpc_runtime.server` takes it."""
    return Service(
        TRAINER_SERVICE, lambda s: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(servicer, s)
    )


def _make_folders(settings: TrainerSettings) -> None:
    for field in ("jobs_dir", "checkpoints_dir"):
        folder: Path = getattr(settings, field)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise invalid(field, str(folder), f"a folder to write in is needed: {error}") from None


async def _enter_redis(stack: AsyncExitStack, settings: TrainerSettings) -> Redis:
    if settings.redis_url is None:
        private = private_redis.PrivateRedis(settings.jobs_dir / PRIVATE_REDIS_FOLDER)
        url = (await stack.enter_async_context(private)).url
        log.info("private_redis", pid=private.pid, keeps_data=True, note="no router knows it")
    else:
        url = settings.redis_url.get_secret_value()
    client = private_redis.connect(url)
    stack.push_async_callback(client.aclose)
    await private_redis.check(client)
    return client
