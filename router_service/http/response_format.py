"""`response_format`: what an answer must look like, as a constraint on its tokens."""

from __future__ import annotations

import json

from fusionroute.errors import invalid
from fusionroute.v1 import router_pb2
from router_service.http.openai_requests import ResponseFormat

ANY_OBJECT = '{"type":"object"}'


def set_format(request: router_pb2.GenerateRequest, wanted: ResponseFormat | None) -> None:
    """Constrains a turn. Raises InvalidRequest: there is no schema."""
    if wanted is None or wanted.type == "text":
        return
    if wanted.type == "json_object":
        request.sampling.constraint.json_schema = ANY_OBJECT
        return
    if wanted.json_schema is None:
        raise invalid("response_format.json_schema", None, "a schema, with type json_schema")
    schema = wanted.json_schema.schema_
    request.sampling.constraint.json_schema = json.dumps({} if schema is None else schema)
