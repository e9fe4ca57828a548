"""From a request to OpenAI's API to the turns that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from fusionroute.errors import InvalidRequest, Reason, invalid
from fusionroute.v1 import router_pb2
from router_service.http.openai_requests import MAX_CHOICES, CombineName, Extension, Sampled, Stop, one_of
from router_service.http.service import RouterApi

ROUTER_MODEL = "router"
NAMES_OF_ANY = frozenset({"tgi", "dummy"})
"""What clients of TGI send who know a URL and no model: text-generation and huggingface_hub."""
SMALLEST_TOP_P = 1e-6
"""What a `top_p` of 0 means: the best token alone."""
DEFAULT_TEMPERATURE = 1.0

_COMBINE = {
    name: router_pb2.CombineRule.Value(f"COMBINE_RULE_{name.upper()}") for name in get_args(CombineName)
}


def model_names(api: RouterApi) -> list[str]:
    """The model, each of its experts alone, and its router alone."""
    own = api.served_name
    return [own, *(f"{own}/{slot}" for slot in api.offer.slots), f"{own}/{ROUTER_MODEL}"]


def set_model(request: router_pb2.GenerateRequest, name: str, api: RouterApi) -> None:
    """Makes a request ask for the model of a name. Raises InvalidRequest: there is none."""
    if name in NAMES_OF_ANY:
        return
    if name not in model_names(api):
        raise model_unknown(name, api)
    part = name.removeprefix(api.served_name).removeprefix("/")
    if part == ROUTER_MODEL:
        request.combine = router_pb2.COMBINE_RULE_ROUTER
    elif part:
        request.fixed_expert, request.combine = part, router_pb2.COMBINE_RULE_ROUTE


def model_unknown(name: str, api: RouterApi) -> InvalidRequest:
    """The error about a model that is not served."""
    known = ", ".join(model_names(api))
    return InvalidRequest(
        Reason.MODEL_NOT_FOUND,
        f"model = {name[:200]!r} is not served here; known: {known}",
        metadata={"field": "model", "limit": known},
    )


def turn_request(body: Sampled, api: RouterApi, max_tokens: int, num_top: int) -> router_pb2.GenerateRequest:
    """What all turns of a request have in common: everything but prompt and seed.

    Args:
        body: the request.
        api: the router.
        max_tokens: new tokens at most.
        num_top: best tokens that log-probabilities need.

    Raises:
        InvalidRequest: naming field and limit.
    """
    extension = body.fusionroute or Extension()
    request = router_pb2.GenerateRequest(
        exact=extension.exact,
        return_routing_weights=extension.details,
        num_top_candidates=max(num_top, (extension.num_candidates or 0) if extension.details else 0),
        session_id=extension.session_id or "",
        one_off=not extension.session_id,
    )
    set_model(request, body.model, api)
    if extension.combine is not None:
        request.combine = _COMBINE[extension.combine]
    if extension.expert is not None:
        request.fixed_expert = extension.expert
    if extension.expert_choice is not None:
        request.expert_choice = router_pb2.ExpertChoice.Value(
            f"EXPERT_CHOICE_{extension.expert_choice.upper()}"
        )
    if extension.drafting is not None:
        request.drafting = router_pb2.Drafting.Value(f"DRAFTING_{extension.drafting.upper()}")
    if (policy := extension.on_expert_unavailable) is not None:
        request.on_expert_unavailable = router_pb2.OnExpertUnavailable.Value(
            f"ON_EXPERT_UNAVAILABLE_{policy.upper()}"
        )
    request.sampling.CopyFrom(_sampling(body, extension, max_tokens))
    return request


def _sampling(body: Sampled, extension: Extension, max_tokens: int) -> router_pb2.SamplingParameters:
    top_k = one_of(extension.top_k, body.top_k, 0)
    return router_pb2.SamplingParameters(
        max_tokens=max_tokens,
        temperature=one_of(body.temperature, DEFAULT_TEMPERATURE),
        top_k=max(0, top_k),
        top_p=max(SMALLEST_TOP_P, one_of(body.top_p, 1.0)),
        min_p=one_of(extension.min_p, body.min_p, 0.0),
        repetition_penalty=one_of(extension.repetition_penalty, body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}),
        stop=_stops(body.stop),
        ignore_eos=one_of(extension.ignore_eos, body.ignore_eos, False),
    )


def _stops(stop: Stop | None) -> list[str]:
    if stop is None:
        return []
    return [stop] if isinstance(stop, str) else stop


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    read: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < 2**32):
            raise invalid("logit_bias", key, "token ids as decimal numbers are the keys")
        if not -100 <= bias <= 100:
            raise invalid(f"logit_bias[{key}]", bias, "in [-100, 100]")
        read[int(key)] = bias
    return read


def seeds(first: int | None, count: int) -> list[int | None]:
    """Of several answers: one after the other from the given one on; None = drawn by each."""
    return [None if first is None else (first + number) % 2**64 for number in range(count)]


def numbered(
    prompted: Sequence[router_pb2.GenerateRequest], count: int, seed: int | None
) -> list[router_pb2.GenerateRequest]:
    """The turns of a request: `count` for each prompt, those of the first prompt first.

    Raises:
        InvalidRequest: too many, or several in one session.
    """
    if len(prompted) * count > MAX_CHOICES:
        raise invalid("n", count, f"with {len(prompted)} prompts at most {MAX_CHOICES // len(prompted)}")
    if len(prompted) * count > 1 and prompted[0].session_id:
        raise invalid(
            "fusionroute.session_id", prompted[0].session_id, "one prompt and n = 1: a session has one text"
        )
    requests = []
    for request in prompted:
        for each in seeds(seed, count):
            copy = router_pb2.GenerateRequest()
            copy.CopyFrom(request)
            if each is not None:
                copy.sampling.seed = each
            requests.append(copy)
    return requests
