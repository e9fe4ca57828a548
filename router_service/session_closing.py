"""Giving back what the models hold of sessions that end: for good, or so that others may still begin with it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fusionroute.background import end_task
from fusionroute.engine import Closing
from router_service.deletions import Deletions
from router_service.experts import Directory
from router_service.instances import Instance
from router_service.serving import ServedCheckpoints, Serving
from router_service.session_text import Text

FENCE_OF_DELETE = 2**63 - 1
"""Above every writer's: a deleted session is closed whoever wrote it."""

PARTING_SECONDS = 1.0
TELL_AGAIN_SECONDS = 1.0
MOST_TOLD_AT_A_TIME = 16


@dataclass(slots=True, eq=False)
class SessionCloser:
    """Closes sessions in the router's engines and in the experts."""

    served: ServedCheckpoints
    directory: Directory
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _deletions: Deletions = field(default_factory=Deletions)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SessionCloser]:
        """Tells experts that were away of deletions, within the context.

        After it, what is still being closed has a moment; then the models evict it in time.
        """
        telling = asyncio.create_task(self._tell_again(), name="tell of deletions")
        try:
            yield self
        finally:
            await end_task(telling)
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=PARTING_SECONDS)
            for task in list(self._tasks):
                await end_task(task)

    async def forget(self, session_id: str) -> None:
        """Closes a session everywhere; sessions that begin alike may not use what was computed for it either.

        Experts that cannot be reached now are told when they can.
        """
        self._deletions.add(session_id, time.time())
        await asyncio.gather(
            *(self._forget_here(serving, session_id) for serving in self.served.all()),
            *(self._tell(instance, session_id) for instance in list(self.directory.instances.values())),
        )

    def give_back(self, serving: Serving, text: Text) -> None:
        """Begins to close a session that nobody will go on with, in all models that may hold some of it.

        One that another writer goes on with, with a higher fence, stays.

        Beginnings that it has in common with others stay, until the room is needed.
        """
        asked, anywhere = text.asked, text.may_be_anywhere
        for each in self.served.all() if anywhere else [serving]:
            each.engine.let_go([Closing(text.session_id, text.fence)])
        instances = [each for each in self.directory.instances.values() if anywhere or each.name in asked]
        unheard = [each for each in instances if not each.let_go(text.session_id, text.fence)]
        if unheard:
            closing = self._close(unheard, text.session_id, text.fence)
            task = asyncio.create_task(closing, name=f"close {text.session_id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tell(self, instance: Instance, session_id: str) -> bool:
        has_heard = await instance.close_session(session_id, FENCE_OF_DELETE)
        if has_heard:
            self._deletions.told(instance.name, session_id)
        return has_heard

    async def _tell_again(self) -> None:
        """Tells experts that have come, or did not answer, of what was deleted meanwhile."""
        while True:
            instances = {each.name: each for each in self.directory.instances.values()}
            loaded = {name: each.entry.model.epoch / 1000.0 for name, each in instances.items()}
            untold = self._deletions.untold(loaded, time.time())
            await asyncio.gather(*(self._tell_all(instances[name], untold[name]) for name in untold))
            await asyncio.sleep(TELL_AGAIN_SECONDS)

    async def _tell_all(self, instance: Instance, session_ids: Sequence[str]) -> None:
        """Gives up for now once it does not answer."""
        for start in range(0, len(session_ids), MOST_TOLD_AT_A_TIME):
            some = session_ids[start : start + MOST_TOLD_AT_A_TIME]
            if not all(await asyncio.gather(*(self._tell(instance, each) for each in some))):
                return

    @staticmethod
    async def _close(instances: Sequence[Instance], session_id: str, fence: int) -> None:
        """Of those to which there is no stream."""
        await asyncio.gather(*(each.close_session(session_id, fence, may_share=True) for each in instances))

    @staticmethod
    async def _forget_here(serving: Serving, session_id: str) -> None:
        with serving.in_use():
            await serving.engine.close_session(session_id, FENCE_OF_DELETE, for_good=True)
