"""TGI's API: the same tokens as over gRPC, the stream in the words of the whole, errors as its clients read them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters
from tests.served_stack import Stack
from tests.tiny_models import MAX_CONTEXT

pytestmark = pytest.mark.asyncio(loop_scope="package")
PROMPT = "w5 w9 w20"


@pytest_asyncio.fixture(loop_scope="package")
async def tgi(http_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=http_url, timeout=30) as client:
        yield client


async def whole(tgi: httpx2.AsyncClient, inputs: str = PROMPT, **parameters: Any) -> dict[str, Any]:
    response = await tgi.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def streamed(tgi: httpx2.AsyncClient, inputs: str = PROMPT, **parameters: Any) -> list[dict[str, Any]]:
    response = await tgi.post("/generate_stream", json={"inputs": inputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data:")) for line in response.text.splitlines() if line]


def assert_same_tokens(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """But for the last digits of their probabilities."""
    assert [each | {"logprob": None} for each in got] == [each | {"logprob": None} for each in wanted]
    assert [each["logprob"] for each in got] == pytest.approx([each["logprob"] for each in wanted], abs=1e-4)


async def test_tokens_are_those_of_grpc_greedy_unless_sampling_is_asked_for(
    stack: Stack, tgi: httpx2.AsyncClient
) -> None:
    for parameters, sampling in (
        ({}, SamplingParameters()),
        ({"temperature": 1.0, "seed": 3}, SamplingParameters()),
        ({"do_sample": True, "seed": 3}, SamplingParameters(temperature=1, seed=3)),
        ({"temperature": 0.5, "seed": 3}, SamplingParameters(temperature=0.5, seed=3)),
        ({"top_k": 5, "seed": 3}, SamplingParameters(temperature=1, top_k=5, seed=3)),
        (
            {"top_p": 0.5, "seed": 3, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
            SamplingParameters(
                temperature=1, top_p=0.5, seed=3, repetition_penalty=1.5, frequency_penalty=0.5
            ),
        ),
    ):
        sampling.max_tokens = 12
        wanted = await stack.answer(GenerateRequest(text=PROMPT, sampling=sampling))
        got = await whole(tgi, max_new_tokens=12, details=True, **parameters)
        details = got["details"]
        assert [token["id"] for token in details["tokens"]] == wanted.ids
        assert [token["logprob"] for token in details["tokens"]] == pytest.approx(
            [token.logprob for token in wanted.tokens], abs=1e-4
        )
        assert got["generated_text"] == wanted.text
        assert details["seed"] == (3 if sampling.temperature else None)


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 20},
        {"max_new_tokens": 5},
        {"max_new_tokens": 20, "do_sample": True, "seed": 11, "top_n_tokens": 3},
        {"max_new_tokens": 30, "do_sample": True, "seed": 5, "stop": ["w1", "4 w"]},
        {"max_new_tokens": 6, "return_full_text": True, "truncate": 2},
    ],
)
async def test_the_stream_says_what_the_whole_says(tgi: httpx2.AsyncClient, parameters: dict) -> None:
    answer = await whole(tgi, details=True, **parameters)
    events = await streamed(tgi, details=True, **parameters)
    details = answer["details"]
    assert_same_tokens([event["token"] for event in events], details["tokens"])
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["generated_text"] == answer["generated_text"]
    assert events[-1]["details"] == {
        "finish_reason": details["finish_reason"],
        "generated_tokens": details["generated_tokens"],
        "seed": details["seed"],
        "input_length": 2 if "truncate" in parameters else 3,
    }
    if "top_n_tokens" in parameters:
        for event, top in zip(events, details["top_tokens"], strict=True):
            assert_same_tokens(event["top_tokens"], top)
        assert all(len(top) == 3 for top in details["top_tokens"])
    spoken = "".join(token["text"] for token in details["tokens"] if not token["special"])
    assert answer["generated_text"] == (PROMPT if "return_full_text" in parameters else "") + spoken


async def test_an_answer_ends_with_its_stop_string_and_not_behind_it(tgi: httpx2.AsyncClient) -> None:
    plain = (await whole(tgi, max_new_tokens=12, do_sample=True, seed=1))["generated_text"]
    stop = plain[4:7]
    answer = await whole(tgi, max_new_tokens=12, do_sample=True, seed=1, stop=[stop], details=True)
    assert answer["generated_text"] == plain[: plain.index(stop) + len(stop)]
    assert answer["details"]["finish_reason"] == "stop_sequence"


async def test_the_end_of_sequence_is_a_special_token_without_text_in_the_answer(
    stack: Stack, tgi: httpx2.AsyncClient
) -> None:
    for seed in range(20):
        answer = await whole(tgi, do_sample=True, seed=seed, details=True)
        if answer["details"]["finish_reason"] == "eos_token":
            break
    last = answer["details"]["tokens"][-1]
    assert (last["id"], last["text"], last["special"]) == (1, "<eos>", True)
    assert "<eos>" not in answer["generated_text"]


async def test_the_best_of_several_comes_first(tgi: httpx2.AsyncClient) -> None:
    answer = await whole(tgi, best_of=3, do_sample=True, max_new_tokens=4, details=True)
    others = answer["details"]["best_of_sequences"]
    assert len(others) == 2

    def mean(details: dict[str, Any]) -> float:
        return sum(token["logprob"] for token in details["tokens"]) / len(details["tokens"])

    assert mean(answer["details"]) >= max(map(mean, others))
    assert len({each["seed"] for each in [answer["details"], *others]}) == 3


async def test_the_prompts_tokens_come_with_their_probabilities_on_request(
    stack: Stack, tgi: httpx2.AsyncClient
) -> None:
    answer = await whole(tgi, decoder_input_details=True, max_new_tokens=1)
    scored = await stack.client.score(PROMPT)
    prefill = answer["details"]["prefill"]
    assert [token["id"] for token in prefill] == [5, 9, 20]
    assert prefill[0]["logprob"] is None
    assert [token["logprob"] for token in prefill[1:]] == pytest.approx(
        [t.logprob for t in scored[1:]], abs=1e-4
    )


async def test_the_root_answers_with_a_list_or_a_stream(tgi: httpx2.AsyncClient) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}}
    for path in ("/", "/invocations"):
        listed = await tgi.post(path, json=body)
        assert listed.json() == [await whole(tgi, max_new_tokens=3)]
        assert listed.headers["x-generated-tokens"] == str(3)
        stream = await tgi.post(path, json=body | {"stream": True})
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.text.count("data:") == 3


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ("", {}, "`inputs` cannot be empty"),
        (PROMPT, {"temperature": 0}, "`temperature` must be strictly positive"),
        (PROMPT, {"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        (PROMPT, {"top_k": 0}, "`top_k` must be strictly positive"),
        (PROMPT, {"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        (PROMPT, {"max_new_tokens": 94}, "must be <= 96. Given: 3 `inputs` tokens and 94"),
        (PROMPT, {"truncate": 96}, "`truncate` must be strictly positive and less than 96"),
        ("w2 " * MAX_CONTEXT, {}, "`inputs` must have less than 96 tokens. Given: 96"),
        ("w2 " * 10000, {}, "must have at most"),
        (PROMPT, {"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        (PROMPT, {"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set"),
        (PROMPT, {"best_of": 9, "do_sample": True}, "`best_of` must be <= 4. Given: 9"),
        (PROMPT, {"typical_p": 0.9}, "`typical_p` is not supported"),
        (PROMPT, {"watermark": True}, "`watermark`"),
        (PROMPT, {"adapter_id": "lora"}, "there are no adapters"),
        (PROMPT, {"top_n_tokens": 21}, "`top_n_tokens` must be >= 0 and <= 20. Given: 21"),
        (PROMPT, {"seed": -1}, "parameters.seed"),
        (PROMPT, {"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
    ],
)
async def test_what_tgi_refuses_is_refused_before_the_first_byte(
    tgi: httpx2.AsyncClient, inputs: str, parameters: dict, message: str
) -> None:
    for path in ("/generate", "/generate_stream"):
        response = await tgi.post(path, json={"inputs": inputs, "parameters": parameters})
        body = response.json()
        if path.endswith("stream") and "best_of" in parameters:
            message = "`best_of` != 1 is not supported when streaming"
        assert (response.status_code, body["error_type"]) == (422, "validation")
        assert body["error"].startswith("Input validation error: ")
        assert message in body["error"]


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"inputs": 3}', b'{"parameters": {}}', b'{"inputs":"\\ud800"}']
)
async def test_a_body_that_is_no_request_is_refused(tgi: httpx2.AsyncClient, body: bytes) -> None:
    response = await tgi.post("/generate", content=body)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")


async def test_what_a_client_leaves_out_may_also_be_null(tgi: httpx2.AsyncClient) -> None:
    names = ["seed", "stop", "do_sample", "details", "grammar", "best_of", "top_p", "watermark", "truncate"]
    nothing = await whole(tgi, max_new_tokens=3, **dict.fromkeys(names))
    assert nothing == await whole(tgi, max_new_tokens=3)


async def test_a_client_that_leaves_ends_its_answer(stack: Stack, tgi: httpx2.AsyncClient) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 90, "do_sample": True, "seed": 8}}
    for path in ("/generate", "/generate_stream"):
        task = asyncio.create_task(tgi.post(path, json=body))
        async with asyncio.timeout(10):
            while not stack.router.keeper._live:
                await asyncio.sleep(0.001)
            (live,) = stack.router.keeper._live.values()
            task.cancel()
            while not live.is_over:
                await asyncio.sleep(0.005)
        assert live.cancelled


async def test_a_grammar_is_a_constraint_of_the_turn(tgi: httpx2.AsyncClient) -> None:
    for grammar in ({"type": "regex", "value": " ?w3[0-9]"}, {"type": "regex", "value": " ?(w2|w7)"}):
        answer = await whole(tgi, max_new_tokens=8, grammar=grammar, details=True)
        assert answer["generated_text"].strip() in {f"w3{n}" for n in range(10)} | {"w2", "w7"}
        events = await streamed(tgi, max_new_tokens=8, grammar=grammar, details=True)
        assert_same_tokens([event["token"] for event in events], answer["details"]["tokens"])


async def test_info_names_the_checkpoint_and_the_limits(stack: Stack, tgi: httpx2.AsyncClient) -> None:
    info = (await tgi.get("/info")).json()
    assert info["model_id"] == "fusionroute"
    assert info["model_sha"] == (await stack.client.info()).checkpoint
    assert (info["max_total_tokens"], info["max_input_length"]) == (MAX_CONTEXT, MAX_CONTEXT - 1)
    assert (info["model_dtype"], info["model_device_type"]) == ("torch.float32", "cpu")
