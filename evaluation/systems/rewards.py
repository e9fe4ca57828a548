"""How good a whole answer is, as a number: a reward model in a folder, or any function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from evaluation.questions import Question
from evaluation.systems.tokens import TokenizerCodec
from fusionroute.errors import invalid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that might be given.

    Attributes:
        text: from the answer's beginning.
        is_complete: whether it has ended, not run out of tokens.
    """

    text: str
    is_complete: bool


class Reward(Protocol):
    """Says how good answers are."""

    def rewards(self, question: Question, candidates: Sequence[Candidate]) -> list[float]:
        """One number for each candidate, more is better. Called in threads, by several at once."""


@dataclass(frozen=True, slots=True)
class FunctionReward:
    """Any function: for tests, and as the upper bound of what a reward model could do."""

    function: Callable[[Question, Candidate], float]

    def rewards(self, question: Question, candidates: Sequence[Candidate]) -> list[float]:
        """As the protocol says."""
        return [self.function(question, candidate) for candidate in candidates]


@dataclass(frozen=True, slots=True)
class ModelReward:
    """A sequence classifier with one label; it reads prompt and answer, and the end of sequence where there is one."""

    model: PreTrainedModel
    codec: TokenizerCodec

    @classmethod
    def load(cls, folder: Path, device: str = "cpu", dtype: str = "auto") -> ModelReward:
        """From a folder with safetensors; code of the folder is not run.

        Raises:
            OSError: there is no such model.
            InvalidRequest: it has more labels than one, or its tokenizer has no end of sequence.
        """
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        codec = TokenizerCodec.load(folder)
        tokenizer = codec.tokenizer
        if model.config.num_labels != 1:
            raise invalid(
                "reward", f"{folder} with {model.config.num_labels} labels", "a model with one label"
            )
        if tokenizer.eos_token_id is None:
            raise invalid("reward", str(folder), "a tokenizer with an end-of-sequence token")
        if model.config.pad_token_id is None:
            pad = tokenizer.pad_token_id
            model.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
        return cls(model.to(device).eval(), codec)

    def rewards(self, question: Question, candidates: Sequence[Candidate]) -> list[float]:
        """As the protocol says: one forward over all candidates, padded on the right."""
        import torch

        rows = [self._ids(question, candidate) for candidate in candidates]
        width = max(map(len, rows))
        pad = self.model.config.pad_token_id
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = self.model.device
        with torch.inference_mode():
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return [float(reward) for reward in logits[:, 0]]

    def _ids(self, question: Question, candidate: Candidate) -> list[int]:
        tokenizer = self.codec.tokenizer
        answer = list(tokenizer(candidate.text, add_special_tokens=False)["input_ids"])
        end = [tokenizer.eos_token_id] if candidate.is_complete else []
        ids = [*self.codec.encode(question), *answer, *end]
        most = getattr(self.model.config, "max_position_embeddings", None)
        return ids[-most:] if most else ids
