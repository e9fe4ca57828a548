"""What an application asks for, checked and resolved once, before anything is written."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fusionroute.errors import InvalidRequest, Reason, SessionStateError, invalid
from fusionroute.fusion import CombineRule, ExpertChoice, OnExpertUnavailable, drawn_expert, drawn_experts
from fusionroute.sampling import Sampling
from fusionroute.v1 import router_pb2
from router_service.constraints import Constraint, Language
from router_service.drafting import DraftingMode
from router_service.request_limits import check_limits
from router_service.sampling_request import read_constraint, read_max_tokens, read_sampling, read_stops
from router_service.stored_session import TurnParameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    router_pb2.COMBINE_RULE_ENSEMBLE: CombineRule.ENSEMBLE,
    router_pb2.COMBINE_RULE_PROXY: CombineRule.PROXY,
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

_EXPERT_CHOICES: dict[int, ExpertChoice] = {
    router_pb2.EXPERT_CHOICE_UNSPECIFIED: ExpertChoice.ROUTED,
    router_pb2.EXPERT_CHOICE_ROUTED: ExpertChoice.ROUTED,
    router_pb2.EXPERT_CHOICE_RANDOM: ExpertChoice.RANDOM,
}
EXPERT_CHOICE_MESSAGES = {
    ExpertChoice.ROUTED: router_pb2.EXPERT_CHOICE_ROUTED,
    ExpertChoice.RANDOM: router_pb2.EXPERT_CHOICE_RANDOM,
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
        expert_choice: who says which expert takes part, where `fixed_expert` does not.
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
    expert_choice: ExpertChoice = ExpertChoice.ROUTED

    @property
    def is_usual(self) -> bool:
        """Whether the router says who takes part, or one expert is fixed, and nobody else is asked.

        What rounds of other turns cost and how well they are drafted says nothing about those of usual ones.
        """
        return self.expert_choice is ExpertChoice.ROUTED and not self.rule.asks_several

    def given_expert(self, position: int) -> int | None:
        """The expert of the token for a position of the session, where the router does not pick it."""
        if self.expert_choice is ExpertChoice.RANDOM:
            return drawn_expert(self.sampling.seed, position, len(self.slots))
        return self.fixed_expert

    def given_experts(self, position: int, num_tokens: int) -> list[int | None]:
        """`given_expert` of so many positions from one on."""
        if self.expert_choice is ExpertChoice.RANDOM:
            return [*drawn_experts(self.sampling.seed, position, num_tokens, len(self.slots))]
        return [self.fixed_expert] * num_tokens

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
            "expert_choice": self.expert_choice.value,
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
        expert_choice = ExpertChoice(rest.pop("expert_choice", ExpertChoice.ROUTED.value))
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
            expert_choice=expert_choice,
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
        needed = "a base model, which the router's settings do not name"
        if rule is not CombineRule.PROXY:
            needed = "a gate that the checkpoint lacks"
        raise SessionStateError(
            Reason.RULE_NOT_AVAILABLE,
            f"combine = {rule.value!r} needs {needed}; available: {available}",
            metadata={"field": "combine", "limit": available},
        )
    parameters = request.sampling
    expert_choice = _read_expert_choice(request, rule)
    return Turn(
        rule=rule,
        sampling=read_sampling(parameters, offer.logits_width),
        max_tokens=read_max_tokens(parameters),
        stops=read_stops(parameters),
        ignore_eos=parameters.ignore_eos,
        fixed_expert=_read_fixed_expert(request.fixed_expert, rule, offer.slots),
        checkpoint=offer.checkpoint,
        slots=offer.slots,
        on_expert_unavailable=_read_policy(request, rule, expert_choice, offer.default_policy),
        exact=request.exact,
        constraint=read_constraint(parameters),
        one_off=request.one_off,
        expert_choice=expert_choice,
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


def _read_policy(
    request: router_pb2.GenerateRequest,
    rule: CombineRule,
    expert_choice: ExpertChoice,
    default: OnExpertUnavailable,
) -> OnExpertUnavailable:
    """Where nobody could stand in for who is not there, turns wait by default."""
    number = request.on_expert_unavailable
    if number and number not in _POLICIES:
        raise invalid("on_expert_unavailable", number, "a value of OnExpertUnavailable")
    policy = _POLICIES.get(number, default)
    limit = ""
    if policy is OnExpertUnavailable.NEXT_BEST and request.fixed_expert:
        limit = "not together with fixed_expert: there is no next best of a fixed expert"
    elif policy is OnExpertUnavailable.NEXT_BEST and expert_choice is ExpertChoice.RANDOM:
        limit = "not together with expert_choice = random: there is no next best of a drawn expert"
    elif rule.asks_several and policy not in (OnExpertUnavailable.WAIT, OnExpertUnavailable.FAIL):
        limit = f"wait or fail where combine = {rule.value}, of whose models none can be replaced"
    if limit and number:
        raise invalid("on_expert_unavailable", policy.value, limit)
    return OnExpertUnavailable.WAIT if limit else policy


def _read_expert_choice(request: router_pb2.GenerateRequest, rule: CombineRule) -> ExpertChoice:
    if request.expert_choice not in _EXPERT_CHOICES:
        raise invalid("expert_choice", request.expert_choice, "a value of ExpertChoice")
    choice = _EXPERT_CHOICES[request.expert_choice]
    if choice is ExpertChoice.RANDOM and request.fixed_expert:
        raise invalid("expert_choice", choice.value, "not together with fixed_expert")
    if choice is ExpertChoice.RANDOM and rule in (CombineRule.ROUTER, CombineRule.ENSEMBLE):
        limit = f"not together with combine = {rule.value}, which asks no single expert"
        raise invalid("expert_choice", choice.value, limit)
    return choice


def _read_fixed_expert(slot: str, rule: CombineRule, slots: tuple[str, ...]) -> int | None:
    if not slot:
        return None
    if slot not in slots:
        raise InvalidRequest(
            Reason.UNKNOWN_SLOT,
            f"fixed_expert = {slot!r} is not a slot of the checkpoint; known: {', '.join(slots)}",
            metadata={"field": "fixed_expert", "limit": ", ".join(slots)},
        )
    if rule is CombineRule.ENSEMBLE:
        raise invalid("fixed_expert", slot, "not together with combine = ensemble, which asks all experts")
    return slots.index(slot)
