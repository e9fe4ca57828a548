"""Requests of the TGI API: their JSON, what TGI allows in them, and the turn that they ask for."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fusionroute.errors import InvalidRequest, Reason, invalid
from fusionroute.v1 import router_pb2
from router_service.request_limits import CHARACTERS_PER_TOKEN
from router_service.sampling_request import MAX_STOPS
from router_service.serving import Serving
from router_service.turn_request import LONG_TEXT_CHARACTERS, MAX_TOP_CANDIDATES

DEFAULT_MAX_NEW_TOKENS = 100
MAX_BEST_OF = 4

_WIDEST_COUNT = 2**32 - 1
Count = Annotated[int, Field(ge=0, le=_WIDEST_COUNT)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class Grammar(_Body):
    """What the answer must look like."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: str | dict[str, Any]

    def constraint(self) -> router_pb2.Constraint:
        """As the contract has it. Raises InvalidRequest."""
        if self.type == "regex":
            if not isinstance(self.value, str):
                raise invalid("grammar.value", self.value, "a regular expression as a string")
            return router_pb2.Constraint(regex=self.value)
        schema: Any = self.value
        if isinstance(schema, dict) and self.type == "json_schema" and "schema" in schema:
            schema = schema["schema"]
        text = schema if isinstance(schema, str) else json.dumps(schema)
        return router_pb2.Constraint(json_schema=text)


class Parameters(_Body):
    """`parameters` of a request; null is as good as left out."""

    adapter_id: str | None = None
    best_of: Count | None = None
    decoder_input_details: bool = False
    details: bool = False
    do_sample: bool = False
    frequency_penalty: float | None = None
    grammar: Grammar | None = None
    max_new_tokens: Count | None = None
    repetition_penalty: float | None = None
    return_full_text: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    stop: list[str] = []
    temperature: float | None = None
    top_k: Annotated[int, Field(le=_WIDEST_COUNT)] | None = None
    top_n_tokens: Count | None = None
    top_p: float | None = None
    truncate: Count | None = None
    typical_p: float | None = None
    watermark: bool = False

    @field_validator(
        "decoder_input_details", "details", "do_sample", "return_full_text", "watermark", mode="before"
    )
    @classmethod
    def _null_is_false(cls, value: object) -> object:
        return False if value is None else value

    @field_validator("stop", mode="before")
    @classmethod
    def _null_is_nothing(cls, value: object) -> object:
        return [] if value is None else value

    @property
    def is_sampling(self) -> bool:
        """Whether tokens are drawn: asked for, or implied by a filter, as in TGI. Temperature 1 implies nothing."""
        has_filter = self.top_k is not None or self.top_p is not None
        return self.do_sample or has_filter or self.temperature not in (None, 1.0)


class TgiRequest(_Body):
    """A request of `/`, `/generate` or `/generate_stream`."""

    inputs: str
    parameters: Parameters = Parameters()
    stream: bool = False

    @field_validator("parameters", mode="before")
    @classmethod
    def _null_is_default(cls, value: object) -> object:
        return {} if value is None else value

    @classmethod
    def parse(cls, body: bytes) -> TgiRequest:
        """Raises InvalidRequest, naming the first field that does not fit."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "body"
            raise InvalidRequest(
                Reason.INVALID_FIELD, f"{field}: {first['msg']}", metadata={"field": field}
            ) from None
        return request


def check(request: TgiRequest, *, streams: bool) -> None:
    """What TGI does not allow, and what is not to be had here. Raises InvalidRequest in TGI's words."""
    wanted = request.parameters
    _check_ranges(wanted)
    num_best = 1 if wanted.best_of is None else wanted.best_of
    for is_wrong, message in (
        (streams and num_best != 1, "`best_of` != 1 is not supported when streaming tokens"),
        (num_best == 0, "`best_of` must be strictly positive"),
        (num_best > MAX_BEST_OF, f"`best_of` must be <= {MAX_BEST_OF}. Given: {num_best}"),
        (
            num_best > 1 and not (wanted.is_sampling or wanted.temperature),
            "you must use sampling when `best_of` is > 1",
        ),
        (num_best > 1 and wanted.seed is not None, "`seed` must not be set when `best_of` > 1"),
        (
            streams and wanted.decoder_input_details,
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
        (wanted.typical_p is not None, "`typical_p` is not supported: leave it out"),
        (wanted.watermark, "`watermark` = true is not supported"),
        (
            wanted.adapter_id is not None,
            f"`adapter_id` = {str(wanted.adapter_id)[:40]!r}: there are no adapters",
        ),
        (not request.inputs, "`inputs` cannot be empty"),
    ):
        if is_wrong:
            raise _refusal(message)


def _check_ranges(wanted: Parameters) -> None:
    num_stops, top_n = len(wanted.stop), wanted.top_n_tokens or 0
    for is_wrong, message in (
        (
            wanted.temperature is not None and wanted.temperature <= 0,
            "`temperature` must be strictly positive",
        ),
        (
            wanted.repetition_penalty is not None and wanted.repetition_penalty <= 0,
            "`repetition_penalty` must be strictly positive",
        ),
        (not -2 <= (wanted.frequency_penalty or 0.0) <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        (wanted.top_p is not None and not 0 < wanted.top_p < 1, "`top_p` must be > 0.0 and < 1.0"),
        (wanted.top_k is not None and wanted.top_k <= 0, "`top_k` must be strictly positive"),
        (wanted.max_new_tokens == 0, "`max_new_tokens` must be strictly positive"),
        (num_stops > MAX_STOPS, f"`stop` supports up to {MAX_STOPS} stop sequences. Given: {num_stops}"),
        (
            top_n > MAX_TOP_CANDIDATES,
            f"`top_n_tokens` must be >= 0 and <= {MAX_TOP_CANDIDATES}. Given: {top_n}",
        ),
    ):
        if is_wrong:
            raise _refusal(message)


async def turn_of(request: TgiRequest, serving: Serving) -> router_pb2.GenerateRequest:
    """The turn that a checked request asks for, its prompt encoded.

    Raises:
        InvalidRequest: the prompt is too long, alone or with `max_new_tokens`.
    """
    wanted, longest = request.parameters, serving.offer.max_context_tokens
    ids = await encode(request.inputs, serving)
    if wanted.truncate is not None:
        if not 1 <= wanted.truncate < longest:
            raise _refusal(
                f"`truncate` must be strictly positive and less than {longest}. Given: {wanted.truncate}"
            )
        ids = ids[-wanted.truncate :]
    room = longest - len(ids)
    if room < 1:
        raise _refusal(f"`inputs` must have less than {longest} tokens. Given: {len(ids)}")
    if wanted.max_new_tokens is not None and wanted.max_new_tokens > room:
        raise _refusal(
            f"`inputs` tokens + `max_new_tokens` must be <= {longest}. Given: {len(ids)} `inputs` tokens and "
            f"{wanted.max_new_tokens} `max_new_tokens`"
        )
    most = min(DEFAULT_MAX_NEW_TOKENS, room) if wanted.max_new_tokens is None else wanted.max_new_tokens
    turn = router_pb2.GenerateRequest(sampling=sampling_of(wanted, most), one_off=True)
    turn.token_ids.ids.extend(ids)
    # Where experts may send their highest logits only, tokens would have no probability unless candidates are wanted.
    has_rows = not serving.ensemble.top_logits
    turn.num_top_candidates = wanted.top_n_tokens or (0 if has_rows else 1)
    return turn


def sampling_of(wanted: Parameters, max_tokens: int) -> router_pb2.SamplingParameters:
    """TGI's parameters in the contract's names: greedy unless sampling is asked for."""
    sampling = router_pb2.SamplingParameters(
        max_tokens=max_tokens,
        repetition_penalty=wanted.repetition_penalty,
        frequency_penalty=wanted.frequency_penalty or 0.0,
        stop=wanted.stop,
        seed=wanted.seed,
    )
    if wanted.is_sampling:
        sampling.temperature = 1.0 if wanted.temperature is None else wanted.temperature
        sampling.top_k = wanted.top_k or 0
        if wanted.top_p is not None:
            sampling.top_p = wanted.top_p
    if wanted.grammar is not None:
        sampling.constraint.CopyFrom(wanted.grammar.constraint())
    return sampling


async def encode(text: str, serving: Serving) -> list[int]:
    """The ids of a prompt, special tokens in front. Raises InvalidRequest where it is longer than could ever fit."""
    most = CHARACTERS_PER_TOKEN * serving.offer.max_context_tokens
    if len(text) > most:
        raise _refusal(f"`inputs` must have at most {most} characters. Given: {len(text)}")

    def ids() -> list[int]:
        found: list[int] = serving.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        return found

    return await asyncio.to_thread(ids) if len(text) > LONG_TEXT_CHARACTERS else ids()


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(Reason.INVALID_FIELD, message)
