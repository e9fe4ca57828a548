"""Completion as one types: each key ends the completion that was running, on the router too, and begins another.

python examples/clients/ide_completion.py [HOST:PORT] < keys

Each line of the input is what has been typed so far; begin the services with `fusionroute up --lab`.
"""

import asyncio
import os
import sys

from fusionroute.client import RouterClient


class Completer:
    """Shows what may follow the text, for as long as it is not typed on."""

    def __init__(self, router: RouterClient) -> None:
        self.router = router
        self.running: asyncio.Task[None] | None = None
        self.num_cancelled = 0

    def typed(self, text: str) -> None:
        """The text has changed."""
        if self.running is not None:
            self.num_cancelled += self.running.cancel()
        self.running = asyncio.create_task(self.complete(text))

    async def complete(self, text: str) -> None:
        """Leaving the block early, as a cancelled task does, cancels the turn."""
        async with self.router.stream(text, max_tokens=24, stop="\n") as answer:
            async for _ in answer:
                print(f"\r{text}\x1b[2m{answer.text}\x1b[0m", end="", flush=True)
        print(f"\r{text}{answer.text}", flush=True)


async def main(address: str) -> None:
    async with RouterClient.open(address) as router:
        completer = Completer(router)
        while line := await asyncio.to_thread(sys.stdin.readline):
            completer.typed(line.rstrip("\n"))
            await asyncio.sleep(0.02)  # until the next key
        if completer.running is not None:
            await completer.running
        print(f"{completer.num_cancelled} completions were ended by the next key", file=sys.stderr)


asyncio.run(main(sys.argv[1] if sys.argv[1:] else os.environ.get("FUSIONROUTE_ADDRESS", "127.0.0.1:50050")))
