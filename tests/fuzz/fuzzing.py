"""Sends malformed requests to a running service and counts the answers by status."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.fuzz.messages import draw

IN_FLIGHT = 16
USUAL_TIMEOUT_SECONDS = 5.0
LONGEST_STREAM_SECONDS = 0.3
HANGING_SECONDS = 30.0
RARE, RARE_SHARE = ("Reload",), 0.02
"""What takes seconds when it is asked for well enough: a model is loaded."""
FAULTS = ("INTERNAL", "UNKNOWN", "DATA_LOSS")


@dataclass
class Tally:
    """What came back.

    Attributes:
        statuses: answers by kind of request and status.
        faults: the first words of every answer that blames the service, with a request that brought it.
        num_hanging: calls that did not even end with their deadline.
    """

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], bytes] = field(default_factory=dict)
    num_hanging: int = 0

    def count(self, label: str, called: str, status: str, words: str, data: bytes) -> None:
        """One answer; `words` are its message, `data` what was sent."""
        self.statuses[label, status] += 1
        if status in FAULTS:
            fault = called, f"{status}: {words[:160]}"
            self.faults[fault] += 1
            self.examples.setdefault(fault, data)

    def table(self) -> str:
        """Kinds of requests by status."""
        statuses = sorted({status for _, status in self.statuses})
        lines = [f"{'':36}" + "".join(f"{status:>21}" for status in statuses)]
        for kind in sorted({kind for kind, _ in self.statuses}):
            lines.append(f"{kind:36}" + "".join(f"{self.statuses[kind, status]:21}" for status in statuses))
        return "\n".join(lines)


async def fuzz(
    channel: grpc.aio.Channel,
    service: ServiceDescriptor,
    valid: dict[str, Message],
    count: int,
    seed: int = 0,
) -> Tally:
    """Sends `count` requests to all methods of a service.

    Args:
        valid: by method, requests that could be served; methods without one get mutations of the empty message.
    """
    rng, tally, places = random.Random(seed), Tally(), asyncio.Semaphore(IN_FLIGHT)

    async def one(number: int) -> None:
        async with places:
            try:
                async with asyncio.timeout(HANGING_SECONDS):
                    await _send(channel, service, valid, rng, tally)
            except TimeoutError:
                tally.num_hanging += 1

    await asyncio.gather(*(one(number) for number in range(count)))
    return tally


async def _send(
    channel: grpc.aio.Channel,
    service: ServiceDescriptor,
    valid: dict[str, Message],
    rng: random.Random,
    tally: Tally,
) -> None:
    if rng.random() < 0.02:
        path = f"/{service.full_name}/{rng.choice(['Nothing', 'step', 'x/y'])}"
        unknown: grpc.aio.Call = channel.unary_unary(path)(b"\x08\x01", timeout=USUAL_TIMEOUT_SECONDS)
        tally.statuses["an unknown method", await _outcome(unknown, leaves=False)] += 1
        return
    methods = [each for each in service.methods if each.name not in RARE or rng.random() < RARE_SHARE]
    method = rng.choice(methods)
    kind, data = draw(rng, valid.get(method.name) or GetMessageClass(method.input_type)())
    label, timeout, leaves = kind.value, USUAL_TIMEOUT_SECONDS, False
    match rng.randrange(20):
        case 0:
            label, timeout = "a deadline of zero", 0.0
        case 1:
            label, leaves = "cancelled at once", True
    status, words = await _call(channel, service, method, data, timeout, leaves)
    tally.count(label, f"{method.name} ({kind.value})", status, words, data)


async def _call(
    channel: grpc.aio.Channel,
    service: ServiceDescriptor,
    method: MethodDescriptor,
    data: bytes,
    timeout: float,
    leaves: bool,
) -> tuple[str, str]:
    """Status and message of one call."""
    path = f"/{service.full_name}/{method.name}"
    call: grpc.aio.Call
    if method.server_streaming:
        call = channel.unary_stream(path)(data, timeout=min(timeout, LONGEST_STREAM_SECONDS))
    else:
        call = channel.unary_unary(path)(data, timeout=timeout)
    status = await _outcome(call, leaves=leaves)
    return status, str(await call.details() or "") if not leaves else ""


async def _outcome(call: grpc.aio.Call, *, leaves: bool) -> str:
    if leaves:
        await asyncio.sleep(0)
        call.cancel()
        return "left"
    return (await call.code()).name
