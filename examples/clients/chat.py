"""A chat in twenty lines: python examples/clients/chat.py [HOST:PORT], with the services of `fusionroute up --lab`."""

import asyncio
import os
import sys

from fusionroute.client import RouterClient


async def main(address: str) -> None:
    messages = []
    async with RouterClient.open(address) as router:
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            messages.append({"role": "user", "content": line})
            async with router.stream(messages, max_tokens=64) as answer:
                async for token in answer:
                    print(token.text, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": answer.text})


asyncio.run(main(sys.argv[1] if sys.argv[1:] else os.environ.get("FUSIONROUTE_ADDRESS", "127.0.0.1:50050")))
