"""A cut connection: the answer is written on meanwhile, and goes on at the next token over another one.

python examples/clients/resume.py [HOST:PORT] [PROMPT]; begin the services with `fusionroute up --lab`.

`stream` does this by itself where a connection breaks under it; here the program itself comes back, perhaps as another
process.
"""

import asyncio
import os
import sys
import uuid

from fusionroute.client import RouterClient


async def main(address: str, prompt: str) -> None:
    session_id = uuid.uuid4().hex  # what to remember: the id, and how many tokens have come
    num_tokens = 0
    async with (
        RouterClient.open(address) as router,
        router.stream(prompt, session_id=session_id, max_tokens=32) as answer,
    ):
        async for token in answer:
            print(token.text, end="", flush=True)
            num_tokens += 1
            if num_tokens == 3:
                break
    print("|", end="", flush=True)  # the connection is cut here
    async with RouterClient.open(address) as router:
        async with router.follow(session_id, from_token=num_tokens) as rest:
            async for token in rest:
                print(token.text, end="", flush=True)
        print(f"\n{rest.completion.finish_reason.value}", file=sys.stderr)
        await router.delete_session(session_id)


address = os.environ.get("FUSIONROUTE_ADDRESS", "127.0.0.1:50050")
asyncio.run(main(*(*sys.argv[1:], *(address, "box: 4+4; rev jbef=")[len(sys.argv) - 1 :])))
