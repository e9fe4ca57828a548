"""Logs: one event a line, JSON for machines or columns for people, bound to their context."""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal

import structlog

LogFormat = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]


_debugging = False


def is_debugging() -> bool:
    """Whether debug lines are written; asked where even a line that is dropped would cost too much."""
    return _debugging


def quiet_native_logs() -> None:
    """Keeps the chatter of native libraries off stderr; call before grpc or tokenizers are imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def configure_logs(service: str, *, log_format: LogFormat = "auto", log_level: LogLevel = "info") -> None:
    """Sends structlog's events and the standard library's to stderr in one format.

    Args:
        service: bound to every event as `service`.
        log_format: "json", "console", or "auto" = console on a terminal, else JSON.
        log_level: events below it are dropped.
    """
    level = logging.getLevelNamesMapping()[log_level.upper()]
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor]
    if as_json:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        # Plain tracebacks: the decorated ones print local variables, prompts and secrets among them.
        plain = structlog.dev.plain_traceback
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *last])
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    global _debugging
    _debugging = level <= logging.DEBUG
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)
