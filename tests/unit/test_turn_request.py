"""Requests become turns, and turns survive being stored."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.fusion import CombineRule, ExpertChoice, OnExpertUnavailable, drawn_expert
from fusionroute.sampling import Sampling
from fusionroute.v1.router_pb2 import ChatMessage, ChatMessages, GenerateRequest
from router_service.stored_session import TurnParameters
from router_service.turn_request import LONG_TEXT_CHARACTERS, Offer, Turn, read_prompt, read_turn
from tests.tiny_models import WIDTH, word_tokenizer

OFFER = Offer(
    ("math", "code"), (CombineRule.SUM, CombineRule.ROUTE), CombineRule.SUM, WIDTH, 96, "checkpoint"
)

TURNS = st.builds(
    Turn,
    rule=st.sampled_from(CombineRule),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 1000),
        logit_bias=st.dictionaries(st.integers(0, WIDTH - 1), st.floats(-100, 100)),
        seed=st.integers(0, 2**64 - 1),
    ),
    max_tokens=st.integers(1, 10_000),
    stops=st.lists(st.text(min_size=1, max_size=9)).map(tuple),
    ignore_eos=st.booleans(),
    fixed_expert=st.none() | st.integers(0, 7),
    checkpoint=st.just("checkpoint"),
    slots=st.lists(st.text(min_size=1, max_size=9)).map(tuple),
    on_expert_unavailable=st.sampled_from(OnExpertUnavailable),
    expert_choice=st.sampled_from(ExpertChoice),
)


@given(TURNS)
def test_a_turn_comes_back_from_the_store_as_it_was(turn: Turn) -> None:
    stored = turn.to_stored()
    through_json = json.loads(json.dumps(dict(stored.sampling)))
    again = TurnParameters(stored.seed, stored.combine, stored.checkpoint, through_json)
    assert Turn.from_stored(again) == turn


def test_an_empty_request_is_greedy_by_the_checkpoints_rule() -> None:
    turn = read_turn(GenerateRequest(text="w5"), OFFER)
    assert (turn.rule, turn.max_tokens, turn.stops, turn.fixed_expert) == (CombineRule.SUM, 256, (), None)
    assert (turn.sampling.temperature, turn.sampling.top_p) == (0.0, 1.0)


def test_a_turn_stored_before_there_was_a_choice_waits() -> None:
    stored = read_turn(GenerateRequest(text="w5"), OFFER).to_stored()
    old = {name: value for name, value in stored.sampling.items() if name != "on_expert_unavailable"}
    turn = Turn.from_stored(TurnParameters(stored.seed, stored.combine, stored.checkpoint, old))
    assert turn.on_expert_unavailable is OnExpertUnavailable.WAIT


def test_what_to_do_without_an_expert_is_the_requests_choice_else_the_routers() -> None:
    offer = replace(OFFER, default_policy=OnExpertUnavailable.NEXT_BEST)
    assert read_turn(GenerateRequest(text="w5"), offer).on_expert_unavailable is OnExpertUnavailable.NEXT_BEST
    asked = read_turn(GenerateRequest(text="w5", on_expert_unavailable="ON_EXPERT_UNAVAILABLE_FAIL"), offer)
    assert asked.on_expert_unavailable is OnExpertUnavailable.FAIL


def test_there_is_no_next_best_of_a_fixed_expert() -> None:
    request = GenerateRequest(
        text="w5", fixed_expert="math", on_expert_unavailable="ON_EXPERT_UNAVAILABLE_NEXT_BEST"
    )
    with pytest.raises(FusionRouteError, match=r"next_best.*fixed_expert") as caught:
        read_turn(request, OFFER)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == "on_expert_unavailable"
    offer = replace(OFFER, default_policy=OnExpertUnavailable.NEXT_BEST)
    by_default = read_turn(GenerateRequest(text="w5", fixed_expert="math"), offer)
    assert by_default.on_expert_unavailable is OnExpertUnavailable.WAIT


@pytest.mark.parametrize("field", ["on_expert_unavailable", "expert_choice", "combine"])
def test_an_unknown_choice_is_refused(field: str) -> None:
    request = GenerateRequest(text="w5")
    setattr(request, field, 77)
    with pytest.raises(FusionRouteError, match=f"{field} = 77"):
        read_turn(request, OFFER)


ALL_RULES = replace(OFFER, rules=tuple(CombineRule))
RANDOM = "EXPERT_CHOICE_RANDOM"


def test_an_expert_is_given_where_one_is_fixed_or_drawn() -> None:
    routed = read_turn(GenerateRequest(text="w5"), OFFER)
    fixed = read_turn(GenerateRequest(text="w5", fixed_expert="code"), OFFER)
    drawn = read_turn(GenerateRequest(text="w5", expert_choice=RANDOM, sampling={"seed": 9}), OFFER)
    assert [turn.given_expert(40) for turn in (routed, fixed)] == [None, 1]
    assert [drawn.given_expert(p) for p in range(40)] == [drawn_expert(9, p, 2) for p in range(40)]
    assert [turn.is_usual for turn in (routed, fixed, drawn)] == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "field", "limit"),
    [
        ({"expert_choice": RANDOM, "fixed_expert": "math"}, "expert_choice", "fixed_expert"),
        ({"expert_choice": RANDOM, "combine": "COMBINE_RULE_ENSEMBLE"}, "expert_choice", "ensemble"),
        ({"expert_choice": RANDOM, "combine": "COMBINE_RULE_ROUTER"}, "expert_choice", "router"),
        ({"expert_choice": RANDOM, "on_expert_unavailable": 2}, "on_expert_unavailable", "next best"),
        ({"fixed_expert": "math", "combine": "COMBINE_RULE_ENSEMBLE"}, "fixed_expert", "ensemble"),
        (
            {"combine": "COMBINE_RULE_ENSEMBLE", "on_expert_unavailable": 2},
            "on_expert_unavailable",
            "wait or fail",
        ),
        (
            {"combine": "COMBINE_RULE_PROXY", "on_expert_unavailable": 3},
            "on_expert_unavailable",
            "wait or fail",
        ),
    ],
)
def test_what_cannot_be_together_is_refused_by_name(fields: dict[str, Any], field: str, limit: str) -> None:
    with pytest.raises(FusionRouteError, match=limit) as caught:
        read_turn(GenerateRequest(text="w5", **fields), ALL_RULES)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize("rule", ["COMBINE_RULE_ENSEMBLE", "COMBINE_RULE_PROXY"])
def test_a_default_that_a_rule_cannot_have_becomes_waiting(rule: str) -> None:
    offer = replace(ALL_RULES, default_policy=OnExpertUnavailable.ROUTER_ONLY)
    turn = read_turn(GenerateRequest(text="w5", combine=rule), offer)
    assert turn.on_expert_unavailable is OnExpertUnavailable.WAIT
    failing = replace(ALL_RULES, default_policy=OnExpertUnavailable.FAIL)
    turn = read_turn(GenerateRequest(text="w5", combine=rule), failing)
    assert turn.on_expert_unavailable is OnExpertUnavailable.FAIL


def test_proxy_tuning_without_a_base_model_says_what_it_lacks() -> None:
    with pytest.raises(
        FusionRouteError, match=r"'proxy' needs a base model.*available: sum, route"
    ) as caught:
        read_turn(GenerateRequest(text="w5", combine="COMBINE_RULE_PROXY"), OFFER)
    assert caught.value.reason is Reason.RULE_NOT_AVAILABLE


def test_a_turn_stored_before_experts_were_drawn_is_routed() -> None:
    stored = read_turn(GenerateRequest(text="w5"), OFFER).to_stored()
    old = {name: value for name, value in stored.sampling.items() if name != "expert_choice"}
    turn = Turn.from_stored(TurnParameters(stored.seed, stored.combine, stored.checkpoint, old))
    assert turn.expert_choice is ExpertChoice.ROUTED


def messages(*pairs: tuple[str, str]) -> GenerateRequest:
    told = [ChatMessage(role=role, content=content) for role, content in pairs]
    return GenerateRequest(messages=ChatMessages(messages=told))


async def test_chat_messages_are_rendered_by_the_template_with_the_answers_prefix() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w2 ' if m.role == 'user' else 'w3 ' }}{{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}w4{% endif %}"
    )
    request = messages(("user", "w10 w11"), ("assistant", "w12"), ("user", "w13"))
    assert await read_prompt(request, tokenizer, OFFER, first_turn=True) == [2, 10, 11, 3, 12, 2, 13, 4]


async def test_templates_that_refuse_are_named() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only one user message') }}"
    with pytest.raises(FusionRouteError, match="only one user message") as caught:
        await read_prompt(messages(("user", "x")), tokenizer, OFFER, first_turn=True)
    assert caught.value.reason is Reason.INVALID_FIELD


def test_unknown_roles_are_named() -> None:
    with pytest.raises(FusionRouteError, match=r"messages.role = 'boss'") as caught:
        read_turn(messages(("boss", "x")), OFFER)
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_a_long_text_is_encoded_like_a_short_one() -> None:
    text = "w5 w6 " * LONG_TEXT_CHARACTERS
    ids = await read_prompt(GenerateRequest(text=text), word_tokenizer(), OFFER, first_turn=True)
    assert ids == [5, 6] * LONG_TEXT_CHARACTERS
