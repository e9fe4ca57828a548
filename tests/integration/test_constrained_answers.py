"""What an answer must look like: the best allowed token at every place, whoever writes it and however it is drafted."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from fusionroute.errors import InvalidRequest, Reason, SessionStateError
from fusionroute.fusion import CombineRule, Sampling, SeenTokens
from fusionroute.v1 import router_pb2
from fusionroute.v1.router_pb2 import Constraint, GenerateRequest, SamplingParameters
from router_service.turn_request import RULE_MESSAGES
from tests.equivalence import FLOAT_MARGIN
from tests.reference import Reference
from tests.served_stack import Answer, Family, Stack, make_family, served
from tests.tiny_models import WIDTH, character_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROMPT = "say: "
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["box", "rev"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["n", "kind", "tags"],
        "additionalProperties": False,
    }
)
TOKENIZER = character_tokenizer()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder: Path = tmp_path_factory.mktemp("family")
    return make_family(folder, tokenizer=character_tokenizer())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(family: Family) -> AsyncIterator[Stack]:
    async with served(family, top_logits=4, shared_memory_bytes=0) as stack:
        yield stack


def constrained(rule: str = "sum", max_tokens: int = 80, **language: str) -> GenerateRequest:
    return GenerateRequest(
        text=PROMPT,
        combine=RULE_MESSAGES[CombineRule(rule)],
        sampling=SamplingParameters(max_tokens=max_tokens, constraint=Constraint(**language)),
    )


def is_beginning(pattern: str, text: str) -> bool:
    """Whether a text could be the beginning of one that matches: tried with all that this pattern can go on with."""
    assert pattern == r"[a-c]{2,4}=?(10|7){2}"
    shape = re.compile(r"(?:[a-c]{0,4}|[a-c]{2,4}=?(?:1|10|7|101|1010|107|71|710|77))")
    return shape.fullmatch(text) is not None


def naive(reference: Reference, rule: str, pattern: str, max_tokens: int) -> tuple[list[int], float]:
    """The best token whose text can be part of such an answer, found by trying each; and the smallest lead it had."""
    tokens: list[int] = TOKENIZER(PROMPT)["input_ids"]
    start, lead = len(tokens), 1.0
    while len(tokens) - start < max_tokens:
        text = TOKENIZER.decode(tokens[start:])
        can_end = re.fullmatch(pattern, text) is not None
        allowed = [1] if can_end else []
        allowed += [
            each for each in range(2, WIDTH) if is_beginning(pattern, text + TOKENIZER.decode([each]))
        ]
        if allowed == [1]:
            break
        bias = {each: -100.0 for each in range(WIDTH) if each not in allowed}
        best = reference.next_token(tokens, rule, Sampling(logit_bias=bias), SeenTokens([]))
        assert best.id in allowed
        lead = min(lead, best.margin)
        tokens.append(best.id)
        if best.id == 1:
            break
    return tokens[start:], lead


@pytest.mark.parametrize("rule", ["sum", "gated_sum", "mixture", "select", "route"])
async def test_greedy_is_the_best_token_that_can_be_part_of_such_an_answer(
    stack: Stack, family: Family, rule: str
) -> None:
    pattern = r"[a-c]{2,4}=?(10|7){2}"
    wanted, lead = naive(family.reference(), rule, pattern, 20)
    assert lead > FLOAT_MARGIN, "choose another prompt: this one has ties"
    answer = await stack.answer(constrained(rule, regex=pattern))
    assert answer.ids == wanted
    assert answer.finished is not None
    assert answer.finished.reason == router_pb2.FINISH_REASON_EOS
    assert re.fullmatch(pattern, answer.text)


async def test_probabilities_are_those_among_all_tokens(stack: Stack) -> None:
    answer = await stack.answer(constrained(regex="[xyz]{5}"))
    scored = [
        token
        async for token in stack.client.score_prompt(
            router_pb2.ScorePromptRequest(token_ids={"ids": [*TOKENIZER(PROMPT)["input_ids"], *answer.ids]})
        )
    ]
    told = [token.logprob for token in answer.tokens]
    assert told == pytest.approx([token.logprob for token in scored[-len(told) :]], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_json_is_what_the_schema_describes(stack: Stack, temperature: float) -> None:
    texts = set()
    for seed in range(6 if temperature else 1):
        request = constrained(json_schema=SCHEMA)
        request.sampling.temperature, request.sampling.seed = temperature, seed
        request.sampling.frequency_penalty, request.sampling.top_k = temperature / 2, 5
        answer = await stack.answer(request)
        value = json.loads(answer.text)
        assert set(value) == {"n", "kind", "tags"} and 0 <= value["n"] <= 999
        assert value["kind"] in ("box", "rev") and all(isinstance(tag, bool) for tag in value["tags"])
        assert answer.finished is not None and answer.finished.reason == router_pb2.FINISH_REASON_EOS
        texts.add(answer.text)
    assert len(texts) > 2 or not temperature


async def test_a_grammar_and_any_json(stack: Stack) -> None:
    grammar = 'start: item ("," item){2}\nitem: "w" /[0-9]/'
    answer = await stack.answer(constrained(grammar=grammar))
    assert re.fullmatch(r"w\d,w\d,w\d", answer.text)
    request = constrained(json_schema="{}", max_tokens=200)
    request.sampling.temperature, request.sampling.seed = 1.0, 3
    assert (await stack.answer(request)).text[0] in '{["-0123456789tfn'


@pytest.mark.parametrize(
    "drafting", [router_pb2.DRAFTING_ROUTER, router_pb2.DRAFTING_EXPERT, router_pb2.DRAFTING_LOOKUP]
)
async def test_drafts_change_nothing(stack: Stack, drafting: Any) -> None:
    for seed in range(2):
        request = constrained(json_schema=SCHEMA)
        request.sampling.temperature, request.sampling.seed = 0.7 if seed else 0.0, seed
        request.exact, request.drafting = True, router_pb2.DRAFTING_OFF
        plain = await stack.answer(request)
        request.drafting = drafting
        drafted = await stack.answer(request)
        assert [(t.id, t.logprob) for t in drafted.tokens] == [(t.id, t.logprob) for t in plain.tokens]


async def test_an_answer_that_broke_off_goes_on_as_it_would_have(stack: Stack) -> None:
    request = constrained(json_schema=SCHEMA)
    request.session_id = "broken-off"
    whole = await stack.answer(request)
    store, keeper = stack.router.keeper.store, stack.router.keeper
    stored = await store.get("broken-off")
    assert stored.turn is not None
    for num_kept in (0, 1, len(whole.ids) // 2, len(whole.ids)):
        session_id = f"broken-off-{num_kept}"
        lease = await store.acquire(session_id, "gone")
        position = stored.turn.answer_position
        records = stored.records.tobytes()
        await store.begin_turn(lease, 0, records[: 16 * position], stored.turn.parameters)
        await store.append(lease, position, records[16 * position : 16 * (position + num_kept)])
        await store.release(lease)
        assert session_id not in keeper._live
        again: Answer = await stack.resume(session_id)
        assert (again.ids, again.text) == (whole.ids, whole.text)
        assert again.finished is not None and again.finished.reason == router_pb2.FINISH_REASON_EOS


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ({"regex": "[0-9"}, "constraint.regex = .*unclosed character class"),
        ({"regex": "%+"}, "the model's tokens lack what it begins with"),
        ({"json_schema": '{"type": "number'}, "constraint.json_schema = .*not valid JSON"),
        ({"json_schema": '{"type": "foo"}'}, "Invalid type: foo"),
        ({"json_schema": '{"$ref": "http://x/y"}'}, "constraint.json_schema"),
        ({"json_schema": "[1]"}, "a JSON Schema is an object"),
        ({"grammar": 'start: "a" b'}, 'constraint.grammar = .*unknown name: "b"'),
        ({"regex": ""}, "1 to 8192 characters"),
        ({"json_schema": "[" * 60_000}, "constraint.json_schema"),
    ],
)
async def test_what_cannot_be_is_refused_before_the_turn_begins(
    stack: Stack, language: dict[str, str], said: str
) -> None:
    with pytest.raises(InvalidRequest, match=said) as refused:
        await stack.answer(constrained(**language))
    assert len(refused.value.message) < 1200


async def test_a_dead_end_is_said(stack: Stack) -> None:
    with pytest.raises(SessionStateError, match="no token of the vocabulary can go on") as ended:
        await stack.answer(constrained(regex="a%"))
    assert ended.value.reason is Reason.CONSTRAINT_FAILED


async def test_ignoring_the_end_makes_no_sense_with_a_constraint(stack: Stack) -> None:
    request = constrained(regex="a+")
    request.sampling.ignore_eos = True
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        await stack.answer(request)
