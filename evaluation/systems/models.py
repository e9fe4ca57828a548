"""One model in a folder, asked here without services: merged and fine-tuned models, that no router serves.

Greedy answers of a batch depend on nothing but model and batch: questions are batched by length in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.judged import JudgedText, Opinion
from evaluation.questions import Answer, Question
from evaluation.systems.judging import EncodePair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
BATCH_LOGITS = 1 << 28
"""Numbers of one batch of judged answers: 1 GiB in float32, whatever the vocabulary."""

OnProgress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A causal LM that is loaded.

    Attributes:
        name: of the system, for example "single/math".
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, folder: Path, device: str = "cpu", dtype: str = "auto") -> ModelFolder:
        """From a folder, or by hub id. Raises OSError: there is no such model."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return cls(name, model.to(device).eval(), tokenizer)

    @torch.no_grad()
    def judge(
        self,
        questions: Sequence[Question],
        encode: EncodePair,
        on_progress: OnProgress = lambda num_done: None,
    ) -> list[JudgedText]:
        """What the model would have written at each token of the gold answers; the way's name is the model's."""
        pairs = [tuple(map(list, encode(question))) for question in questions]
        found: list[JudgedText | None] = [None] * len(pairs)
        most = min(BATCH_TOKENS, BATCH_LOGITS // self.model.config.vocab_size)
        for batch in _batches([len(prompt) + len(answer) for prompt, answer in pairs], most):
            logits = self._logits([[*pairs[index][0], *pairs[index][1]] for index in batch])
            for row, index in enumerate(batch):
                prompt, answer = pairs[index]
                found[index] = self._judged(
                    logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1], answer
                )
            on_progress(len(batch))
        return [judged for judged in found if judged is not None]

    @torch.no_grad()
    def answer(
        self, questions: Sequence[Question], on_progress: OnProgress = lambda num_done: None
    ) -> list[Answer]:
        """Greedy answers by transformers' own `generate`."""
        prompts = [self._prompt(question) for question in questions]
        found: list[Answer | None] = [None] * len(prompts)
        lengths = [len(ids) + question.max_tokens for ids, question in zip(prompts, questions, strict=True)]
        for batch in _batches(lengths, BATCH_TOKENS):
            for index, answer in zip(
                batch, self._write([prompts[i] for i in batch], [questions[i] for i in batch]), strict=True
            ):
                found[index] = answer
            on_progress(len(batch))
        return [answer for answer in found if answer is not None]

    def _prompt(self, question: Question) -> list[int]:
        if isinstance(question.prompt, str):
            return list(self.tokenizer(question.prompt)["input_ids"])
        ids = self.tokenizer.apply_chat_template(
            list(question.prompt), add_generation_prompt=True, return_dict=True
        )
        return list(ids["input_ids"])

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """``[B, L, V]`` as the model has them, rows padded on the right, where no real token looks."""
        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        logits: Tensor = self.model(input_ids=ids.to(self.model.device), use_cache=False).logits
        return logits

    def _judged(self, logits: Tensor, answer: Sequence[int]) -> JudgedText:
        logits, gold = logits.float().cpu(), torch.tensor(answer)[:, None]
        logprobs = logits.gather(1, gold)[:, 0] - torch.logsumexp(logits, dim=1)
        opinion = Opinion(tuple(logits.argmax(dim=1).tolist()), tuple(logprobs.tolist()), ("",) * len(answer))
        return JudgedText(tuple(answer), {self.name: opinion})

    def _write(self, prompts: Sequence[list[int]], questions: Sequence[Question]) -> Iterator[Answer]:
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        settings: dict[str, Any] = {
            "do_sample": False,
            "max_new_tokens": max(each.max_tokens for each in questions),
        }
        device = self.model.device
        written = self.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), pad_token_id=pad, **settings
        )
        ends = self.model.generation_config.eos_token_id
        end_ids = set(ends if isinstance(ends, list) else [ends])
        for prompt, row, question in zip(prompts, written[:, width:].tolist(), questions, strict=True):
            yield self._read(prompt, row[: question.max_tokens], end_ids, question.stop)

    def _read(
        self, prompt: Sequence[int], ids: Sequence[int], end_ids: set[int], stops: Sequence[str]
    ) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in end_ids), None)
        # what the answer adds to the prompt: alone, its first token might lose the space before it
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        text = self.tokenizer.decode([*prompt, *ids[:end]], skip_special_tokens=True)[len(before) :]
        cuts = [text.find(stop) for stop in stops if stop in text]
        if cuts:
            text = text[: min(cuts)]
        num_tokens = len(ids) if end is None else end + 1
        return Answer(text, is_complete=end is not None or bool(cuts), num_tokens=num_tokens)


def _batches(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices of like lengths together, at most so many padded tokens at a time, but always one."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda each: lengths[each]):
        if batch and (len(batch) + 1) * lengths[index] > most_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
