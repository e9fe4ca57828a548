"""OpenAI's own client, sync and async: models, chat, streams, completions, tools, schemas, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openai import (
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    NotFoundError,
    OpenAI,
)

from tests.judges.scoring import Score

MODEL = "fusionroute"
MESSAGES: Any = [{"role": "user", "content": "say something"}]
PROMPT = "the answer is"
SCHEMA: Any = {
    "type": "object",
    "properties": {"status": {"enum": ["ok", "bad"]}, "yes": {"type": "boolean"}},
    "required": ["status", "yes"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    """Judges."""
    score = Score()
    client: Any = OpenAI(base_url=f"{score.url}/v1", api_key="none", timeout=60, max_retries=0)
    judge_models(score, client)
    judge_chats(score, client)
    judge_forms(score, client)
    judge_completions(score, client)
    judge_errors(score, client)
    asyncio.run(judge_async(score))
    score.end()


def judge_models(score: Score, client: Any) -> None:
    """The list of models."""
    with score.point("models: list, and one of them"):
        names = [model.id for model in client.models.list()]
        assert MODEL in names and f"{MODEL}/router" in names
        assert client.models.retrieve(MODEL).object == "model"


def judge_chats(score: Score, client: Any) -> None:
    """Chat, whole and streamed."""
    create = client.chat.completions.create
    greedy = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    with score.point("chat: whole, with usage"):
        whole = create(**greedy)
        assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
        assert whole.choices[0].message.content and whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    with score.point("chat: a stream says the same, its usage too"):
        chunks = list(create(**greedy, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    with score.point("chat: the client's accumulating stream helper"):
        stop = whole.choices[0].message.content[-1]  # the helper raises where an answer ends by its length
        with client.chat.completions.stream(**greedy, stop=stop) as stream:
            choice = stream.get_final_completion().choices[0]
        assert choice.finish_reason == "stop"
        assert choice.message.content == whole.choices[0].message.content.partition(stop)[0]
    with score.point("chat: a seed, sampling parameters and n"):
        drawn = {**greedy, "temperature": 1.2, "seed": 7, "n": 3, "top_p": 0.9, "presence_penalty": 0.2}
        once, again = ([choice.message.content for choice in create(**drawn).choices] for _ in "ab")
        assert once == again and len(set(once)) > 1
    with score.point("chat: log-probabilities"):
        content = create(**greedy, logprobs=True, top_logprobs=3).choices[0].logprobs.content
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in content)
        assert all(token.token == token.top_logprobs[0].token for token in content)
    with score.point("chat: stop, logit_bias, max_completion_tokens"):
        cut = create(**{**greedy, "stop": whole.choices[0].message.content[3:5]}).choices[0]
        assert cut.finish_reason == "stop" and whole.choices[0].message.content.startswith(
            cut.message.content
        )
        biased = create(
            model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=4, logit_bias={"40": 100}
        )
        assert len(set(biased.choices[0].message.content)) == 1 and biased.usage.completion_tokens == 4
    with score.point("chat: parts of text, system and developer messages"):
        messages = [
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ]
        assert create(**{**greedy, "messages": messages}).choices[0].message.content


def judge_forms(score: Score, client: Any) -> None:
    """Answers of a form: schemas and calls."""
    create = client.chat.completions.create
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 200, "seed": 3}
    form = {"type": "json_schema", "json_schema": {"name": "state", "strict": True, "schema": SCHEMA}}
    with score.point("chat: an answer by a JSON schema"):
        found = json.loads(create(**asked, response_format=form).choices[0].message.content)
        assert set(found) == {"status", "yes"} and found["status"] in ("ok", "bad"), found
    with score.point("chat: a stream by a JSON schema"):
        chunks = create(**asked, response_format=form, stream=True)
        assert json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)) == found
    with score.point("chat: a call that is demanded by name"):
        choice = {"type": "function", "function": {"name": "set_light"}}
        message = create(**asked, tools=[TOOL], tool_choice=choice).choices[0].message
        (call,) = message.tool_calls
        assert call.function.name == "set_light" and type(json.loads(call.function.arguments)["on"]) is bool
    with score.point("chat: a call in a stream, read by the client's helper"):
        with client.chat.completions.stream(**asked, tools=[TOOL], tool_choice="required") as stream:
            choice = stream.get_final_completion().choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls[0].function.name == "set_light"
    with score.point("chat: the result of a call goes back"):
        messages = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        answer = create(**{**asked, "messages": messages, "max_tokens": 4}, tools=[TOOL])
        assert answer.choices[0].message.role == "assistant"


def judge_completions(score: Score, client: Any) -> None:
    """Completions, whole and streamed."""
    create = client.completions.create
    greedy = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    with score.point("completions: whole"):
        whole = create(**greedy)
        assert whole.object == "text_completion" and whole.choices[0].text
        assert whole.usage.prompt_tokens == len(PROMPT)
    with score.point("completions: streamed"):
        assert (
            "".join(chunk.choices[0].text for chunk in create(**greedy, stream=True)) == whole.choices[0].text
        )
    with score.point("completions: token ids, several prompts, n"):
        ids = [20, 21, 22]
        one = create(**{**greedy, "prompt": ids}).choices[0].text
        many = create(**{**greedy, "prompt": [ids, [30, 31]], "n": 2})
        assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
        assert many.choices[0].text == many.choices[1].text == one
    with score.point("completions: log-probabilities"):
        logprobs = create(**greedy, logprobs=2).choices[0].logprobs
        assert "".join(logprobs.tokens) == whole.choices[0].text
        assert all(len(best) >= 2 for best in logprobs.top_logprobs)
        assert logprobs.text_offset[0] == 0
    with score.point("completions: echo with scores of the prompt"):
        echoed = create(**greedy, echo=True, logprobs=1).choices[0]
        assert echoed.text == PROMPT + whole.choices[0].text
        assert echoed.logprobs.token_logprobs[0] is None
        assert all(logprob <= 0 for logprob in echoed.logprobs.token_logprobs[1:])
    with score.point("completions: scores alone, with max_tokens = 0"):
        alone = create(**{**greedy, "max_tokens": 0}, echo=True, logprobs=1).choices[0]
        assert alone.text == PROMPT
        assert alone.logprobs.token_logprobs == echoed.logprobs.token_logprobs[: len(PROMPT)]
    with score.point("completions: each expert, and the router, by name"):
        for model in client.models.list():
            assert create(**{**greedy, "model": model.id}).model == model.id


@contextmanager
def refused(
    score: Score, what: str, param: str, code: str, kind: type[APIStatusError] = BadRequestError
) -> Iterator[None]:
    """One thing that must be refused for this field with this code."""
    with score.point(what):
        try:
            yield
        except kind as error:
            assert (error.param, error.code) == (param, code), error.body
        else:
            raise AssertionError("nothing was refused")


def judge_errors(score: Score, client: Any) -> None:
    """What is refused, and how the client says it."""
    chat, create = client.chat.completions.create, client.completions.create
    with refused(score, "errors: a model that is not there", "model", "model_not_found", NotFoundError):
        chat(model="gpt-none", messages=MESSAGES)
    with score.refusal("errors: a temperature out of bounds", BadRequestError, "temperature"):
        chat(model=MODEL, messages=MESSAGES, temperature=3)
    with score.refusal("errors: a stream has them before its first byte", BadRequestError, "top_p"):
        chat(model=MODEL, messages=MESSAGES, top_p=-1, stream=True)
    with refused(score, "errors: a prompt that is too long", "prompt", "context_length_exceeded"):
        create(model=MODEL, prompt="a" * 5000)
    with score.refusal("errors: no messages", BadRequestError, "messages"):
        chat(model=MODEL, messages=[])
    with score.refusal("errors: an image", BadRequestError, "messages"):
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        chat(model=MODEL, messages=[{"role": "user", "content": [part]}])
    with score.refusal("errors: a tool whose name is none", BadRequestError, "tool"):
        chat(model=MODEL, messages=MESSAGES, tools=[{"type": "function", "function": {"name": "a b"}}])
    with refused(score, "errors: a token that is not there", "prompt", "token_out_of_range"):
        create(model=MODEL, prompt=[10**6])
    with refused(score, "errors: a schema that is none", "response_format", "invalid_field"):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        chat(model=MODEL, messages=MESSAGES, response_format=form)
    with score.point("errors: message, type, param, code and request id"):
        try:
            chat(model=MODEL, messages=MESSAGES, temperature=3)
        except APIStatusError as error:
            assert error.param == "temperature" and error.code == "invalid_field", error.body
            assert error.type == "invalid_request_error" and error.request_id
        else:
            raise AssertionError("nothing was refused")


async def judge_async(score: Score) -> None:
    """The async client, many at a time."""
    async with AsyncOpenAI(base_url=f"{score.url}/v1", api_key="none", timeout=60, max_retries=0) as typed:
        client: Any = typed
        greedy = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        with score.point("async: eight completions at a time say the same"):
            answers = await asyncio.gather(*(client.completions.create(**greedy) for _ in range(8)))
            assert len({answer.choices[0].text for answer in answers}) == 1
        with score.point("async: a stream that is left, then another"):
            stream = await client.completions.create(**{**greedy, "max_tokens": 500}, stream=True)
            async for _ in stream:
                break
            await stream.close()
            stream = await client.completions.create(**greedy, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == answers[0].choices[0].text


main()
