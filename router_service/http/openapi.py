"""The OpenAPI document of all HTTP APIs, made of the routes' descriptions and the models that read their bodies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fusionroute import __version__
from router_service.http.openai_requests import ChatBody, CompletionBody
from router_service.http.tgi_requests import TgiRequest
from router_service.http.tokenizer_routes import DetokenizeBody, TokenizeBody

OPENAPI_PATH = "/openapi.json"
REFERENCE = "#/components/schemas/{model}"
ERROR = "Error"
TGI_ERROR = "TgiError"
_STATUSES = {
    400: "The request is not possible; the message names field, value and limit.",
    401: "A key is needed.",
    404: "There is no such thing.",
    409: "A session is not where the request believes it to be.",
    413: "The body is too large.",
    422: "The request is not possible; the message names field, value and limit.",
    424: "The answer broke off.",
    429: "No room now; retry-after says when to come again.",
    500: "The router failed.",
    503: "An expert, Redis or the router itself is not there now.",
    504: "What was needed did not come in time.",
}
_WRITING = (400, 401, 404, 409, 413, 429, 500, 503, 504)
_TGI_WRITING = (401, 404, 413, 422, 424, 429, 500, 503)


@dataclass(frozen=True, slots=True)
class Operation:
    """What can be done at a path.

    Attributes:
        answer: a JSON schema of a good answer; None = it is no JSON.
        media: of a good answer; that of a stream comes on demand where `streams`.
        statuses: of refusals.
        error: name of their schema.
    """

    path: str
    method: str
    tag: str
    summary: str
    body: type[BaseModel] | None = None
    answer: dict[str, Any] | None = None
    media: str = "application/json"
    streams: bool = False
    statuses: tuple[int, ...] = (401,)
    error: str = ERROR
    is_open: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Path and method."""
        return self.path, self.method


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _named(name: str) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(model=name)}


_TEXT, _NUMBER, _COUNT, _YES_OR_NO = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
_LIST: dict[str, Any] = {"type": "array"}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}

OPERATIONS = (
    Operation("/v1/models", "GET", "OpenAI", "The model, each of its experts alone, and its router alone.",
              answer=_object("object", "data", object=_TEXT, data={"type": "array", "items": _named("Model")})),
    Operation("/v1/models/{name}", "GET", "OpenAI", "One of them.", answer=_named("Model"), statuses=(401, 404)),
    Operation("/v1/chat/completions", "POST", "OpenAI", "Answers a conversation.", ChatBody, _named("Answer"),
              streams=True, statuses=_WRITING),
    Operation("/v1/completions", "POST", "OpenAI", "Continues texts.", CompletionBody, _named("Answer"),
              streams=True, statuses=_WRITING),
    Operation("/tokenize", "POST", "Tokenizer", "The token ids of a text or a conversation.", TokenizeBody,
              _object("count", "tokens", count=_COUNT, max_model_len=_COUNT, tokens=_LIST), statuses=(400, 401, 413)),
    Operation("/detokenize", "POST", "Tokenizer", "The text of token ids.", DetokenizeBody,
              _object("prompt", prompt=_TEXT), statuses=(400, 401, 413)),
    Operation("/tokenizer_info", "GET", "Tokenizer", "Its special tokens and chat template.", answer=_ANY_OBJECT),
    Operation("/", "POST", "TGI", "As /generate, or /generate_stream with stream = true.", TgiRequest,
              {}, streams=True, statuses=_TGI_WRITING, error=TGI_ERROR),
    Operation("/generate", "POST", "TGI", "Continues a text.", TgiRequest, {}, statuses=_TGI_WRITING, error=TGI_ERROR),
    Operation("/generate_stream", "POST", "TGI", "Continues a text, token by token.", TgiRequest,
              media="text/event-stream", statuses=_TGI_WRITING, error=TGI_ERROR),
    Operation("/invocations", "POST", "TGI", "As /, for SageMaker.", TgiRequest, {}, streams=True,
              statuses=_TGI_WRITING, error=TGI_ERROR),
    Operation("/info", "GET", "TGI", "What is served, and its limits.", answer=_ANY_OBJECT),
    Operation("/fusionroute/state", "GET", "Playground", "The experts as they are now.", answer=_ANY_OBJECT),
    Operation("/fusionroute/sessions/{session_id}", "DELETE", "Playground", "Ends and forgets a session.",
              answer=_object("existed", session_id=_TEXT, existed=_YES_OR_NO), statuses=(400, 401, 503)),
    Operation("/", "GET", "Playground", "The page.", media="text/html", is_open=True, statuses=()),
    Operation("/playground/{name}", "GET", "Playground", "Files of the page.", media="*/*", is_open=True,
              statuses=(404,)),
    Operation("/health", "GET", "Upkeep", "Whether anything is answered.", answer=_ANY_OBJECT, is_open=True,
              statuses=()),
    Operation("/ready", "GET", "Upkeep", "Whether work should be sent here; 503 with the reasons why not.",
              answer=_object("ready", "reasons", ready=_YES_OR_NO, reasons=_LIST), statuses=(401, 503)),
    Operation("/version", "GET", "Upkeep", "Which version and checkpoint.", answer=_ANY_OBJECT),
    Operation("/metrics", "GET", "Upkeep", "Prometheus's text format.", media="text/plain"),
    Operation(OPENAPI_PATH, "GET", "Upkeep", "This document.", answer=_ANY_OBJECT),
)  # fmt: skip
"""Everything that can be asked over HTTP."""

_SCHEMAS: dict[str, Any] = {
    ERROR: _object(
        "error",
        error=_object(
            "message", "type", "param", "code", message=_TEXT, type=_TEXT,
            param={"type": ["string", "null"]}, code={"type": ["string", "null"]},
        ),
    ),
    TGI_ERROR: _object("error", error={"type": ["string", "object"]}, error_type=_TEXT),
    "Model": _object("id", "object", "created", "owned_by", id=_TEXT, object=_TEXT, created=_COUNT, owned_by=_TEXT,
                     max_model_len=_COUNT, fusionroute=_ANY_OBJECT),
    "Usage": _object("prompt_tokens", "completion_tokens", "total_tokens", prompt_tokens=_COUNT,
                     completion_tokens=_COUNT, total_tokens=_COUNT),
    "Answer": _object(
        "id", "object", "created", "model", "choices", "usage", id=_TEXT, object=_TEXT, created=_COUNT, model=_TEXT,
        system_fingerprint=_TEXT, choices={"type": "array", "items": _ANY_OBJECT}, usage=_named("Usage"),
    ),
}  # fmt: skip


def document() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    bodies = sorted({each.body for each in OPERATIONS if each.body is not None}, key=lambda each: each.__name__)
    _, schemas = models_json_schema([(each, "validation") for each in bodies], ref_template=REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _told(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FusionRoute",
            "version": __version__,
            "description": "OpenAI's and TGI's APIs over a fused model; docs/http.md says more.",
        },
        "paths": paths,
        "components": {
            "schemas": {**_SCHEMAS, **schemas["$defs"]},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def text() -> str:
    """The document as a file holds it."""
    return json.dumps(document(), indent=1, sort_keys=True) + "\n"


def _told(operation: Operation) -> dict[str, Any]:
    good: dict[str, Any] = {operation.media: {"schema": operation.answer if operation.answer is not None else {}}}
    if operation.streams:
        good["text/event-stream"] = {"schema": {}}
    responses: dict[str, Any] = {"200": {"description": "A good answer.", "content": good}}
    for status in operation.statuses:
        name = ERROR if status in (401, 404, 413) else operation.error
        content = {} if operation.path == "/ready" and status == 503 else {"application/json": {"schema": _named(name)}}
        responses[str(status)] = {"description": _STATUSES[status], **({"content": content} if content else {})}
    told: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [operation.tag],
        "operationId": f"{operation.method.lower()} {operation.path}",
        "responses": responses,
    }
    if operation.is_open:
        told["security"] = []
    if operation.body is not None:
        schema = _named(operation.body.__name__)
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    names = [part.strip("{}") for part in operation.path.split("/") if part.startswith("{")]
    if names:
        told["parameters"] = [
            {"name": each, "in": "path", "required": True, "schema": {"type": "string"}} for each in names
        ]
    return told
