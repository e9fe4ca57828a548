"""`huggingface_hub`'s InferenceClient, sync and async: text_generation with details and streams, chat_completion."""

from __future__ import annotations

import asyncio
from typing import Any

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import BadRequestError, HfHubHTTPError
from huggingface_hub.errors import ValidationError as TgiValidationError

from tests.judges.scoring import Score

PROMPT = "w5 w9 w20"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


def main() -> None:
    """Judges."""
    score = Score()
    client = InferenceClient(score.url, timeout=60)
    judge_texts(score, client)
    judge_chats(score, client)
    asyncio.run(judge_async(score))
    score.end()


def judge_texts(score: Score, client: Any) -> None:
    """text_generation."""
    with score.point("text_generation: a string"):
        text = client.text_generation(PROMPT, max_new_tokens=6)
        assert isinstance(text, str) and text
    with score.point("text_generation: details"):
        answer = client.text_generation(PROMPT, max_new_tokens=6, details=True)
        assert answer.generated_text == text
        assert answer.details.generated_tokens == len(answer.details.tokens)
        assert all(token.logprob <= 0 for token in answer.details.tokens)
        assert answer.details.finish_reason in ("length", "eos_token")
    with score.point("text_generation: prompt tokens with decoder_input_details"):
        answer = client.text_generation(PROMPT, max_new_tokens=1, details=True, decoder_input_details=True)
        assert [token.id for token in answer.details.prefill] == [5, 9, 20]
    with score.point("text_generation: sampling with a seed, top_k, top_p, penalties"):
        options = {
            "do_sample": True,
            "seed": 5,
            "top_k": 9,
            "top_p": 0.9,
            "temperature": 0.8,
            "max_new_tokens": 8,
        }
        once, again = (
            client.text_generation(PROMPT, repetition_penalty=1.1, frequency_penalty=-0.5, **options)
            for _ in "ab"
        )
        assert once == again
    with score.point("text_generation: best_of and top_n_tokens"):
        answer = client.text_generation(
            PROMPT, best_of=2, do_sample=True, top_n_tokens=2, max_new_tokens=3, details=True
        )
        assert len(answer.details.best_of_sequences) == 1
        assert all(len(top) == 2 for top in answer.details.top_tokens)
    with score.point("text_generation: stop, truncate, return_full_text"):
        drawn = {"do_sample": True, "seed": 1, "max_new_tokens": 8}
        text = client.text_generation(PROMPT, **drawn)
        answer = client.text_generation(PROMPT, stop=[text[3:6]], details=True, **drawn)
        assert answer.generated_text.endswith(text[3:6])
        assert answer.details.finish_reason == "stop_sequence"
        assert client.text_generation(PROMPT, return_full_text=True, truncate=2, max_new_tokens=2).startswith(
            PROMPT
        )
    with score.point("text_generation: a stream of strings"):
        whole = client.text_generation(PROMPT, max_new_tokens=5, details=True)
        pieces = list(client.text_generation(PROMPT, max_new_tokens=5, stream=True))
        special = [token.text for token in whole.details.tokens if token.special]
        assert "".join(piece for piece in pieces if piece not in special) == whole.generated_text
    with score.point("text_generation: a stream of details"):
        events = list(client.text_generation(PROMPT, max_new_tokens=5, stream=True, details=True))
        assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
        assert events[-1].details.input_length == 3
        assert events[-1].generated_text == whole.generated_text
    with score.point("text_generation: a regular expression"):
        text = client.text_generation(
            PROMPT, grammar={"type": "regex", "value": " ?w3[0-9]"}, max_new_tokens=4
        ).strip()
        assert text[:2] == "w3" and len(text) == 3, text
    with score.refusal("text_generation: refused as TGI does", TgiValidationError, "`max_new_tokens`"):
        client.text_generation(PROMPT, max_new_tokens=4000)
    with score.refusal(
        "text_generation: a stream refused with a status", (TgiValidationError, HfHubHTTPError)
    ):
        list(client.text_generation(PROMPT, max_new_tokens=4000, stream=True))
    with score.point("get_endpoint_info"):
        assert InferenceClient(score.url, provider="hf-inference").get_endpoint_info()["model_id"]


def judge_chats(score: Score, client: Any) -> None:
    """chat_completion."""
    with score.point("chat_completion: whole"):
        answer = client.chat_completion(MESSAGES, model="fusionroute", max_tokens=5, temperature=0)
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    with score.point("chat_completion: the model left out, as the client allows"):
        assert client.chat_completion(MESSAGES, max_tokens=5).choices[0].message.content
    with score.point("chat_completion: streamed"):
        chunks = list(
            client.chat_completion(MESSAGES, model="fusionroute", max_tokens=5, temperature=0, stream=True)
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == answer.choices[0].message.content
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] is not None
    with score.point("chat_completion: logprobs and a seed"):
        answer = client.chat_completion(
            MESSAGES,
            model="fusionroute",
            max_tokens=3,
            temperature=1.0,
            seed=4,
            logprobs=True,
            top_logprobs=2,
        )
        assert all(len(token.top_logprobs) == 2 for token in answer.choices[0].logprobs.content)
    with score.point("chat.completions.create, as with OpenAI's client"):
        made = client.chat.completions.create(messages=MESSAGES, model="fusionroute", max_tokens=2)
        assert made.choices[0].finish_reason == "length"
    with score.refusal("chat_completion: refused with a status", (BadRequestError, HfHubHTTPError)):
        client.chat_completion(MESSAGES, model="fusionroute", max_tokens=5, temperature=-1.0)


async def judge_async(score: Score) -> None:
    """The same through the async client."""
    async with AsyncInferenceClient(score.url, timeout=60) as typed_client:
        client: Any = typed_client
        with score.point("async text_generation, whole and streamed"):
            whole = await client.text_generation(PROMPT, max_new_tokens=5, details=True)
            stream = await client.text_generation(PROMPT, max_new_tokens=5, stream=True, details=True)
            events = [event async for event in stream]
            assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]


main()
