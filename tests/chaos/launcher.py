"""The product's swap code starts and stops the stack's experts through this."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fusionroute.launching import Launch, Launched, LaunchFailed
from tests.chaos.stack import ChaosStack, Node

BRIDGE_SECONDS = 60.0

Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class StackLauncher:
    """A `fusionroute.launching.Launcher` over a chaos stack: what it starts is supervised and behind links as all else.

    Its methods block and are called in threads; the work is done on the loop that made the launcher.
    """

    stack: ChaosStack
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(100))

    def start(self, launch: Launch) -> Launched:
        """Starts an expert on standby."""
        return self._wait(self._start(launch))

    async def _start(self, launch: Launch) -> Launched:
        node = await self.stack.another_expert(launch.slot, launch.model, next(self._numbers))
        node.process.start()
        self.stack.experts.append(node)
        return Launched(node.process.name)

    def address_of(self, launched: Launched) -> str:
        """Its link, once it serves."""
        node = self._node(launched)
        return node.front.address if node.process.address is not None else ""

    def check(self, launched: Launched) -> None:
        """Raises LaunchFailed once it has ended, even though the supervisor would start it again."""
        node = self._node(launched)
        if node.process.deaths:
            raise LaunchFailed(f"{launched.name} ended with {node.process.deaths}", self.log_tail(launched))

    def log_tail(self, launched: Launched) -> list[str]:
        """Of its log."""
        log = self._node(launched).process.log
        return log.read_text(errors="replace").splitlines()[-25:] if log.exists() else []

    def keep(self, launched: Launched) -> None:
        """The supervisor watches over it already."""

    def reach(self, address: str) -> str:
        """The link's address itself."""
        return address

    def find(self, address: str) -> Launched | None:
        """The expert behind a link."""
        for node in self.stack.experts:
            if node.front.address == address:
                return Launched(node.process.name)
        return None

    def stop(self, launched: Launched, deadline_seconds: float) -> None:
        """Ends it for good."""
        self._wait(self._stop(self._node(launched)))

    async def _stop(self, node: Node) -> None:
        await node.process.close()
        if node in self.stack.experts:
            self.stack.experts.remove(node)
            self.stack.retired.append(node)

    def _node(self, launched: Launched) -> Node:
        for node in (*self.stack.experts, *self.stack.retired):
            if node.process.name == launched.name:
                return node
        raise LaunchFailed(f"there is no {launched.name}")

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop).result(BRIDGE_SECONDS)
        except (OSError, TimeoutError) as error:
            raise LaunchFailed(str(error) or "no answer") from error
