"""OpenAI's API: the tokens of gRPC, streams that say what the whole says, batches, echoes, the tokenizer."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters, ScorePromptRequest
from tests.http_calls import CHAT_TEMPLATE, Api, Chunk, openai_stack
from tests.served_stack import SLOTS, Stack
from tests.tiny_models import MAX_CONTEXT

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "w5 w9 w20"
MESSAGES = [{"role": "user", "content": "w5 w9"}]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.25}
SAMPLING = {"ignore_eos": True, "max_tokens": 12}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    async with openai_stack(tmp_path_factory.mktemp("family")) as stack:
        yield stack


def ids_of(choice: dict[str, Any]) -> list[int]:
    return [token["id"] for token in choice["fusionroute"]["tokens"]]


async def grpc_ids(stack: Stack, **fields: Any) -> list[int]:
    sampling = SamplingParameters(**(SAMPLING | fields.pop("sampling", {})))
    return (await stack.answer(GenerateRequest(sampling=sampling, **fields))).ids


# --- the same tokens ---------------------------------------------------------------------------------------------


async def test_baselines_are_asked_for_in_the_extension(stack: Stack, api: Api) -> None:
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"combine": "ensemble"}, {"combine": router_pb2.COMBINE_RULE_ENSEMBLE}),
        ({"expert_choice": "random"}, {"expert_choice": router_pb2.EXPERT_CHOICE_RANDOM}),
    ]
    for extension, fields in ways:
        wanted = await grpc_ids(stack, text=PROMPT, sampling=SAMPLED, **fields)
        answer = await api.whole(
            TEXT, prompt=PROMPT, **SAMPLED, **SAMPLING, fusionroute={"details": True, **extension}
        )
        assert ids_of(answer["choices"][0]) == wanted
    told = answer["choices"][0]["fusionroute"]["tokens"]
    assert len({token["expert"] for token in told}) > 1
    prompt = [5, 9, 20, *(token["id"] for token in told)]
    drawn = {"expert_choice": "random"}
    echo = await api.whole(
        TEXT, prompt=prompt, echo=True, logprobs=1, max_tokens=0, seed=SAMPLED["seed"], fusionroute=drawn
    )
    scored = echo["choices"][0]["logprobs"]["token_logprobs"][3:]
    assert scored == pytest.approx([token["logprob"] for token in told], abs=1e-4)


@pytest.mark.parametrize(
    ("extension", "param"),
    [
        ({"combine": "proxy"}, "fusionroute.combine"),
        ({"expert_choice": "random", "expert": "math"}, "fusionroute.expert_choice"),
        ({"combine": "ensemble", "expert": "math"}, "fusionroute.expert"),
    ],
)
async def test_baselines_that_cannot_be_had_are_refused_by_the_extensions_names(
    api: Api, extension: dict[str, str], param: str
) -> None:
    response = await api.post(TEXT, {"model": "fusionroute", "prompt": PROMPT, "fusionroute": extension})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_tokens_are_those_of_grpc_for_the_same_seed(stack: Stack, api: Api) -> None:
    wanted = await grpc_ids(stack, text=PROMPT, sampling=SAMPLED)
    answer = await api.whole(TEXT, prompt=PROMPT, **SAMPLED, **SAMPLING, fusionroute={"details": True})
    assert ids_of(answer["choices"][0]) == wanted
    greedy = await grpc_ids(stack, text=PROMPT)
    answer = await api.whole(TEXT, prompt=PROMPT, temperature=0, **SAMPLING, fusionroute={"details": True})
    assert ids_of(answer["choices"][0]) == greedy != wanted
    by_default = await grpc_ids(stack, text=PROMPT, sampling={"temperature": 1.0, "seed": 2**64 - 1})
    answer = await api.whole(TEXT, prompt=PROMPT, seed=-1, **SAMPLING, fusionroute={"details": True})
    assert ids_of(answer["choices"][0]) == by_default


async def test_every_name_of_a_model_is_a_rule(stack: Stack, api: Api) -> None:
    names = [model["id"] for model in (await api.http.get("/v1/models")).json()["data"]]
    assert names == ["fusionroute", *(f"fusionroute/{slot}" for slot in SLOTS), "fusionroute/router"]
    fixed = [{"fixed_expert": slot, "combine": router_pb2.COMBINE_RULE_ROUTE} for slot in SLOTS]
    meant = [{}, *fixed, {"combine": router_pb2.COMBINE_RULE_ROUTER}]
    for name, request in zip(names, meant, strict=True):
        wanted = await grpc_ids(stack, text=PROMPT, **request)
        common = {"prompt": PROMPT, "temperature": 0, **SAMPLING, "fusionroute": {"details": True}}
        assert ids_of((await api.whole(TEXT, model=name, **common))["choices"][0]) == wanted
        assert (await api.http.get(f"/v1/models/{name}")).json()["id"] == name
    assert (await api.http.get("/v1/models/gpt")).json()["error"]["code"] == "model_not_found"


async def test_a_conversation_is_what_the_chat_template_makes_of_it(stack: Stack, api: Api) -> None:
    said = [{"role": "developer", "content": "w7"}, *MESSAGES]
    common = {"temperature": 0, **SAMPLING, "fusionroute": {"details": True}}
    answer = await api.whole(CHAT, messages=said, **common)
    assert ids_of(answer["choices"][0]) == await grpc_ids(stack, token_ids={"ids": [2, 7, 2, 5, 9, 4]})
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    parts = [{"type": "text", "text": "w5"}, {"type": "text", "text": " w9"}]
    again = await api.whole(CHAT, messages=[said[0], {"role": "user", "content": parts}], **common)
    assert again["choices"][0]["message"] == answer["choices"][0]["message"]
    unfinished = [*MESSAGES, {"role": "assistant", "content": "w8"}]
    more = await api.whole(CHAT, messages=unfinished, continue_final_message=True, **common)
    assert ids_of(more["choices"][0]) == await grpc_ids(stack, token_ids={"ids": [2, 5, 9, 3, 8]})


# --- streams -----------------------------------------------------------------------------------------------------


def texts_by_choice(chunks: list[Chunk], part: str) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for chunk in chunks:
        for choice in chunk.data["choices"]:
            told = choice["delta"].get("content", "") if part == "delta" else choice["text"]
            texts[choice["index"]] += told
    return dict(texts)


async def test_a_stream_of_text_says_what_the_whole_says(api: Api) -> None:
    common = {"prompt": [PROMPT, "w8"], "n": 2, "logprobs": 2, "echo": True, **SAMPLED, **SAMPLING}
    whole = await api.whole(TEXT, **common)
    chunks = await api.streamed(TEXT, **common, stream_options={"include_usage": True})
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert texts_by_choice(chunks, "text") == {each["index"]: each["text"] for each in whole["choices"]}
    for choice in whole["choices"]:
        told: dict[str, list[Any]] = defaultdict(list)
        for chunk in chunks:
            for each in chunk.data["choices"]:
                if each["index"] == choice["index"]:
                    for name, values in (each["logprobs"] or {}).items():
                        told[name] += values
        for name in ("tokens", "text_offset"):
            assert told[name] == choice["logprobs"][name]
        assert told["token_logprobs"][1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4)
    *pieces, last = chunks
    assert (last.data["choices"], last.data["usage"]) == ([], whole["usage"])
    assert all(chunk.data["usage"] is None for chunk in pieces)
    assert len({chunk.data["id"] for chunk in chunks}) == 1


async def test_a_stream_of_a_message_says_what_the_whole_says(api: Api) -> None:
    common = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **SAMPLED, **SAMPLING}
    (choice,) = (await api.whole(CHAT, **common))["choices"]
    chunks = await api.streamed(CHAT, **common)
    assert chunks[0].choice["delta"] == {"role": "assistant", "content": ""}
    assert texts_by_choice(chunks, "delta") == {0: choice["message"]["content"]}
    told = [each for chunk in chunks for each in (chunk.choice["logprobs"] or {}).get("content", [])]
    assert [each["token"] for each in told] == [each["token"] for each in choice["logprobs"]["content"]]
    reasons = [chunk.choice["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].choice["delta"] == {}
    assert all("usage" not in chunk.data for chunk in chunks)


async def test_the_first_token_comes_before_the_last(stack: Stack, api: Api) -> None:
    body = {"model": "fusionroute", "prompt": PROMPT, "stream": True, "ignore_eos": True, "max_tokens": 90}
    async with api.http.stream("POST", TEXT, json=body) as response:
        async for _ in response.aiter_raw():
            assert stack.router.keeper.num_running == 1
            break


async def test_a_stop_string_ends_the_text_before_it(api: Api) -> None:
    common = {"prompt": PROMPT, "temperature": 0, **SAMPLING}
    text = (await api.whole(TEXT, **common))["choices"][0]["text"]
    stop = text.split()[3]
    (choice,) = (await api.whole(TEXT, **common, stop=stop))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    chunks = await api.streamed(TEXT, **common, stop=["w1w", stop], logprobs=0)
    assert texts_by_choice(chunks, "text") == {0: choice["text"]}


# --- several answers, echoes, probabilities ----------------------------------------------------------------------


async def test_answer_number_i_has_seed_plus_i(stack: Stack, api: Api) -> None:
    prompts = [[5, 9, 20], [8]]
    answer = await api.whole(TEXT, prompt=prompts, n=3, seed=7, **SAMPLING, fusionroute={"details": True})
    wanted = [
        await grpc_ids(stack, token_ids={"ids": ids}, sampling={"temperature": 1, "seed": 7 + number})
        for ids in prompts
        for number in range(3)
    ]
    assert [ids_of(choice) for choice in answer["choices"]] == wanted
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 72, "total_tokens": 76}


async def test_more_answers_than_there_is_room_for_are_written_one_after_the_other(api: Api) -> None:
    answer = await api.whole(TEXT, prompt=["w5", "w9"], n=8, max_tokens=3)
    assert len(answer["choices"]) == 16
    assert all(choice["finish_reason"] for choice in answer["choices"])


async def test_an_echo_with_probabilities_scores_the_prompt(stack: Stack, api: Api) -> None:
    prompts = ["w5 w9 w20 w6", "w7 w8"]
    answer = await api.whole(TEXT, prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    for text, choice in zip(prompts, answer["choices"], strict=True):
        scored = []
        async for response in stack.client.score_prompt(ScorePromptRequest(text=text)):
            scored.append(response.logprob)
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:-1] == pytest.approx(scored[1:], abs=1e-4)
        assert choice["text"].startswith(text)
        assert "".join(told["tokens"]) == choice["text"]
        offsets = [len("".join(told["tokens"][:number])) for number in range(len(told["tokens"]))]
        assert told["text_offset"] == offsets
        best = told["top_logprobs"][-1]
        assert told["token_logprobs"][-1] == max(best.values()) == best[told["tokens"][-1]]


async def test_an_echo_alone_writes_nothing(api: Api) -> None:
    for extra in ({"logprobs": 1}, {}):
        answer = await api.whole(TEXT, prompt=["w5 w9", "w7"], n=2, echo=True, max_tokens=0, **extra)
        assert [choice["text"] for choice in answer["choices"]] == ["w5 w9"] * 2 + ["w7"] * 2
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
        chunks = await api.streamed(TEXT, prompt="w5 w9", echo=True, max_tokens=0, **extra)
        assert texts_by_choice(chunks, "text") == {0: "w5 w9"}
        assert chunks[-1].choice["finish_reason"] == "length"


async def test_probabilities_come_with_bytes_and_best_tokens(api: Api) -> None:
    answer = await api.whole(
        CHAT, messages=MESSAGES, temperature=0, logprobs=True, top_logprobs=3, **SAMPLING
    )
    (choice,) = answer["choices"]
    told = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in told) == choice["message"]["content"]
    for each in told:
        assert bytes(each["bytes"]).decode() == each["token"]
        assert len(each["top_logprobs"]) == 3
        first, second, third = (best["logprob"] for best in each["top_logprobs"])
        assert each["logprob"] == first >= second >= third


async def test_a_bias_given_by_ids_as_strings_decides(api: Api) -> None:
    answer = await api.whole(TEXT, prompt=PROMPT, temperature=0, max_tokens=3, logit_bias={"33": 100})
    assert answer["choices"][0]["text"].split() == ["w33"] * 3


# --- our extension -----------------------------------------------------------------------------------------------


async def test_details_tell_what_grpc_tells(stack: Stack, api: Api) -> None:
    request = GenerateRequest(
        text=PROMPT,
        sampling=SamplingParameters(**SAMPLING),
        combine=router_pb2.COMBINE_RULE_MIXTURE,
        return_routing_weights=True,
        num_top_candidates=2,
    )
    wanted = await stack.answer(request)
    extension = {"combine": "mixture", "details": True, "num_candidates": 2}
    common = {"prompt": PROMPT, "temperature": 0, **SAMPLING, "fusionroute": extension}
    told = (await api.whole(TEXT, **common))["choices"][0]["fusionroute"]
    for token, each in zip(wanted.tokens, told["tokens"], strict=True):
        assert (each["id"], each["text"], each["expert"] or "") == (token.id, token.text, token.expert)
        assert list(each["weights"]) == [*SLOTS, "router"]
        assert list(each["weights"].values()) == pytest.approx(list(token.routing_weights), abs=1e-4)
        for ours, theirs in (("fused", "fused"), ("expert", "expert"), ("complement", "router")):
            best = [candidate.id for candidate in getattr(token.top, theirs)]
            assert [candidate["id"] for candidate in each["top"][ours]] == best
    assert (told["combine"], told["checkpoint"]) == ("mixture", wanted.started.checkpoint)
    assert told["statistics"]["num_expert_calls"] > 0
    chunks = await api.streamed(TEXT, **common)
    streamed = [each for chunk in chunks for each in chunk.choice["fusionroute"]["tokens"]]
    assert [each["id"] for each in streamed] == wanted.ids
    assert set(chunks[-1].choice["fusionroute"]) == set(told)


async def test_a_named_session_is_continued(stack: Stack, api: Api) -> None:
    common = {"temperature": 0, **SAMPLING, "fusionroute": {"session_id": "talk", "details": True}}
    first = await api.whole(TEXT, prompt=PROMPT, **common)
    second = await api.whole(TEXT, prompt="w7", **common)
    whole = [5, 9, 20, *ids_of(first["choices"][0]), 7]
    assert ids_of(second["choices"][0]) == await grpc_ids(stack, token_ids={"ids": whole})
    assert second["usage"]["prompt_tokens"] == len(whole)


# --- clients that leave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_answers(stack: Stack, api: Api, stream: bool) -> None:
    await stack.stop_expert("math")  # so that the answer cannot end by itself
    body = {"model": "fusionroute/math", "prompt": PROMPT, "n": 2, "stream": stream}
    task = asyncio.create_task(api.post(TEXT, body))
    async with asyncio.timeout(10):
        while stack.router.keeper.num_running < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        while stack.router.keeper.num_running:
            await asyncio.sleep(0.01)
    exposed = (await api.http.get("/metrics")).text
    assert 'http_seconds_count{route="/v1/completions",status="499"}' in exposed
    await stack.start_expert("math")


async def test_a_stream_that_broke_goes_on_behind_the_last_event(stack: Stack, api: Api) -> None:
    common = {"prompt": PROMPT, "logprobs": 0, **SAMPLED, **SAMPLING, "fusionroute": {"session_id": "kept"}}
    chunks = await api.streamed(TEXT, **common)
    for number in (0, 4, len(chunks) - 2):
        rest = await api.streamed(TEXT, {"last-event-id": chunks[number].event_id}, **common)
        assert [each.data["choices"] for each in rest] == [
            each.data["choices"] for each in chunks[number + 1 :]
        ]
        assert rest[0].data["id"] == chunks[0].data["id"]
    stored = await stack.client.get_session("kept")
    assert len(stored.token_ids) == 3 + 12, "no further turn was begun"


async def test_a_message_that_broke_goes_on_behind_the_last_event(api: Api) -> None:
    common = {"messages": MESSAGES, **SAMPLED, **SAMPLING, "fusionroute": {"session_id": "kept-chat"}}
    chunks = await api.streamed(CHAT, **common)
    rest = await api.streamed(CHAT, {"last-event-id": chunks[5].event_id}, **common)
    assert [each.data["choices"] for each in rest] == [each.data["choices"] for each in chunks[6:]]


# --- the tokenizer -----------------------------------------------------------------------------------------------


async def test_the_tokenizer_can_be_asked(api: Api) -> None:
    told = (await api.post("/tokenize", {"prompt": "w5 w9", "return_token_strs": True})).json()
    assert told == {"count": 2, "max_model_len": MAX_CONTEXT, "tokens": [5, 9], "token_strs": ["w5", "w9"]}
    said = (await api.post("/tokenize", {"messages": MESSAGES})).json()
    assert said["tokens"] == [2, 5, 9, 4]
    assert (await api.post("/detokenize", {"tokens": [5, 9]})).json() == {"prompt": "w5 w9"}
    info = (await api.http.get("/tokenizer_info")).json()
    assert (info["eos_token"], info["chat_template"]) == ("<eos>", CHAT_TEMPLATE)
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": [61]})):
        assert (await api.post(path, body)).status_code == 400
