"""Data sets in TRL's formats as rows of tokens, and what is wrong with them."""

from trainer.data.loading import GoldPrompt, load_pairs, load_prompts, load_texts
from trainer.data.problems import Origin, Problem
from trainer.data.validation import DataKind, DataReport, validate

__all__ = [
    "DataKind",
    "DataReport",
    "GoldPrompt",
    "Origin",
    "Problem",
    "load_pairs",
    "load_prompts",
    "load_texts",
    "validate",
]
