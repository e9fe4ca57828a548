"""Answers of a serving router, or of somebody else's model, asked for again until they are there."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from fusionroute.client import RouterClient
from fusionroute.errors import FusionRouteError, OutOfRoom, Reason, Unavailable
from fusionroute.grpc_runtime import backoff_seconds
from fusionroute.remote_models import RemoteEnding, RemoteModel, RemoteSampling
from fusionroute.v1.router_pb2 import CombineRule, FinishReason, GenerateRequest
from trainer.data import GoldPrompt

ANSWER_SECONDS = 600.0
PATIENCE_SECONDS = 120.0
FORGET_SECONDS = 5.0


class Ending(Enum):
    """How an answer ended."""

    ENDED = "ended"
    """By itself."""
    CUT = "cut"
    """There was no room for more tokens."""
    REFUSED = "refused"
    """The prompt alone is too long, or someone cancelled it: there is no answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a policy wrote; `checkpoint` is the fingerprint of the router that wrote it."""

    text: str
    ending: Ending
    checkpoint: str


class Answerer(Protocol):
    """Whoever can answer prompts."""

    async def answer(self, prompt: GoldPrompt, temperature: float, seed: int) -> Answer:
        """The answer; greedy at temperature 0, else a pure function of the seed too."""


@dataclass(frozen=True, slots=True)
class ServedAnswerer:
    """Answers through a router service.

    Attributes:
        combine: the combine rule, for example "sum".
        max_new_tokens: of one answer.
        patience_seconds: how long the service may be away or too busy, from one try to the last.
    """

    router: RouterClient
    combine: str
    max_new_tokens: int
    patience_seconds: float = PATIENCE_SECONDS

    async def answer(self, prompt: GoldPrompt, temperature: float, seed: int) -> Answer:
        """The answer that the service streams; the same turn is asked for again when the stream breaks.

        Raises:
            FusionRouteError: as the service means it; Unavailable or OutOfRoom once patience is at its end.
        """
        request = self._request(prompt, temperature, seed)
        give_up_at = time.monotonic() + self.patience_seconds
        attempt = 0
        while True:
            try:
                answer = await self._read(request)
            except FusionRouteError as error:
                if error.reason is Reason.CONTEXT_FULL:
                    return Answer("", Ending.REFUSED, "")
                wait = max(error.retry_after_seconds or 0.0, backoff_seconds(attempt))
                if not _passes_with_time(error) or time.monotonic() + wait > give_up_at:
                    raise
                await asyncio.sleep(wait)
                attempt += 1
                continue
            with suppress(FusionRouteError, TimeoutError):
                await asyncio.wait_for(self.router.delete_session(request.session_id), FORGET_SECONDS)
            return answer

    def _request(self, prompt: GoldPrompt, temperature: float, seed: int) -> GenerateRequest:
        name = f"pairs-{uuid.uuid4().hex}"
        request = GenerateRequest(
            session_id=name,
            request_id=name,
            combine=CombineRule.Value(f"COMBINE_RULE_{self.combine.upper()}"),
        )
        request.token_ids.ids.extend(prompt.prompt_ids)
        request.sampling.max_tokens = self.max_new_tokens
        request.sampling.temperature = temperature
        request.sampling.seed = seed
        return request

    async def _read(self, request: GenerateRequest) -> Answer:
        pieces: list[str] = []
        reason = FinishReason.FINISH_REASON_UNSPECIFIED
        checkpoint = ""
        async with aclosing(self.router.generate(request, ANSWER_SECONDS)) as events:
            async for event in events:
                match event.WhichOneof("event"):
                    case "started":
                        checkpoint = event.started.checkpoint
                    case "token":
                        pieces.append(event.token.text)
                    case "finished":
                        pieces.append(event.finished.text)
                        reason = event.finished.reason
        return Answer("".join(pieces), _ENDINGS.get(reason, Ending.REFUSED), checkpoint)


@dataclass(frozen=True, slots=True)
class RemoteAnswerer:
    """Answers of a single model behind somebody else's server, which has the patience itself."""

    model: RemoteModel
    max_new_tokens: int

    async def answer(self, prompt: GoldPrompt, temperature: float, seed: int) -> Answer:
        """The answer; text prompts are continued where the server speaks TGI's API, else put as a user's message.

        Raises:
            FusionRouteError: as the server means it, naming its URL.
        """
        sampling = RemoteSampling(self.max_new_tokens, temperature=temperature, seed=seed)
        try:
            answer = await self.model.generate(prompt.prompt, sampling)
        except FusionRouteError as error:
            if error.reason is Reason.CONTEXT_FULL:
                return Answer("", Ending.REFUSED, "")
            raise
        ending = Ending.CUT if answer.ending is RemoteEnding.CUT else Ending.ENDED
        return Answer(answer.text, ending, self.model.identity)


_ENDINGS = {
    FinishReason.FINISH_REASON_EOS: Ending.ENDED,
    FinishReason.FINISH_REASON_LENGTH: Ending.CUT,
    FinishReason.FINISH_REASON_CONTEXT: Ending.CUT,
}


def _passes_with_time(error: FusionRouteError) -> bool:
    return isinstance(error, Unavailable | OutOfRoom) or error.retry_after_seconds is not None
