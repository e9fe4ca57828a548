"""Giving back what the models hold of sessions that end: for good, or so that others may still begin with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fusionroute.background import end_task
from fusionroute.engine import Closing
from router_service.experts import Directory
from router_service.instances import Instance
from router_service.serving import ServedCheckpoints, Serving
from router_service.session_text import Text

FENCE_OF_DELETE = 2**63 - 1
"""Above every writer's: a deleted session is closed whoever wrote it."""

PARTING_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class SessionCloser:
    """Closes sessions in the router's engines and in the experts."""

    served: ServedCheckpoints
    directory: Directory
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[SessionCloser]:
        """After the context, what is still being closed has a moment; then the models evict it in time."""
        try:
            yield self
        finally:
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=PARTING_SECONDS)
            for task in list(self._tasks):
                await end_task(task)

    async def forget(self, session_id: str) -> None:
        """Closes a session everywhere; sessions that begin alike may not use what was computed for it either."""
        await asyncio.gather(
            *(self._forget_here(serving, session_id) for serving in self.served.all()),
            *(
                instance.close_session(session_id, FENCE_OF_DELETE)
                for instance in list(self.directory.instances.values())
            ),
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

    @staticmethod
    async def _close(instances: Sequence[Instance], session_id: str, fence: int) -> None:
        """Of those to which there is no stream."""
        await asyncio.gather(*(each.close_session(session_id, fence, may_share=True) for each in instances))

    @staticmethod
    async def _forget_here(serving: Serving, session_id: str) -> None:
        with serving.in_use():
            await serving.engine.close_session(session_id, FENCE_OF_DELETE, for_good=True)
