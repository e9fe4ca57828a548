"""Which checkpoint routers are told to serve, in Redis: raised by promotions and rollbacks, read by every router.

    fr:promotion:{namespace}    hash, kept for good

The store knows names and fingerprints, no files: whoever promotes has checked the checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from fusionroute.errors import Reason, SessionStateError, invalid
from fusionroute.redis_scripts import ScriptRunner, load_script

MOST_PREVIOUS = 100
"""So many rollbacks in a row are possible."""

_CHECKPOINT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


def check_checkpoint_id(checkpoint_id: str) -> str:
    """The id, which is also the name of the checkpoint's folder. Raises InvalidRequest."""
    if not _CHECKPOINT_ID.fullmatch(checkpoint_id):
        limit = "1 to 200 letters, digits, _ . or -, a letter or digit first"
        raise invalid("checkpoint_id", checkpoint_id, limit)
    return checkpoint_id


@dataclass(frozen=True, slots=True)
class PromotedCheckpoint:
    """A checkpoint that routers are or were told to serve.

    Attributes:
        checkpoint_id: empty = none, each router serves the one of its settings.
        fingerprint: of weights, heads and manifest in the number format of the files; empty with an empty id.
    """

    checkpoint_id: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Promotion:
    """What routers are told to serve.

    Attributes:
        revision: raised by every promotion and rollback; 0 = there was none yet.
        current: what to serve.
        previous: what rollbacks lead to, the next one last.
    """

    revision: int
    current: PromotedCheckpoint
    previous: tuple[PromotedCheckpoint, ...]


class PromotionStore:
    """The promotion in one Redis.

    Args:
        client: from `fusionroute.private_redis.connect`.
        namespace: routers of different names are told apart.
        deadline_seconds: how long an operation may take, repetitions included.

    Every method raises Unavailable (STORE_UNAVAILABLE) when Redis did not answer by then. All may be repeated.
    """

    def __init__(self, client: Redis, *, namespace: str = "default", deadline_seconds: float = 5.0) -> None:
        self._runner = ScriptRunner(client, deadline_seconds=deadline_seconds)
        self._keys = [f"fr:promotion:{{{namespace}}}"]

    async def read(self) -> Promotion:
        """What routers are told to serve now."""
        return _promotion(await self._run("read"))

    async def promote(self, checkpoint_id: str, fingerprint: str, expected_revision: int) -> Promotion:
        """Tells routers to serve a checkpoint. The current one again changes nothing.

        Raises:
            InvalidRequest: the id cannot be one.
            SessionStateError: REVISION_CONFLICT, there was another change since `expected_revision`.
        """
        check_checkpoint_id(checkpoint_id)
        answer = await self._run("promote", expected_revision, checkpoint_id, fingerprint, MOST_PREVIOUS)
        return _accepted(answer, expected_revision)

    async def rollback(self, expected_revision: int) -> Promotion:
        """Tells routers to serve what they were told before the current one.

        Raises:
            SessionStateError: REVISION_CONFLICT as in `promote`; NOTHING_TO_ROLL_BACK.
        """
        return _accepted(await self._run("rollback", expected_revision), expected_revision)

    async def _run(self, verb: str, *arguments: str | int) -> Sequence[Any]:
        script = load_script("fusionroute", "promotion", f"promotion_{verb}")
        return await self._runner.run(script, self._keys, arguments)


def revision_conflict(expected: int, actual: int) -> SessionStateError:
    """REVISION_CONFLICT for whoever has seen an older revision."""
    return SessionStateError(
        Reason.REVISION_CONFLICT,
        f"expected_revision = {expected} is not the current one: promotions are at {actual}",
        metadata={"revision": str(actual)},
    )


def _accepted(answer: Sequence[Any], expected_revision: int) -> Promotion:
    promotion = _promotion(answer)
    if answer[0] == b"conflict":
        raise revision_conflict(expected_revision, promotion.revision)
    if answer[0] == b"nothing":
        raise SessionStateError(
            Reason.NOTHING_TO_ROLL_BACK, "no checkpoint is promoted: routers serve the one of their settings"
        )
    return promotion


def _promotion(answer: Sequence[Any]) -> Promotion:
    _, revision, checkpoint_id, fingerprint, previous = answer
    return Promotion(
        revision=int(revision),
        current=PromotedCheckpoint(checkpoint_id.decode(), fingerprint.decode()),
        previous=tuple(PromotedCheckpoint(*entry) for entry in json.loads(previous)),
    )
