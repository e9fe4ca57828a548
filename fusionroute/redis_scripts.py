"""Runs the Lua scripts of a package's stores: one round trip each, repeated within a deadline while Redis is away.

Every script is idempotent, so an attempt whose answer was lost may be repeated. No script relies on anything
newer than Redis 6.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    TimeoutError,
)

from fusionroute import tracing
from fusionroute.errors import FusionRouteError, InternalFault, Reason, Unavailable
from fusionroute.metrics import REDIS_ERRORS, REDIS_SECONDS
from fusionroute.private_redis import address_of

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5

UNTRACED_SCRIPTS = frozenset({"append", "read", "renew"})
"""They run again and again while a turn is written: only slow and failed ones have spans."""

_PASSING_REFUSALS = ("OOM ", "READONLY ", "BUSY ", "LOADING ", "MASTERDOWN ", "CLUSTERDOWN ", "TRYAGAIN ")


def _may_pass(error: Exception) -> bool:
    """Whether the same command may succeed later. Redis 6 reports some states of its own only in the text."""
    if isinstance(error, (ConnectionError, TimeoutError, OSError, ReadOnlyError, OutOfMemoryError)):
        return True
    return any(refusal in str(error) for refusal in _PASSING_REFUSALS)


@dataclass(frozen=True, slots=True)
class Script:
    """Lua source and the digest by which Redis knows it."""

    name: str
    source: str
    sha1: str


@cache
def load_script(package: str, *names: str) -> Script:
    """The script made of the files `scripts/<name>.lua` of a package, one after the other."""
    folder = resources.files(package) / "scripts"
    source = "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in names)
    return Script(names[-1], source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


def _note_answer(script: Script, started: float) -> None:
    seconds = time.monotonic() - started
    REDIS_SECONDS.labels(script.name).observe(seconds)
    if tracing.is_on() and (seconds > tracing.SLOW_SECONDS or script.name not in UNTRACED_SCRIPTS):
        tracing.note(f"redis {script.name}", seconds)


def _note_failure(script: Script, started: float, reason: str) -> None:
    REDIS_ERRORS.labels(script.name, reason).inc()
    tracing.note(f"redis {script.name}", time.monotonic() - started, error=reason)


class ScriptRunner:
    """Runs scripts on one Redis.

    Args:
        client: from `fusionroute.private_redis.connect`: it must not repeat commands by itself.
        deadline_seconds: how long an operation may take, repetitions included.
    """

    def __init__(self, client: Redis, *, deadline_seconds: float = 5.0) -> None:
        self._client = client
        self._deadline_seconds = deadline_seconds

    async def run(
        self,
        script: Script,
        keys: Sequence[str],
        arguments: Sequence[str | bytes | int],
        *,
        deadline_seconds: float | None = None,
    ) -> list[Any]:
        """What the script answers.

        Raises:
            Unavailable: STORE_UNAVAILABLE, no answer before the deadline.
            InternalFault: Redis understood and refused.
        """
        limit = self._deadline_seconds if deadline_seconds is None else deadline_seconds
        pause = FIRST_PAUSE_SECONDS
        last: BaseException | None = None
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(limit):
                while True:
                    started = time.monotonic()
                    try:
                        answer = await self._once(script, keys, arguments)
                    except (RedisError, OSError) as error:
                        _note_failure(script, started, type(error).__name__)
                        if isinstance(error, (AuthenticationError, NoPermissionError)):
                            raise self._unavailable(str(error)) from error
                        if not _may_pass(error):
                            message = f"script {script.name} was refused: {error}"
                            raise InternalFault(Reason.INTERNAL, message) from error
                        last = error
                    else:
                        _note_answer(script, started)
                        return answer
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                    pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        _note_failure(script, time.monotonic() - limit, "deadline")
        raise self._unavailable(f"no answer within {limit:g} s{f': {last}' if last else ''}") from last

    async def _once(
        self, script: Script, keys: Sequence[str], arguments: Sequence[str | bytes | int]
    ) -> list[Any]:
        execute: Any = self._client.execute_command
        try:
            answer = await execute("EVALSHA", script.sha1, len(keys), *keys, *arguments)
        except NoScriptError:  # a Redis that has just started; EVAL makes it known
            answer = await execute("EVAL", script.source, len(keys), *keys, *arguments)
        assert isinstance(answer, list)
        return answer

    def _unavailable(self, why: str) -> FusionRouteError:
        message = f"Redis at {address_of(self._client)} cannot be used: {why}"
        return Unavailable(Reason.STORE_UNAVAILABLE, message, retry_after_seconds=1.0)
