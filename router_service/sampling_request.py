"""The sampling parameters of a request, checked: how the token is chosen, and where the answer ends."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping

from fusionroute.errors import invalid
from fusionroute.sampling import Sampling
from fusionroute.v1 import router_pb2
from router_service.constraints import Constraint, Language

DEFAULT_MAX_TOKENS = 256
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024


def read_sampling(parameters: router_pb2.SamplingParameters, logits_width: int) -> Sampling:
    """How a token is chosen; a seed that is not given is drawn. Raises InvalidRequest, as all here."""
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


def read_max_tokens(parameters: router_pb2.SamplingParameters) -> int:
    """New tokens at most."""
    if not parameters.HasField("max_tokens"):
        return DEFAULT_MAX_TOKENS
    if parameters.max_tokens < 1:
        raise invalid("max_tokens", parameters.max_tokens, "1 or more")
    return parameters.max_tokens


def read_stops(parameters: router_pb2.SamplingParameters) -> tuple[str, ...]:
    """What the answer ends before."""
    if len(parameters.stop) > MAX_STOPS:
        raise invalid("stop", f"{len(parameters.stop)} strings", f"at most {MAX_STOPS}")
    for stop in parameters.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise invalid("stop", stop[:40], f"1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(parameters.stop)


def read_constraint(parameters: router_pb2.SamplingParameters) -> Constraint | None:
    """What the answer must look like; None = anything."""
    language = parameters.constraint.WhichOneof("language")
    if language is None:
        return None
    if parameters.ignore_eos:
        limit = "not together with a constraint, which says where the answer ends"
        raise invalid("ignore_eos", True, limit)
    return Constraint(Language(language), getattr(parameters.constraint, language))
