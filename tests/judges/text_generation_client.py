"""The `text-generation` client of TGI, sync and async: generate, generate_stream, chat."""

from __future__ import annotations

import asyncio

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Grammar, GrammarType

from tests.judges.scoring import Score

PROMPT = "w5 w9 w20"


def main() -> None:
    """Judges."""
    score = Score()
    client = Client(score.url, timeout=60)
    with score.point("generate: text and details"):
        answer = client.generate(PROMPT, max_new_tokens=6)
        details = answer.details
        assert details.generated_tokens == len(details.tokens) <= 6
        assert answer.generated_text == "".join(t.text for t in details.tokens if not t.special)
        assert all(token.logprob is not None and token.logprob <= 0 for token in details.tokens)
        assert details.finish_reason.value in ("length", "eos_token")
    with score.point("generate: a seed gives the same answer again"):
        once, again = (
            client.generate(PROMPT, do_sample=True, temperature=1.2, seed=7, max_new_tokens=8) for _ in "ab"
        )
        assert once.generated_text == again.generated_text
        assert once.details.seed == 7
    with score.point("generate: top_k, top_p, penalties, truncate, return_full_text"):
        answer = client.generate(
            PROMPT,
            do_sample=True,
            top_k=5,
            top_p=0.9,
            repetition_penalty=1.2,
            frequency_penalty=0.3,
            truncate=2,
            return_full_text=True,
            max_new_tokens=4,
        )
        assert answer.generated_text.startswith(PROMPT)
    with score.point("generate: stop sequences are part of the text"):
        text = client.generate(PROMPT, max_new_tokens=8, do_sample=True, seed=1).generated_text
        stop = text[3:6]
        answer = client.generate(PROMPT, max_new_tokens=8, do_sample=True, seed=1, stop_sequences=[stop])
        assert answer.generated_text.endswith(stop)
        assert answer.details.finish_reason.value == "stop_sequence"
    with score.point("generate: best_of"):
        answer = client.generate(PROMPT, best_of=2, do_sample=True, max_new_tokens=4)
        assert answer.details.best_of_sequences is not None
        assert len(answer.details.best_of_sequences) == 1
    with score.point("generate: prompt tokens with decoder_input_details"):
        prefill = client.generate(PROMPT, decoder_input_details=True, max_new_tokens=1).details.prefill
        assert [token.id for token in prefill] == [5, 9, 20]
        assert prefill[0].logprob is None and prefill[1].logprob is not None
    with score.point("generate: top_n_tokens"):
        top = client.generate(PROMPT, top_n_tokens=3, max_new_tokens=2).details.top_tokens
        assert top is not None and all(len(each) == 3 for each in top)
    with score.point("generate: a regular expression"):
        grammar = Grammar(type=GrammarType.Regex, value=" ?w3[0-9]")
        text = client.generate(PROMPT, grammar=grammar, max_new_tokens=4).generated_text.strip()
        assert text[:2] == "w3" and len(text) == 3, text
    with score.point("generate_stream: the same tokens, then text and details"):
        whole = client.generate(PROMPT, max_new_tokens=6)
        events = list(client.generate_stream(PROMPT, max_new_tokens=6))
        assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
        assert events[-1].generated_text == whole.generated_text
        assert events[-1].details is not None
        assert events[-1].details.generated_tokens == len(events)
        assert all(event.generated_text is None for event in events[:-1])
    with score.refusal(
        "generate: too many tokens are refused as TGI does", ValidationError, "`max_new_tokens`"
    ):
        client.generate(PROMPT, max_new_tokens=4000)
    with score.refusal("generate_stream: refused in the same way", ValidationError, "`max_new_tokens`"):
        list(client.generate_stream(PROMPT, max_new_tokens=4000))
    messages = [{"role": "user", "content": PROMPT}]
    with score.point("chat: whole"):
        answer = client.chat(messages, max_tokens=5, seed=3)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("length", "stop", "eos_token")
    with score.point("chat: streamed"):
        chunks = list(client.chat(messages, max_tokens=5, seed=3, stream=True))
        assert chunks[-1].choices[0].finish_reason is not None
    asyncio.run(judge_async(score))
    score.end()


async def judge_async(score: Score) -> None:
    """The same through the async client."""
    client = AsyncClient(score.url, timeout=60)
    with score.point("async generate and generate_stream"):
        whole = await client.generate(PROMPT, max_new_tokens=5)
        events = [event async for event in client.generate_stream(PROMPT, max_new_tokens=5)]
        assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
    with score.point("async: eight at a time"):
        answers = await asyncio.gather(*(client.generate(PROMPT, max_new_tokens=5) for _ in range(8)))
        assert {answer.generated_text for answer in answers} == {whole.generated_text}


main()
