"""litellm with its provider `openai/`: chat, streams, text completions, errors, sync and async."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import litellm

from tests.judges.scoring import Score

MESSAGES: Any = [{"role": "user", "content": "say something"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"status": {"enum": ["ok", "bad"]}},
    "required": ["status"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "ping",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}


def main() -> None:
    """Judges."""
    score = Score()
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    target = {"api_base": f"{score.url}/v1", "api_key": "none", "timeout": 60, "num_retries": 0}
    greedy: Any = {
        "model": "openai/fusionroute",
        "messages": MESSAGES,
        "max_tokens": 8,
        "temperature": 0,
        **target,
    }
    judge_chats(score, greedy)
    judge_texts(score, {**greedy, "model": "text-completion-openai/fusionroute"})
    with score.refusal("errors: a model that is not there", litellm.NotFoundError, "gpt-none"):
        litellm.completion(**{**greedy, "model": "openai/gpt-none"})
    with score.refusal("errors: a field out of bounds", litellm.BadRequestError, "temperature"):
        litellm.completion(**{**greedy, "temperature": 3})
    with score.refusal(
        "errors: a prompt that is too long is known as such", litellm.ContextWindowExceededError, "2047"
    ):
        litellm.completion(**{**greedy, "messages": [{"role": "user", "content": "a" * 5000}]})
    asyncio.run(judge_async(score, greedy))
    score.end()


def judge_chats(score: Score, greedy: Any) -> None:
    """completion()."""
    with score.point("completion: whole, with usage"):
        whole = litellm.completion(**greedy)
        assert whole.choices[0].message.content and whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.completion_tokens <= 8
    with score.point("completion: a stream says the same"):
        chunks = list(litellm.completion(**greedy, stream=True, stream_options={"include_usage": True}))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
        assert built.usage.total_tokens == whole.usage.total_tokens
    with score.point("completion: n, a seed, log-probabilities"):
        drawn = {**greedy, "temperature": 1.1, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 2}
        once, again = (
            [choice.message.content for choice in litellm.completion(**drawn).choices] for _ in "ab"
        )
        assert once == again and len(once) == 2
        assert litellm.completion(**drawn).choices[0].logprobs.content
    with score.point("completion: a JSON schema"):
        form = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
        answer = litellm.completion(**{**greedy, "max_tokens": 60}, response_format=form)
        assert json.loads(answer.choices[0].message.content)["status"] in ("ok", "bad")
    with score.point("completion: a tool that must be called"):
        answer = litellm.completion(
            **{**greedy, "max_tokens": 120},
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "ping"}},
        )
        assert answer.choices[0].message.tool_calls[0].function.name == "ping"
    with score.point("completion: one expert by its name"):
        assert litellm.completion(**{**greedy, "model": "openai/fusionroute/math"}).choices[0].message.content


def judge_texts(score: Score, options: Any) -> None:
    """text_completion()."""
    greedy = {key: value for key, value in options.items() if key != "messages"} | {"prompt": "the answer is"}
    with score.point("text_completion: whole"):
        whole = litellm.text_completion(**greedy)
        assert whole.choices[0].text and whole.usage.prompt_tokens == len("the answer is")
    with score.point("text_completion: streamed"):
        chunks = litellm.text_completion(**greedy, stream=True)
        assert "".join(chunk.choices[0].text or "" for chunk in chunks) == whole.choices[0].text
    with score.point("text_completion: through the provider openai/"):
        model = greedy["model"].replace("text-completion-openai/", "openai/")
        assert litellm.text_completion(**{**greedy, "model": model}).choices[0].text
    with score.point("text_completion: echo with log-probabilities"):
        echoed = litellm.text_completion(**greedy, echo=True, logprobs=1).choices[0]
        assert echoed.text == "the answer is" + whole.choices[0].text


async def judge_async(score: Score, greedy: Any) -> None:
    """acompletion()."""
    with score.point("acompletion: five at a time, and a stream"):
        answers = await asyncio.gather(*(litellm.acompletion(**greedy) for _ in range(5)))
        texts = {answer.choices[0].message.content for answer in answers}
        stream = await litellm.acompletion(**greedy, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert texts == {"".join(parts)}


main()
