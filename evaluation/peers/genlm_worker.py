"""The product of two models by genlm-control, in the environment of its own that it is installed in.

Started by `evaluation.peers.genlm` as a script; it may import nothing of this project. It reads one JSON object a line
and answers each with one:

    {"do": "load", "models": [FOLDER, FOLDER], "prompts": [[ID, ...], ...], "threads": 1}  ->  {"versions": {...}}
    {"do": "generate", "num_sessions": 8, "num_tokens": 256, "is_tuned": true}  ->  {"ids": [[ID, ...], ...]}

The end of its input ends it. What a library prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

END = "<end>"


def stand_in_tokenizer(width: int) -> PreTrainedTokenizerFast:
    """One made-up word for each id below `width`, and a token behind them that ends a text.

    genlm-control insists on a byte-level or SentencePiece tokenizer, and takes the ending token out of what may be
    written. This one has an ending that no model gives a logit, so every id may be written, as in the other ways.
    """
    words = {f"<{index}>": index for index in range(width)} | {END: width}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    tokenizer.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<0>")


class Pair:
    """Two models and their product for each prompt."""

    def __init__(self, folders: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
        from genlm.backend.llm import AsyncTransformer  # not where this file is merely looked at
        from genlm.control import PromptedLLM
        from genlm.control.potential import Product

        loaded = [AutoModelForCausalLM.from_pretrained(each, dtype="auto").eval() for each in folders]
        tokenizer = stand_in_tokenizer(min(model.config.vocab_size for model in loaded))
        self.models = [AsyncTransformer(model, tokenizer) for model in loaded]
        self.batch_sizes = [model.batch_size for model in self.models]
        first, second = (PromptedLLM(model) for model in self.models)
        self.prompts = [list(each) for each in prompts]
        self.products = [
            Product(first.spawn(prompt_ids=each), second.spawn(prompt_ids=each)) for each in self.prompts
        ]

    async def generate(self, num_sessions: int, num_tokens: int, *, is_tuned: bool) -> list[list[int]]:
        """Greedy, `num_tokens` new ids for each of the first `num_sessions` prompts, all at the same time.

        As it comes, a batch waits 20 ms for further queries and prompts are computed anew for each token. Tuned, a
        batch begins as soon as every session has asked, and keys and values of the prompts are kept. Those of what is
        generated it keeps in neither case.
        """
        prompts = self.prompts[:num_sessions]
        apart = num_apart(prompts)
        for model, batch_size in zip(self.models, self.batch_sizes, strict=True):
            model.clear_cache()
            model.batch_size = num_sessions if is_tuned else batch_size
            for prompt in prompts if is_tuned else ():
                if len(prompt) > apart:
                    model.cache_kv(prompt[:-apart])
        return await asyncio.gather(*(write(each, num_tokens) for each in self.products[:num_sessions]))


def num_apart(prompts: Sequence[Sequence[int]]) -> int:
    """How many last tokens of each prompt tell them all apart.

    genlm-backend 0.3.1 takes queries for one that agree in what follows their cached prompts, though the prompts
    differ; so these tokens must stay out of the cache, or sessions get each other's tokens.
    """
    longest = max(len(each) for each in prompts)
    different = len({tuple(each) for each in prompts})
    return next(n for n in range(1, longest + 1) if len({tuple(each[-n:]) for each in prompts}) == different)


async def write(product: Any, num_tokens: int) -> list[int]:
    """The likeliest token, `num_tokens` times."""
    context: list[Any] = []
    for _ in range(num_tokens):
        scores = await product.logw_next(context)
        context.append(scores.decode[int(torch.as_tensor(scores.weights).argmax())])
    return [int(token.token_id) for token in context]


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers until the input ends."""
    pair: Pair | None = None
    for line in requests:
        request = json.loads(line)
        if request["do"] == "load":
            torch.set_num_threads(request["threads"])
            pair = Pair(request["models"], request["prompts"])
            names = ("genlm-control", "genlm-backend", "torch", "transformers")
            answer: dict[str, Any] = {"versions": {name: metadata.version(name) for name in names}}
        else:
            assert pair is not None, "load comes first"
            sizes = request["num_sessions"], request["num_tokens"]
            answer = {"ids": asyncio.run(pair.generate(*sizes, is_tuned=request["is_tuned"]))}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, protocol)
