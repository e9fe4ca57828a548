"""Answers of a service as a client wants them: errors as the service meant them, streams closed behind it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

import grpc

from fusionroute.grpc_runtime import error_from_rpc

Request = TypeVar("Request")
Answer = TypeVar("Answer")


async def answer_of(call: Awaitable[Answer], address: str) -> Answer:
    """The answer of a unary call to the service at `address`. Raises FusionRouteError as it meant it."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, address) from None


async def answers_of(
    call: grpc.aio.UnaryStreamCall[Request, Answer], address: str
) -> AsyncGenerator[Answer, None]:
    """The answers of a streaming call, which ends when the generator is closed. Raises as `answer_of`."""
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, address) from None
    finally:
        call.cancel()
