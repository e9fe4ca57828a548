"""The API of Hugging Face's text-generation-inference: for its clients and SageMaker.

Probabilities of tokens are those before temperature and filters, as everywhere here; TGI's are those after.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from fusionroute import __version__
from fusionroute.errors import FusionRouteError
from fusionroute.v1 import router_pb2
from router_service.http.errors import retry_headers
from router_service.http.presence import unless_gone
from router_service.http.service import RouterApi
from router_service.http.sse import EventStream, event
from router_service.http.tgi_answers import TgiAnswer, TgiError, TgiToken, TokenReader
from router_service.http.tgi_requests import MAX_BEST_OF, TgiRequest, check, turn_of
from router_service.sampling_request import MAX_STOPS
from router_service.serving import Serving

COMPUTE_TYPE = "fusionroute"


def tgi_routes(api: RouterApi) -> list[BaseRoute]:
    """`/` (POST), `/generate`, `/generate_stream`, `/invocations`, `/info`."""
    tgi = Tgi(api)
    return [
        Route("/", tgi.compatible, methods=["POST"]),
        Route("/generate", tgi.generate, methods=["POST"]),
        Route("/generate_stream", tgi.generate_stream, methods=["POST"]),
        Route("/invocations", tgi.compatible, methods=["POST"]),
        Route("/info", tgi.info, methods=["GET"]),
    ]


@dataclass(frozen=True, slots=True)
class Tgi:
    """The handlers, over the router's own calls."""

    api: RouterApi

    async def compatible(self, request: Request) -> Response:
        """`/`: a list with one answer, or a stream where the body says so."""
        return await _answered(request, lambda wanted: self._compatible(request, wanted))

    async def generate(self, request: Request) -> Response:
        """`/generate`: one answer."""
        return await _answered(request, lambda wanted: self._whole(request, wanted, as_list=False))

    async def generate_stream(self, request: Request) -> Response:
        """`/generate_stream`: an event for each token."""
        return await _answered(request, self._streamed)

    async def info(self, request: Request) -> Response:
        """`/info`: what is served, and what may be asked for."""
        serving = self.api.served.current
        facts, longest = serving.engine.facts, serving.offer.max_context_tokens
        return JSONResponse(
            {
                "model_id": self.api.served_name,
                "model_sha": serving.offer.checkpoint,
                "model_dtype": f"torch.{facts.dtype}",
                "model_device_type": serving.engine.model.model.device.type,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": self.api.keeper.admission.max_running,
                "max_best_of": MAX_BEST_OF,
                "max_stop_sequences": MAX_STOPS,
                "max_input_tokens": longest - 1,
                "max_input_length": longest - 1,
                "max_total_tokens": longest,
                "max_client_batch_size": 1,
                "validation_workers": 1,
                "router": "fusionroute",
                "version": __version__,
                "sha": None,
                "docker_label": None,
            }
        )

    async def _compatible(self, request: Request, wanted: TgiRequest) -> Response:
        if wanted.stream:
            return await self._streamed(wanted)
        return await self._whole(request, wanted, as_list=True)

    async def _whole(self, request: Request, wanted: TgiRequest, *, as_list: bool) -> Response:
        check(wanted, streams=False)
        clock = _Clock()
        async with unless_gone(request.receive):
            serving, turn = await self._turn(wanted)
            clock.validated()
            prefill = await self._prefill(wanted, serving, turn)
            num_answers = wanted.parameters.best_of or 1
            answers = await _side_by_side([self._answer(serving, turn) for _ in range(num_answers)])
        best, *others = sorted(answers, key=lambda answer: -answer.mean_logprob)
        body = _body(wanted, best, others, prefill)
        headers = clock.headers(best, len(wanted.inputs))
        return JSONResponse([body] if as_list else body, headers=headers)

    async def _streamed(self, wanted: TgiRequest) -> Response:
        check(wanted, streams=True)
        serving, turn = await self._turn(wanted)

        async def parts() -> AsyncGenerator[bytes, None]:
            async with aclosing(self._tokens(serving, turn)) as tokens:
                async for token in tokens:
                    yield event(_event_body(wanted, token))

        answer = EventStream(
            parts(), early_error=_error, late_error=lambda error: event(TgiError.of(error).to_json())
        )
        answer.headers["x-compute-type"] = COMPUTE_TYPE
        answer.headers["x-compute-characters"] = str(len(wanted.inputs))
        return answer

    async def _turn(self, wanted: TgiRequest) -> tuple[Serving, router_pb2.GenerateRequest]:
        serving = self.api.served.current
        return serving, await turn_of(wanted, serving)

    async def _answer(self, serving: Serving, turn: router_pb2.GenerateRequest) -> TgiAnswer:
        return await TgiAnswer.read(self._tokens(serving, turn))

    async def _tokens(
        self, serving: Serving, turn: router_pb2.GenerateRequest
    ) -> AsyncGenerator[TgiToken, None]:
        """The tokens of a turn, which is cancelled when nobody reads on."""
        live = await self.api.begin(turn)
        reader = TokenReader(live, serving, has_constraint=turn.sampling.HasField("constraint"))
        try:
            async with (
                aclosing(self.api.events(live)) as events,
                aclosing(reader.read(events)) as tokens,
            ):
                async for token in tokens:
                    yield token
        finally:
            if not live.is_over:
                live.cancel()

    async def _prefill(
        self, wanted: TgiRequest, serving: Serving, turn: router_pb2.GenerateRequest
    ) -> list[dict[str, Any]]:
        """The prompt's tokens with their probabilities, where they are asked for."""
        if not wanted.parameters.decoder_input_details:
            return []
        asked = router_pb2.ScorePromptRequest(token_ids=turn.token_ids, combine=turn.combine)
        found: list[dict[str, Any]] = []
        async with aclosing(self.api.scorer.score(asked)) as responses:
            async for response in responses:
                for token in response.tokens:
                    logprob = token.logprob if token.HasField("logprob") else None
                    text = serving.tokenizer.decode([token.id])
                    found.append({"id": token.id, "text": text, "logprob": logprob})
        return found


async def _answered(request: Request, answer: Callable[[TgiRequest], Awaitable[Response]]) -> Response:
    """What a handler makes of a request's body; errors before the first byte as TGI tells them."""
    try:
        return await answer(TgiRequest.parse(await request.body()))
    except FusionRouteError as error:
        return _error(error)


def _error(error: FusionRouteError) -> Response:
    found = TgiError.of(error)
    return JSONResponse(found.to_json(), found.status, retry_headers(error))


async def _side_by_side(answers: list[Coroutine[Any, Any, TgiAnswer]]) -> list[TgiAnswer]:
    """All answers; where one fails, the others are broken off. Raises what that one raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer) for answer in answers]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _body(
    wanted: TgiRequest, best: TgiAnswer, others: list[TgiAnswer], prefill: list[dict[str, Any]]
) -> dict[str, Any]:
    parameters = wanted.parameters
    before = wanted.inputs if parameters.return_full_text else ""
    body: dict[str, Any] = {"generated_text": before + best.ending.generated_text}
    if not (parameters.details or parameters.decoder_input_details):
        return body
    with_top = bool(parameters.top_n_tokens)
    body["details"] = best.details(prefill, with_top=with_top)
    if parameters.best_of is not None and parameters.best_of > 1:
        body["details"]["best_of_sequences"] = [
            {"generated_text": before + other.ending.generated_text}
            | other.details(prefill, with_top=with_top)
            for other in others
        ]
    return body


def _event_body(wanted: TgiRequest, token: TgiToken) -> dict[str, Any]:
    parameters = wanted.parameters
    body: dict[str, Any] = {"index": token.index, "token": token.to_json()}
    if parameters.top_n_tokens:
        body["top_tokens"] = list(token.top)
    body |= {"generated_text": None, "details": None}
    if token.ending is not None:
        before = wanted.inputs if parameters.return_full_text else ""
        body["generated_text"] = before + token.ending.generated_text
        if parameters.details:
            body["details"] = token.ending.details()
    return body


@dataclass(slots=True)
class _Clock:
    """What the `x-` headers of a whole answer tell."""

    started: float = field(default_factory=time.monotonic)
    validated_at: float = 0.0

    def validated(self) -> None:
        """The request was checked and its prompt encoded."""
        self.validated_at = time.monotonic()

    def headers(self, answer: TgiAnswer, num_characters: int) -> Mapping[str, str]:
        """Times in whole milliseconds, but for `x-compute-time`, which is in seconds."""
        now = time.monotonic()
        total, inference = now - self.started, now - self.validated_at
        ending = answer.ending
        return {
            "x-compute-type": COMPUTE_TYPE,
            "x-compute-time": f"{total:.6f}",
            "x-compute-characters": str(num_characters),
            "x-total-time": _milliseconds(total),
            "x-validation-time": _milliseconds(self.validated_at - self.started),
            "x-inference-time": _milliseconds(inference),
            "x-time-per-token": _milliseconds(inference / ending.num_generated),
            "x-prompt-tokens": str(ending.num_input),
            "x-generated-tokens": str(ending.num_generated),
        }


def _milliseconds(seconds: float) -> str:
    return str(round(1000 * seconds))
