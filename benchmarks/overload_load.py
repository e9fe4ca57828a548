"""The clients of `benchmarks.overload`, in a process of their own: prints one JSON line per request.

Closed loop (`--concurrency`): so many clients, each sends its next request when the last has ended.
Open loop (`--rate`): requests begin at random times, whether or not the ones before have ended; none is retried.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field

import grpc

from fusionroute.grpc_runtime import channel, error_from_rpc
from fusionroute.v1 import router_pb2, router_pb2_grpc

NUM_PROMPTS = 8
PROMPT_TOKENS = 8


@dataclass
class Result:
    """What became of one request; seconds."""

    prompt: int
    ids: list[int] = field(default_factory=list)
    first_token_seconds: float = 0.0
    token_seconds: list[float] = field(default_factory=list)
    is_complete: bool = False
    refused_after_seconds: float | None = None
    retry_after_seconds: float | None = None
    reason: str = ""


def request_of(prompt: int, max_tokens: int) -> router_pb2.GenerateRequest:
    """One of a few prompts, whose answers are known after the first round."""
    ids = [2 + (7 * prompt + 3 * index) % 50 for index in range(PROMPT_TOKENS)]
    return router_pb2.GenerateRequest(
        token_ids=router_pb2.TokenIds(ids=ids),
        sampling=router_pb2.SamplingParameters(max_tokens=max_tokens, ignore_eos=True, seed=prompt),
    )


async def one(stub: router_pb2_grpc.RouterServiceAsyncStub, prompt: int, max_tokens: int) -> Result:
    """One request from its beginning to its end, however it ends."""
    result = Result(prompt)
    began = last = time.perf_counter()
    try:
        async for response in stub.Generate(request_of(prompt, max_tokens), timeout=120):
            now = time.perf_counter()
            kind = response.event.WhichOneof("event")
            if kind == "token":
                if result.ids:
                    result.token_seconds.append(now - last)
                else:
                    result.first_token_seconds = now - began
                result.ids.append(response.event.token.id)
                last = now
            elif kind == "finished":
                result.is_complete = True
    except grpc.aio.AioRpcError as failure:
        error = error_from_rpc(failure)
        result.reason = error.reason.value
        result.retry_after_seconds = error.retry_after_seconds
        result.refused_after_seconds = time.perf_counter() - began
    return result


async def load(arguments: argparse.Namespace) -> list[Result]:
    """All requests of one run."""
    draw = random.Random(arguments.seed)  # noqa: S311 - arrival times, not secrets
    async with channel(arguments.address) as open_channel:
        await open_channel.channel_ready()
        stub = router_pb2_grpc.RouterServiceStub(open_channel)
        if arguments.concurrency:
            return await _closed(stub, arguments)
        tasks: list[asyncio.Task[Result]] = []
        ends = time.perf_counter() + arguments.seconds
        due = time.perf_counter()
        while due < ends:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            prompt = draw.randrange(NUM_PROMPTS)
            tasks.append(asyncio.create_task(one(stub, prompt, arguments.max_tokens)))
            due += draw.expovariate(arguments.rate)
        return list(await asyncio.gather(*tasks))


async def _closed(
    stub: router_pb2_grpc.RouterServiceAsyncStub, arguments: argparse.Namespace
) -> list[Result]:
    results: list[Result] = []
    ends = time.perf_counter() + arguments.seconds

    async def client(number: int) -> None:
        prompt = number
        while time.perf_counter() < ends or prompt < NUM_PROMPTS:
            results.append(await one(stub, prompt % NUM_PROMPTS, arguments.max_tokens))
            prompt += arguments.concurrency

    await asyncio.gather(*(client(number) for number in range(arguments.concurrency)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--address", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    began, cpu = time.perf_counter(), time.process_time()
    results = asyncio.run(load(parser.parse_args()))
    for result in results:
        print(json.dumps(asdict(result)))
    print(json.dumps({"cpu_share": (time.process_time() - cpu) / (time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
