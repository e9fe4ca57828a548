"""POST /v1/completions: what a request means."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from fusionroute.errors import invalid
from fusionroute.v1 import router_pb2
from router_service.http.openai_answering import Answer, Shape
from router_service.http.openai_answers import Echo, TextChoice
from router_service.http.openai_prompts import prompts_of, set_prompt
from router_service.http.openai_requests import CompletionBody, Sampled, one_of
from router_service.http.openai_turns import numbered, turn_request
from router_service.http.service import RouterApi
from router_service.http.token_details import Details
from router_service.http.token_scores import TokenScores
from router_service.http.token_text import TokenText
from router_service.turn_request import read_prompt, read_turn

DEFAULT_MAX_TOKENS = 16
SHAPE = Shape("cmpl", "text_completion", "text_completion")
MOST_SCORED_AT_A_TIME = 4


async def completion(body: CompletionBody, api: RouterApi, text: TokenText) -> Answer:
    """The answer to a request; nothing of it is written yet.

    Raises:
        FusionRouteError: the request cannot be served, or its prompt not be scored.
    """
    _refuse_what_is_not_done(body)
    count = body.n or 1
    max_tokens = one_of(body.max_tokens, DEFAULT_MAX_TOKENS)
    num_top = max(1, body.logprobs) if body.logprobs is not None else 0
    prompts = prompts_of(body.prompt)
    common = turn_request(body, api, max(1, max_tokens), num_top)
    prompted = []
    for prompt in prompts:
        request = router_pb2.GenerateRequest()
        request.CopyFrom(common)
        set_prompt(request, prompt)
        prompted.append(request)
    requests = numbered(prompted, count, body.seed)
    echoes: list[Echo | None] = [None] * len(prompts)
    num_prompt_tokens = 0
    if body.echo:
        found = await _echoes(body, prompts, prompted, api)
        echoes = [echo for echo, _ in found]
        num_prompt_tokens = sum(num for _, num in found) if max_tokens == 0 else 0
    scores = TokenScores(body.logprobs, text) if body.logprobs is not None else None
    choices = [
        TextChoice(index, scores, details_of(body), echoes[index // count]) for index in range(len(requests))
    ]
    if max_tokens:
        return Answer(api, body, SHAPE, requests, list(choices))

    def unwritten() -> list[dict[str, Any]]:
        return [chunk for choice in choices for chunk in choice.alone()]

    return Answer(api, body, SHAPE, [], list(choices), unwritten, num_prompt_tokens)


def details_of(body: Sampled) -> Details | None:
    """What the extension of a request wants to be told, for one choice."""
    extension = body.fusionroute
    if extension is None or not extension.details:
        return None
    return Details(extension.num_candidates or 0)


def _refuse_what_is_not_done(body: CompletionBody) -> None:
    if body.suffix:
        raise invalid("suffix", body.suffix, "not supported: text is written at the end of a prompt only")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of", body.best_of, "the same as n: answers are not ranked here")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", 0, "1 or more; 0 only together with echo")


async def _echoes(
    body: CompletionBody,
    prompts: list[str | list[int]],
    prompted: list[router_pb2.GenerateRequest],
    api: RouterApi,
) -> list[tuple[Echo, int]]:
    """The prompts as answers begin with them, and how many tokens each has."""
    places = asyncio.Semaphore(MOST_SCORED_AT_A_TIME)

    async def echo(prompt: str | list[int], request: router_pb2.GenerateRequest) -> tuple[Echo, int]:
        read_turn(request, api.offer)
        ids = await read_prompt(request, api.tokenizer, api.offer, first_turn=True)
        given = prompt
        shown = given if isinstance(given, str) else await asyncio.to_thread(_decoded, api, ids)
        if body.logprobs is None:
            return Echo(shown), len(ids)
        async with places:
            return Echo(shown, await _scored(request, ids, api, body.seed or 0)), len(ids)

    tasks = [asyncio.ensure_future(echo(*each)) for each in zip(prompts, prompted, strict=True)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _decoded(api: RouterApi, ids: list[int]) -> str:
    return str(api.tokenizer.decode(ids, skip_special_tokens=True))


async def _scored(
    request: router_pb2.GenerateRequest, ids: list[int], api: RouterApi, seed: int
) -> tuple[router_pb2.PromptToken, ...]:
    """A prompt's tokens with their log-probabilities, under the rule that continues it."""
    wanted = router_pb2.ScorePromptRequest(
        token_ids=router_pb2.TokenIds(ids=ids),
        combine=request.combine,
        fixed_expert=request.fixed_expert,
        expert_choice=request.expert_choice,
        seed=seed,
        num_top_candidates=request.num_top_candidates,
        exact=request.exact,
    )
    tokens: list[router_pb2.PromptToken] = []
    async with aclosing(api.scorer.score(wanted)) as responses:
        async for response in responses:
            tokens.extend(response.tokens)
    return tuple(tokens)
