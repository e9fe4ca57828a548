"""What an application asks for, checked and resolved once, before anything is written."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fusionroute.errors import InvalidRequest, Reason, SessionStateError, invalid
from fusionroute.fusion import CombineRule, OnExpertUnavailable, Sampling
from fusionroute.v1 import router_pb2
from router_service.constraints import Constraint, Language
from router_service.drafting import DraftingMode
from router_service.request_limits import check_limits
from router_service.stored_session import TurnParameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_TOP_CANDIDATES = 20
LONG_TEXT_CHARACTERS = 4096
"""Texts longer than this are encoded off the event loop."""

_RULES: dict[int, CombineRule] = {
    router_pb2.COMBINE_RULE_SUM: CombineRule.SUM,
    router_pb2.COMBINE_RULE_GATED_SUM: CombineRule.GATED_SUM,
    router_pb2.COMBINE_RULE_MIXTURE: CombineRule.MIXTURE,
    router_pb2.COMBINE_RULE_SELECT: CombineRule.SELECT,
    router_pb2.COMBINE_RULE_ROUTE: CombineRule.ROUTE,
    router_pb2.COMBINE_RULE_ROUTER: CombineRule.ROUTER,
}
RULE_MESSAGES = {rule: router_pb2.CombineRule.ValueType(number) for number, rule in _RULES.items()}

_POLICIES: dict[int, OnExpertUnavailable] = {
    router_pb2.ON_EXPERT_UNAVAILABLE_WAIT: OnExpertUnavailable.WAIT,
    router_pb2.ON_EXPERT_UNAVAILABLE_NEXT_BEST: OnExpertUnavailable.NEXT_BEST,
    router_pb2.ON_EXPERT_UNAVAILABLE_ROUTER_ONLY: OnExpertUnavailable.ROUTER_ONLY,
    router_pb2.ON_EXPERT_UNAVAILABLE_FAIL: OnExpertUnavailable.FAIL,
}
POLICY_MESSAGES = {
    policy: router_pb2.OnExpertUnavailable.ValueType(number) for number, policy in _POLICIES.items()
}


_DRAFTING: dict[int, DraftingMode] = {
    router_pb2.DRAFTING_AUTO: DraftingMode.AUTO,
    router_pb2.DRAFTING_OFF: DraftingMode.OFF,
    router_pb2.DRAFTING_ROUTER: DraftingMode.ROUTER,
    router_pb2.DRAFTING_EXPERT: DraftingMode.EXPERT,
    router_pb2.DRAFTING_LOOKUP: DraftingMode.LOOKUP,
}
DRAFTER_MESSAGES = {
    mode.drafter: router_pb2.Drafting.ValueType(number)
    for number, mode in _DRAFTING.items()
    if mode.drafter is not None
}


@dataclass(frozen=True, slots=True)
class Turn:
    """How one answer is written. All that the next token depends on besides the tokens is in here.

    Attributes:
        rule: how scores are fused.
        sampling: how the token is chosen.
        max_tokens: new tokens at most.
        stops: the answer ends before the first of these.
        ignore_eos: whether the end-of-sequence token is just a token.
        fixed_expert: index of the expert to use always; None = the routed one.
        checkpoint: fingerprint of the router checkpoint.
        slots: the experts' slots in that checkpoint's order, so that the answer's tokens keep their experts' names.
        on_expert_unavailable: what becomes of tokens whose expert is not there.
        exact: scores are the same bits however they are computed.
        constraint: what the answer must look like; None = anything.
        one_off: no further turn follows in its session.
    """

    rule: CombineRule
    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]
    ignore_eos: bool
    fixed_expert: int | None
    checkpoint: str
    slots: tuple[str, ...]
    on_expert_unavailable: OnExpertUnavailable = OnExpertUnavailable.WAIT
    exact: bool = False
    constraint: Constraint | None = None
    one_off: bool = False

    def to_stored(self) -> TurnParameters:
        """As it stands in the store, so that another writer can go on with it."""
        rest: dict[str, Any] = asdict(self.sampling)
        del rest["seed"]
        rest["logit_bias"] = {str(token): bias for token, bias in self.sampling.logit_bias.items()}
        rest |= {
            "max_tokens": self.max_tokens,
            "stops": list(self.stops),
            "ignore_eos": self.ignore_eos,
            "fixed_expert": self.fixed_expert,
            "slots": list(self.slots),
            "on_expert_unavailable": self.on_expert_unavailable.value,
            "exact": self.exact,
            "constraint": None
            if self.constraint is None
            else {"language": self.constraint.language.value, "text": self.constraint.text},
            "one_off": self.one_off,
        }
        return TurnParameters(self.sampling.seed, self.rule.value, self.checkpoint, rest)

    @classmethod
    def from_stored(cls, stored: TurnParameters) -> Turn:
        """What `to_stored` has written."""
        rest = dict(stored.sampling)
        own = {name: rest.pop(name) for name in ("max_tokens", "ignore_eos", "fixed_expert")}
        stops, slots = tuple(rest.pop("stops")), tuple(rest.pop("slots"))
        policy = OnExpertUnavailable(rest.pop("on_expert_unavailable", OnExpertUnavailable.WAIT.value))
        exact, one_off = rest.pop("exact", False), rest.pop("one_off", False)
        constraint = rest.pop("constraint", None)
        if constraint is not None:
            constraint = Constraint(Language(constraint["language"]), constraint["text"])
        rest["logit_bias"] = {int(token): bias for token, bias in rest["logit_bias"].items()}
        sampling = Sampling(seed=stored.seed, **rest)
        return cls(
            rule=CombineRule(stored.combine),
            sampling=sampling,
            stops=stops,
            slots=slots,
            checkpoint=stored.checkpoint,
            on_expert_unavailable=policy,
            exact=exact,
            constraint=constraint,
            one_off=one_off,
            **own,
        )


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request wants besides the text, which does not depend on it.

    Attributes:
        routing_weights, num_top_candidates: what token events show besides the token.
        drafting: who may propose tokens.
    """

    routing_weights: bool = False
    num_top_candidates: int = 0
    drafting: DraftingMode = DraftingMode.AUTO


@dataclass(frozen=True, slots=True)
class Offer:
    """What this router can do, for checking requests.

    Attributes:
        slots: the experts' slots in the checkpoint's order.
        rules: the combine rules that the checkpoint can serve.
        default_rule: used when a request names none.
        logits_width: ids are below this.
        max_context_tokens: longest session.
        checkpoint: fingerprint of the checkpoint.
        default_policy: what is done while an expert is not there, when a request does not say.
        default_drafting: who may propose tokens, when a request does not say.
    """

    slots: tuple[str, ...]
    rules: tuple[CombineRule, ...]
    default_rule: CombineRule
    logits_width: int
    max_context_tokens: int
    checkpoint: str
    default_policy: OnExpertUnavailable = OnExpertUnavailable.WAIT
    default_drafting: DraftingMode = DraftingMode.AUTO


def read_turn(request: router_pb2.GenerateRequest, offer: Offer) -> Turn:
    """The turn that a request asks for.

    Raises:
        InvalidRequest: naming field, value and limit; UNKNOWN_SLOT for an unknown expert.
        SessionStateError: RULE_NOT_AVAILABLE.
    """
    check_limits(request, offer.max_context_tokens)
    rule = _RULES.get(request.combine, offer.default_rule) if request.combine else offer.default_rule
    if request.combine and request.combine not in _RULES:
        raise invalid("combine", request.combine, "a value of CombineRule")
    if rule not in offer.rules:
        available = ", ".join(each.value for each in offer.rules)
        raise SessionStateError(
            Reason.RULE_NOT_AVAILABLE,
            f"combine = {rule.value!r} needs a gate that the checkpoint lacks; available: {available}",
            metadata={"field": "combine", "limit": available},
        )
    parameters = request.sampling
    return Turn(
        rule=rule,
        sampling=_read_sampling(parameters, offer.logits_width),
        max_tokens=_read_max_tokens(parameters),
        stops=_read_stops(parameters),
        ignore_eos=parameters.ignore_eos,
        fixed_expert=_read_fixed_expert(request.fixed_expert, offer.slots),
        checkpoint=offer.checkpoint,
        slots=offer.slots,
        on_expert_unavailable=_read_policy(request, offer.default_policy),
        exact=request.exact,
        constraint=_read_constraint(parameters),
        one_off=request.one_off,
    )


def read_wishes(request: router_pb2.GenerateRequest, offer: Offer) -> Wishes:
    """What a request wants besides the text. Raises InvalidRequest."""
    if request.num_top_candidates > MAX_TOP_CANDIDATES:
        raise invalid("num_top_candidates", request.num_top_candidates, f"0 to {MAX_TOP_CANDIDATES}")
    if request.drafting and request.drafting not in _DRAFTING:
        raise invalid("drafting", request.drafting, "a value of Drafting")
    drafting = _DRAFTING.get(request.drafting, offer.default_drafting)
    return Wishes(request.return_routing_weights, request.num_top_candidates, drafting)


async def read_prompt(
    request: router_pb2.GenerateRequest, tokenizer: PreTrainedTokenizerBase, offer: Offer, *, first_turn: bool
) -> list[int]:
    """The token ids of a request's prompt.

    Raises:
        InvalidRequest: EMPTY_PROMPT, TOKEN_OUT_OF_RANGE, or INVALID_FIELD when the messages cannot be rendered.
    """
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        ids = list(request.token_ids.ids)
        if ids and max(ids) >= offer.logits_width:
            raise InvalidRequest(
                Reason.TOKEN_OUT_OF_RANGE,
                f"token_ids contains {max(ids)}; ids go from 0 to {offer.logits_width - 1}",
                metadata={"field": "token_ids", "limit": str(offer.logits_width - 1)},
            )
    elif kind == "messages":
        ids = await asyncio.to_thread(_render_messages, request.messages, tokenizer)
    elif len(request.text) > LONG_TEXT_CHARACTERS:
        ids = await asyncio.to_thread(_encode, tokenizer, request.text, first_turn)
    else:
        ids = _encode(tokenizer, request.text, first_turn)
    if not ids:
        raise InvalidRequest(
            Reason.EMPTY_PROMPT,
            "the prompt has no tokens: give text, token_ids or messages that are not empty",
            metadata={"field": "prompt"},
        )
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, first_turn: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=first_turn, verbose=False)["input_ids"]
    return ids


def _render_messages(messages: router_pb2.ChatMessages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        raise invalid(
            "messages", "chat messages", "the checkpoint's tokenizer has no chat template; send text instead"
        )
    conversation = [{"role": message.role, "content": message.content} for message in messages.messages]
    try:
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        raise invalid("messages", "chat messages", f"the chat template refuses them: {error}") from error
    return _encode(tokenizer, str(text), False)


def _read_sampling(parameters: router_pb2.SamplingParameters, logits_width: int) -> Sampling:
    seed = parameters.seed if parameters.HasField("seed") else secrets.randbits(64)
    return Sampling(
        temperature=_within("temperature", parameters.temperature, 0.0, 100.0),
        top_k=parameters.top_k,
        top_p=_within(
            "top_p", parameters.top_p if parameters.HasField("top_p") else 1.0, 0.0, 1.0, above=True
        ),
        min_p=_within("min_p", parameters.min_p, 0.0, 1.0),
        repetition_penalty=_within(
            "repetition_penalty",
            parameters.repetition_penalty if parameters.HasField("repetition_penalty") else 1.0,
            0.0,
            100.0,
            above=True,
        ),
        presence_penalty=_within("presence_penalty", parameters.presence_penalty, -2.0, 2.0),
        frequency_penalty=_within("frequency_penalty", parameters.frequency_penalty, -2.0, 2.0),
        logit_bias=_read_logit_bias(parameters.logit_bias, logits_width),
        seed=seed,
    )


def _within(field: str, value: float, low: float, high: float, *, above: bool = False) -> float:
    fits = math.isfinite(value) and low <= value <= high and not (above and value == low)
    if not fits:
        raise invalid(field, value, f"in {'(' if above else '['}{low:g}, {high:g}]")
    return float(value)


def _read_logit_bias(biases: Mapping[int, float], logits_width: int) -> dict[int, float]:
    if len(biases) > MAX_LOGIT_BIASES:
        raise invalid("logit_bias", f"{len(biases)} entries", f"at most {MAX_LOGIT_BIASES}")
    for token, bias in biases.items():
        if token >= logits_width:
            raise invalid("logit_bias", token, f"ids go from 0 to {logits_width - 1}")
        _within(f"logit_bias[{token}]", bias, -100.0, 100.0)
    return dict(sorted(biases.items()))


def _read_max_tokens(parameters: router_pb2.SamplingParameters) -> int:
    if not parameters.HasField("max_tokens"):
        return DEFAULT_MAX_TOKENS
    if parameters.max_tokens < 1:
        raise invalid("max_tokens", parameters.max_tokens, "1 or more")
    return parameters.max_tokens


def _read_stops(parameters: router_pb2.SamplingParameters) -> tuple[str, ...]:
    if len(parameters.stop) > MAX_STOPS:
        raise invalid("stop", f"{len(parameters.stop)} strings", f"at most {MAX_STOPS}")
    for stop in parameters.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise invalid("stop", stop[:40], f"1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(parameters.stop)


def _read_constraint(parameters: router_pb2.SamplingParameters) -> Constraint | None:
    language = parameters.constraint.WhichOneof("language")
    if language is None:
        return None
    if parameters.ignore_eos:
        limit = "not together with a constraint, which says where the answer ends"
        raise invalid("ignore_eos", True, limit)
    return Constraint(Language(language), getattr(parameters.constraint, language))


def _read_policy(request: router_pb2.GenerateRequest, default: OnExpertUnavailable) -> OnExpertUnavailable:
    """A request that always wants one expert can have no other: it waits where others get the next best."""
    number = request.on_expert_unavailable
    if number and number not in _POLICIES:
        raise invalid("on_expert_unavailable", number, "a value of OnExpertUnavailable")
    policy = _POLICIES.get(number, default)
    if policy is OnExpertUnavailable.NEXT_BEST and request.fixed_expert:
        if number:
            limit = "not together with fixed_expert: there is no next best of a fixed expert"
            raise invalid("on_expert_unavailable", policy.value, limit)
        return OnExpertUnavailable.WAIT
    return policy


def _read_fixed_expert(slot: str, slots: tuple[str, ...]) -> int | None:
    if not slot:
        return None
    if slot not in slots:
        raise InvalidRequest(
            Reason.UNKNOWN_SLOT,
            f"fixed_expert = {slot!r} is not a slot of the checkpoint; known: {', '.join(slots)}",
            metadata={"field": "fixed_expert", "limit": ", ".join(slots)},
        )
    return slots.index(slot)
