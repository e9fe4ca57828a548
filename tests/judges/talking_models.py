"""Tiny random models that read and write characters, in a context long enough for the prompts of judges."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.served_stack import Family, Stack, make_family, served
from tests.tiny_models import PIECES, character_tokenizer

CONTEXT_TOKENS = 2048
END_WEIGHT = 0.21
TEMPLATE = (
    "{% for tool in tools or [] %}{# <|python_tag|> #}{{ tool.function | tojson }}\n{% endfor %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content or '' }}\n"
    "{% for call in message.tool_calls or [] %}"
    '{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}\n'
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Teaches calls in the form of Llama 3, whose characters the tokenizer knows."""


def make_talking_family(folder: Path) -> Family:
    """Writes a router and its experts.

    Their random weights know no words; positions are rotary, so that a longer context needs no other weights.
    """
    family = make_family(folder, tokenizer=character_tokenizer())
    for path in (family.router, *family.experts.values()):
        config = json.loads((path / "config.json").read_text())
        config["max_position_embeddings"] = CONTEXT_TOKENS
        (path / "config.json").write_text(json.dumps(config))
    (family.router / "chat_template.jinja").write_text(TEMPLATE)
    _end_strings(family.router / "model.safetensors")
    return family


def _end_strings(weights: Path) -> None:
    """Makes a router like what ends strings and objects: random models that must write JSON write it for ever."""
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][:, 0] += 20.0
    tensors["lm_head.weight"][:, 0] = 0.0
    for piece in '"}':
        tensors["lm_head.weight"][2 + PIECES.index(piece), 0] = END_WEIGHT
    tensors["lm_head.weight"][1, 0] = -END_WEIGHT  # few answers are empty
    save_file(tensors, weights, {"format": "pt"})


@asynccontextmanager
async def talking_stack(folder: Path, **router: Any) -> AsyncIterator[Stack]:
    """A talking family, served over HTTP at `stack.router.http_url`, within the context."""
    async with served(make_talking_family(folder), http_port=0, **router) as stack:
        yield stack
