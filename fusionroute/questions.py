"""Questions to a router in plain Python: options by name instead of messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from fusionroute.errors import invalid
from fusionroute.v1.router_pb2 import (
    ChatMessage,
    CombineRule,
    Constraint,
    Drafting,
    ExpertChoice,
    GenerateRequest,
    OnExpertUnavailable,
    SamplingParameters,
    ScorePromptRequest,
    ScoringWay,
)

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or messages ``{"role": "user", "content": "..."}`` for the chat template."""

Rule = Literal["sum", "gated_sum", "mixture", "select", "route", "router", "ensemble", "proxy"]


class ScoringOptions(TypedDict, total=False):
    """What decides how tokens of a prompt are scored; what is left out is as the router has it.

    Attributes:
        combine: how scores are fused.
        expert: slot of the expert that is always used.
        expert_choice: "random" = a drawn expert at every token.
        seed: of an answer: the same one gives the same answer; of a prompt: of the draws.
        exact: the same bits however scores are computed; slower.
        num_candidates: the best candidates are shown beside each token, at most 20.
    """

    combine: Rule
    expert: str
    expert_choice: Literal["routed", "random"]
    seed: int
    exact: bool
    num_candidates: int


class Options(ScoringOptions, total=False):
    """What decides how an answer is written; what is left out is as the router has it.

    Attributes:
        max_tokens: new tokens at most.
        temperature: 0 = greedy.
        top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, ignore_eos: as in
            SamplingParameters of the contract.
        stop: the answer ends before the first of these.
        json_schema: the answer is JSON of this schema; ``{}`` = any JSON.
        regex, grammar: the answer matches; a Lark grammar as llguidance reads it.
        on_expert_unavailable: what becomes of tokens whose expert is not there.
        drafting: who proposes tokens; the text stays the same.
        routing_weights: are shown beside each token.
        session_id: of the session that the answer belongs to; it is begun if it is not known. Left out: the question
            stands for itself, and leaving its stream cancels it.
    """

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    ignore_eos: bool
    json_schema: str | Mapping[str, Any]
    regex: str
    grammar: str
    on_expert_unavailable: Literal["wait", "next_best", "router_only", "fail"]
    drafting: Literal["auto", "off", "router", "expert", "lookup"]
    routing_weights: bool
    session_id: str


_PLAIN_SAMPLING = frozenset(
    {
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "ignore_eos",
    }
)
_NAMES_OF_FIELDS = {
    "expert": "fixed_expert",
    "num_candidates": "num_top_candidates",
    "routing_weights": "return_routing_weights",
    "session_id": "session_id",
    "exact": "exact",
    "seed": "seed",
}
_ENUMS: dict[str, tuple[Any, str]] = {
    "combine": (CombineRule, "COMBINE_RULE_"),
    "expert_choice": (ExpertChoice, "EXPERT_CHOICE_"),
    "on_expert_unavailable": (OnExpertUnavailable, "ON_EXPERT_UNAVAILABLE_"),
    "drafting": (Drafting, "DRAFTING_"),
}


def generate_request(prompt: Prompt, options: Options) -> GenerateRequest:
    """The request for an answer. Raises InvalidRequest: an option that is unknown or cannot be that."""
    rest: dict[str, Any] = dict(options)
    sampling = SamplingParameters()
    for name in _PLAIN_SAMPLING & rest.keys():
        _set(sampling, name, name, rest.pop(name))
    for token_id, bias in rest.pop("logit_bias", {}).items():
        try:
            sampling.logit_bias[token_id] = bias
        except (TypeError, ValueError):
            raise invalid("logit_bias", {token_id: bias}, "token ids with numbers") from None
    stop = rest.pop("stop", ())
    sampling.stop.extend([stop] if isinstance(stop, str) else stop)
    if (constraint := _constraint(rest)) is not None:
        sampling.constraint.CopyFrom(constraint)
    request = GenerateRequest(sampling=sampling, one_off=not rest.get("session_id"))
    _set_all(request, rest)
    _set_prompt(request, prompt)
    return request


def score_request(
    prompt: Prompt, options: ScoringOptions, from_position: int, ways: Sequence[ScoringOptions] = ()
) -> ScorePromptRequest:
    """The request for a prompt's scores, in some further ways too. Raises InvalidRequest as `generate_request`."""
    request = ScorePromptRequest()
    for way in ways:
        _set_all(request.ways.add(), dict(way))
    _set(request, "from_position", "from_position", from_position)
    _set_all(request, dict(options))
    _set_prompt(request, prompt)
    return request


def _set_all(request: GenerateRequest | ScorePromptRequest | ScoringWay, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option in _ENUMS:
            _set(request, option, option, _number(option, value))
        elif (field := _NAMES_OF_FIELDS.get(option)) and field in request.DESCRIPTOR.fields_by_name:
            _set(request, field, option, value)
        else:
            raise invalid(option, value, "there is no such option")


def _set(message: Any, field: str, option: str, value: object) -> None:
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise invalid(option, value, str(error)) from None


def _number(option: str, value: object) -> int:
    enum, prefix = _ENUMS[option]
    names = [name.removeprefix(prefix).lower() for name, number in enum.items() if number]
    if value not in names:
        raise invalid(option, value, ", ".join(names))
    number: int = enum.Value(f"{prefix}{str(value).upper()}")
    return number


def _constraint(rest: dict[str, Any]) -> Constraint | None:
    """Of the options, which lose it. Raises InvalidRequest: there are several."""
    given = {name: rest.pop(name) for name in ("json_schema", "regex", "grammar") if name in rest}
    if len(given) > 1:
        raise invalid("constraint", ", ".join(given), "one of json_schema, regex, grammar")
    for name, value in given.items():
        text = value if isinstance(value, str) else json.dumps(value)
        constraint = Constraint()
        _set(constraint, name, name, text)
        return constraint
    return None


def _set_prompt(request: GenerateRequest | ScorePromptRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    if not prompt:
        raise invalid("prompt", prompt, "a text, token ids, or messages, and not empty")
    try:
        if isinstance(prompt[0], Mapping):
            request.messages.messages.extend(ChatMessage(**message) for message in prompt)  # type: ignore[arg-type]
        else:
            request.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        limit = f"a text, token ids, or messages with role and content: {error}"
        raise invalid("prompt", prompt, limit) from None
