"""Bodies of requests to OpenAI's API: what is read of them, of which types, within which limits.

Types are strict ("5" is no number), limits are OpenAI's where it has some. Fields that are not named here are ignored,
as other servers of this API do, so that clients may send what they like; in our own extension they are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fusionroute.errors import InvalidRequest, Reason, invalid

MAX_CHOICES = 128
MAX_TOP = 20

Stop: TypeAlias = str | list[str]
Prompt: TypeAlias = str | list[str] | list[int] | list[list[int]]
CombineName: TypeAlias = Literal[
    "sum", "gated_sum", "mixture", "select", "route", "router", "ensemble", "proxy"
]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Body(BaseModel):
    """JSON as it came. Null stands for a field that is not given."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class Extension(BaseModel):
    """What only this server knows: `"fusionroute": {...}` in the body."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    combine: CombineName | None = Field(
        default=None, description="How scores are fused; absent = as the checkpoint says."
    )
    expert: str | None = Field(
        default=None, description="Slot of the expert to use always; absent = the routed one."
    )
    expert_choice: Literal["routed", "random"] | None = Field(
        default=None, description="Who says which expert takes part: the router, or a draw at every token."
    )
    details: bool = Field(
        default=False, description="Whether answers tell of each token who wrote it and how."
    )
    num_candidates: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP,
        description="With details: so many best tokens by sum, expert and complement.",
    )
    exact: bool = Field(
        default=False, description="Scores of the same bits however they are computed. Slower."
    )
    drafting: Literal["auto", "off", "router", "expert", "lookup"] | None = Field(
        default=None, description="Who proposes tokens in advance; the text does not depend on it."
    )
    on_expert_unavailable: Literal["wait", "next_best", "router_only", "fail"] | None = Field(
        default=None, description="What is done while a picked expert is not there."
    )
    session_id: str | None = Field(
        default=None,
        description="Of a session that is kept: a known one is continued, its new turn is what the prompt says.",
    )
    top_k: int | None = Field(
        default=None, ge=-1, le=2**31 - 1, description="Keep the k best tokens; 0 or -1 = all."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Keep what has this share of the best probability."
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=100, description="Of all tokens seen; 1 = none."
    )
    ignore_eos: bool | None = Field(default=None, description="Go on after the end-of-sequence token.")


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = Field(
        default=None, description="Whether a last chunk tells how many tokens there were."
    )


class Sampled(Body):
    """What both kinds of completion have in common."""

    model: str = Field(description="A name that /v1/models lists.", max_length=256)
    stream: bool | None = Field(default=None, description="Whether tokens are sent as they come.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1, description="New tokens at most.")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 = the best token always; absent = 1."
    )
    top_p: float | None = Field(
        default=None, ge=0, le=1, description="Keep the smallest set with this probability; absent = 1."
    )
    n: int | None = Field(
        default=None, ge=1, le=MAX_CHOICES, description="Answers to each prompt; number i has seed + i."
    )
    stop: Stop | None = Field(default=None, description="The answer ends before the first of these.")
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        le=2**64 - 1,
        description="The same one gives the same answer; absent = drawn.",
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(default=None, description="By token id, -100 to 100.")
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1, description="As in `fusionroute`.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="As in `fusionroute`.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=100, description="As in `fusionroute`.")
    ignore_eos: bool | None = Field(default=None, description="As in `fusionroute`.")
    fusionroute: Extension | None = Field(default=None, description="What only this server knows.")


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: Prompt = Field(description="A text, token ids, or a list of texts or of lists of token ids.")
    best_of: int | None = Field(default=None, description="Not other than n.")
    echo: bool | None = Field(default=None, description="Whether the prompt comes first in the answer.")
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP, description="So many best tokens with each token."
    )
    suffix: str | None = Field(default=None, description="Not supported.")


class TextPart(Body):
    """A part of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(Body):
    """What was called: `arguments` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class JsonSchema(Body):
    """A schema with a name."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, any JSON object, or what a JSON schema describes."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class NamedFunction(Body):
    """Its name."""

    name: str


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="New tokens at most; before max_tokens."
    )
    logprobs: bool | None = Field(default=None, description="Whether tokens come with their log-probability.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP, description="With logprobs: so many best tokens with each."
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="What the answer must look like."
    )
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=128, description="What it may call.")
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        default=None, description="Whether it calls: none, auto, required, or the one to call."
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Several calls at once; absent = yes.")
    continue_final_message: bool | None = Field(
        default=None, description="The last message, the assistant's, is not complete: go on with it."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the chat template."
    )


B = TypeVar("B", bound=BaseModel)


def read_body(kind: type[B], raw: bytes) -> B:
    """A body as it came, checked.

    Raises:
        InvalidRequest: naming the first field that does not fit.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(detail: ErrorDetails) -> InvalidRequest:
    field = field_of(detail)
    if detail["type"] == "json_invalid":
        return InvalidRequest(Reason.INVALID_FIELD, f"the body is not JSON: {detail['ctx']['error']}")
    if not field:
        return InvalidRequest(Reason.INVALID_FIELD, "the body must be a JSON object")
    if detail["type"] == "missing":
        return InvalidRequest(Reason.INVALID_FIELD, f"{field} is missing", metadata={"field": field})
    return invalid(field, detail["input"], detail["msg"].removeprefix("Input "))


_KINDS_OF_UNIONS = ("NamedTool", "str", "int", "list[", "bool", "constrained-", "TextPart", "literal[")


def field_of(detail: ErrorDetails) -> str:
    """The field that an error is about: messages[0].content."""
    name = ""
    for part in detail["loc"]:
        if isinstance(part, int):
            name += f"[{part}]"
        elif not part.startswith(_KINDS_OF_UNIONS):
            name += f".{part}" if name else part
        else:
            break
    return name


def one_of(value: Any, *others: Any) -> Any:
    """The first that is given."""
    return next((each for each in (value, *others) if each is not None), None)
