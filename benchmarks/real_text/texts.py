"""Texts of six domains: for experts, for the router, held out; no row is in two of these."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.real_text.sizes import ASKED, EXPERTS, GAP, MIXED, ROUTER_DOMAINS, UNSEEN, Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MBPP_HELD_OUT = range(11, 511)
"""Task ids, as usual."""
MIXED_CHARACTERS = 90
"""Of each half of a mixed text's answer."""
SHUFFLED = 20261122
"""What is held out does not depend on the seed of training."""


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with its answer."""

    prompt: str
    answer: str

    def to_json(self) -> dict[str, str]:
        """As training and evaluation read it."""
        return {"prompt": self.prompt, "completion": self.answer}


class Source(Protocol):
    """Where texts and the base come from."""

    def pools(self) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
        """By domain: rows to train on, and rows to ask; the latter of every domain but the mixed one."""

    def save_base(self, folder: Path) -> None:
        """Writes the model that all others start from."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Who sees what.

    Attributes:
        experts: rows by slot.
        router: rows over all of the router's domains.
        pairs: further ones, for preference pairs.
        held_out: by domain; the same for every seed.
    """

    experts: Mapping[str, Sequence[Row]]
    router: Sequence[Row]
    pairs: Sequence[Row]
    held_out: Mapping[str, Sequence[Row]]


class DataFolder:
    """The real ones, of the folder that FUSIONROUTE_DATA_DIR names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save_base(self, folder: Path) -> None:
        """Raises OSError: the files are not there."""
        from benchmarks.real_text.stories import save_base

        save_base(self._folder, folder)

    def pools(self) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
        """Raises OSError: a file is not there."""
        mbpp = list(self._read("mbpp/mbpp"))
        coding, coding_asked = _split(
            [_instruction(row) for row in self._read("gpteacher/codegen_instruct")], 400
        )
        prose, prose_asked = _split(
            [_instruction(row) for row in self._read("gpteacher/roleplay_instruct")], 300
        )
        train = {
            "math": [_gsm8k(row) for row in self._read("gsm8k/train")],
            "code": coding + [_mbpp(row) for row in mbpp if row["task_id"] > MBPP_HELD_OUT.stop - 1],
            "prose": prose,
            GAP: [_math(row) for row in self._read("math_train504/train")],
        }
        asked_mbpp = [_mbpp(row) for row in mbpp if row["task_id"] in MBPP_HELD_OUT]
        asked = {
            "math": [_gsm8k(row) for row in self._read("gsm8k/test")],
            "code": coding_asked + asked_mbpp[: len(coding_asked)],
            "prose": prose_asked,
            GAP: [_math(row) for row in self._read("math500/test")],
            UNSEEN: [_t0(row) for row in self._read("self_instruct/t0_train_sample")],
        }
        return train, asked

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        with gzip.open(self._folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines)


def texts_of(source: Source, sizes: Sizes, seed: int, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Everybody's rows of a seed.

    Raises:
        ValueError: a domain has too few rows whose prompts are short enough.
    """
    train, asked = source.pools()
    random = Random(f"real text/{seed}")  # noqa: S311 - not for secrets
    router: list[Row] = []
    pairs: list[Row] = []
    experts: dict[str, list[Row]] = {}
    for domain in ROUTER_DOMAINS:
        rows = train[domain]
        random.shuffle(rows)
        fitting = _fitting(rows, tokenizer, sizes)
        mine = _first(fitting, sizes.router_rows + sizes.pair_prompts, domain)
        router += mine[: sizes.router_rows]
        pairs += mine[sizes.router_rows :]
        taken = {id(row) for row in mine}
        if domain in EXPERTS:
            experts[domain] = [row for row in rows if id(row) not in taken]
    random.shuffle(router)
    return Texts(experts, router, pairs, _held_out(asked, sizes, tokenizer))


def _held_out(
    asked: Mapping[str, list[Row]], sizes: Sizes, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Row]]:
    random = Random(SHUFFLED)  # noqa: S311
    found: dict[str, list[Row]] = {}
    spare: dict[str, Iterator[Row]] = {}
    for domain, rows in asked.items():
        shuffled = random.sample(rows, len(rows))
        fitting = _fitting(shuffled, tokenizer, sizes)
        found[domain] = _first(fitting, sizes.documents, domain)
        spare[domain] = fitting
    changes = list(permutations(EXPERTS, 2))
    found[MIXED] = [
        _mixed(next(spare[one]), next(spare[other]))
        for one, other in (changes[number % len(changes)] for number in range(sizes.documents))
    ]
    return {domain: found[domain] for domain in ASKED}


def _mixed(one: Row, other: Row) -> Row:
    """The first's prompt; as answer the beginning of its own, the other's prompt, and the beginning of the other's."""
    answer = f"{one.answer[:MIXED_CHARACTERS]}\n{other.prompt}{other.answer[:MIXED_CHARACTERS]}"
    return Row(one.prompt, answer)


def _fitting(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> Iterator[Row]:
    for row in rows:
        if row.answer and len(tokenizer(row.prompt)["input_ids"]) <= sizes.max_prompt_tokens:
            yield row


def _first(rows: Iterator[Row], count: int, domain: str) -> list[Row]:
    found = [row for row, _ in zip(rows, range(count), strict=False)]
    if len(found) < count:
        raise ValueError(f"{domain} has {len(found)} rows with short prompts, {count} are needed")
    return found


def _split(rows: list[Row], num_asked: int) -> tuple[list[Row], list[Row]]:
    shuffled = Random(SHUFFLED).sample(rows, len(rows))  # noqa: S311
    return shuffled[num_asked:], shuffled[:num_asked]


def _row(prompt: str, answer: str) -> Row:
    return Row(f"{prompt.strip()}\n".replace("\r", ""), answer.strip().replace("\r", ""))


def _instruction(row: Mapping[str, str]) -> Row:
    return _row(f"{row['instruction']} {row['input']}", row["response"])


def _gsm8k(row: Mapping[str, str]) -> Row:
    return _row(row["question"], row["answer"])


def _mbpp(row: Mapping[str, str]) -> Row:
    return _row(row["text"], row["code"])


def _math(row: Mapping[str, str]) -> Row:
    return _row(row["problem"], row["solution"])


def _t0(row: Mapping[str, str]) -> Row:
    return _row(row["prompt"], row["completion"].removesuffix("<|endoftext|>"))
