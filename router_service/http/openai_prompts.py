"""Prompts of OpenAI's API as prompts of turns: texts, token ids, batches of both."""

from __future__ import annotations

from typing import Any

from fusionroute.errors import invalid
from fusionroute.v1 import router_pb2
from router_service.http.openai_requests import Prompt

MAX_PROMPTS = 128


def prompts_of(prompt: Prompt) -> list[str | list[int]]:
    """One by one. Raises InvalidRequest: none, too many, or an id that cannot be one."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", prompt, "at least one text or token id")
    if isinstance(prompt[0], int):
        return [_checked(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise invalid("prompt", f"{len(prompt)} prompts", f"at most {MAX_PROMPTS}")
    return [each if isinstance(each, str) else _checked(each) for each in prompt]


def _checked(ids: Any) -> list[int]:
    if bad := [each for each in ids if not 0 <= each < 2**32]:
        raise invalid("prompt", bad[0], "a token id")
    return list(ids)


def set_prompt(request: router_pb2.GenerateRequest, prompt: str | list[int]) -> None:
    """Makes a request continue a text or token ids."""
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
