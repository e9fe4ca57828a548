"""A suite in a file: which systems are asked which tasks, in TOML, strict, every field with its meaning.

    name = "mine"
    baseline = "sum"

    [[systems]]                     # none: every expert and every rule that the router can serve
    name = "sum"
    combine = "sum"

    [[tasks]]
    kind = "gsm8k"
    file = "gsm8k/test.jsonl"

    [[texts]]                       # how probable each system finds texts, and how often its first choice is right
    name = "code"
    file = "held-out-code.jsonl"

Relative paths are meant from the folder of the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fusionroute.errors import InvalidRequest, Reason

_PATHS = ("file", "api_key_file", "examples_file", "reward")

Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/+-]{0,63}$")]


class TaskKind(StrEnum):
    """Where a task's questions come from, and with them how answers are judged."""

    GSM8K = "gsm8k"
    MATH500 = "math500"
    HUMANEVAL = "humaneval"
    MBPP = "mbpp"
    IFEVAL = "ifeval"
    JSONL = "jsonl"
    LAB = "lab"


_WITH_PROGRAMS = (TaskKind.HUMANEVAL, TaskKind.MBPP, TaskKind.JSONL)
_ONLY_OF: Mapping[str, tuple[TaskKind, ...]] = {
    "chat": (TaskKind.GSM8K, TaskKind.MATH500, TaskKind.HUMANEVAL),
    "num_examples": (TaskKind.GSM8K, TaskKind.MBPP),
    "examples_file": (TaskKind.GSM8K, TaskKind.MBPP),
    "verifier": (TaskKind.JSONL,),
    "split": (TaskKind.MBPP,),
    "gold": (TaskKind.MATH500,),
    "cpu_seconds": _WITH_PROGRAMS,
    "memory_mib": _WITH_PROGRAMS,
    "allow_weak_sandbox": _WITH_PROGRAMS,
}


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class SystemTable(_Table):
    """Somebody who is asked."""

    name: Name = Field(description="In tables and on the command line.")
    label: str = Field(default="", description="For people; empty = the name.")
    kind: Literal["served", "model", "remote", "collab"] = Field(
        default="served",
        description="A way to ask the router, a model in a folder, another server, or experts that a reward chooses.",
    )
    address: str = Field(
        default="",
        description="HOST:PORT of another router than the one that the suite is run against, for example one with "
        "another checkpoint before the same experts (served).",
    )
    combine: Literal["", "sum", "gated_sum", "mixture", "select", "route", "router", "ensemble", "proxy"] = (
        Field(default="", description="Rule (served); empty = the checkpoint's own.")
    )
    expert: str = Field(default="", description="Slot used at every token (served); empty = as routed.")
    random_expert: bool = Field(default=False, description="A drawn expert at every token (served).")
    model: str = Field(default="", description="Folder or hub id (model); name at the server (remote).")
    url: str = Field(
        default="", description="http(s)://HOST:PORT of a server of TGI's or OpenAI's API (remote)."
    )
    api_key_file: Path | None = Field(default=None, description="Whose first line is the key (remote).")

    reward: str = Field(default="", description="Folder of a sequence classifier with one label (collab).")
    chunk_tokens: Count = Field(
        default=1, description="Tokens that the chosen expert writes before the next choice (collab)."
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "model" and not self.model:
            raise ValueError("a system of kind model needs `model`")
        if self.kind == "remote" and not self.url:
            raise ValueError("a system of kind remote needs `url`")
        if (self.kind == "collab") is not bool(self.reward):
            raise ValueError("a system of kind collab, and no other, needs `reward`")
        if self.kind != "served" and (self.combine or self.expert or self.random_expert or self.address):
            raise ValueError(
                f"combine, expert, random_expert and address are of kind served, not {self.kind}"
            )
        return self


class TaskTable(_Table):
    """Questions with a verifier."""

    kind: TaskKind = Field(description="gsm8k, math500, humaneval, mbpp, ifeval, jsonl or lab.")
    name: str = Field(default="", description="In tables; empty = the kind.")
    file: Path | None = Field(default=None, description="JSONL or JSONL.gz; none for lab.")
    max_questions: Count | None = Field(default=None, description="Ask no more than the first so many.")
    max_tokens: Count | None = Field(default=None, description="Of an answer; none = as usual for the kind.")
    chat: bool = Field(default=False, description="Ask as a message of a user, where the kind can.")
    num_examples: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Worked examples before the question (gsm8k, mbpp); none = as usual for the kind.",
    )
    examples_file: Path | None = Field(default=None, description="Where they are, if not in `file`.")
    verifier: str = Field(default="", description="How a jsonl task is judged, unless its rows say it.")
    split: Literal["", "prompt", "test", "validation", "train", "all"] = Field(
        default="", description="Part of mbpp's full set; empty = test."
    )
    gold: Literal["", "number", "constant", "other"] = Field(
        default="", description="Only questions of math500 whose answer is of this kind; empty = all."
    )
    cpu_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=10, description="Of a program, and again of its tests; twice as long in all."
    )
    memory_mib: Annotated[int, Field(ge=64, le=1 << 20)] = Field(
        default=1024, description="Address space of a program, and again of its tests."
    )
    allow_weak_sandbox: bool = Field(
        default=False, description="Run programs of models even where the kernel cannot lock them in fully."
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if (self.file is None) is not (self.kind is TaskKind.LAB):
            raise ValueError("`file` is needed, and only lab has none")
        for field, kinds in _ONLY_OF.items():
            if self.kind not in kinds and getattr(self, field) != type(self).model_fields[field].default:
                named = ", ".join(kinds)
                raise ValueError(f"{field} = {getattr(self, field)} is not for {self.kind}, only for {named}")
        return self

    @property
    def title(self) -> str:
        """In tables."""
        return self.name or str(self.kind)


class TextTable(_Table):
    """Held-out texts: rows with `text`, or with `prompt` and `completion` of which only the latter is judged."""

    name: Name = Field(description="In tables.")
    file: Path = Field(description="JSONL or JSONL.gz.")
    max_rows: Count | None = Field(default=None, description="Read no more than the first so many.")
    max_tokens: Count = Field(default=512, description="Of one row; longer ones are cut.")


class SamplingTable(_Table):
    """How answers are written."""

    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = Field(
        default=0.0, description="0 = greedy."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="Share of probability kept.")
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="Candidates kept; 0 = all.")
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = Field(
        default=(0,), description="Every question is asked once with each."
    )


class Suite(_Table):
    """What is asked of whom."""

    name: Name = Field(description="Of the suite.")
    baseline: str = Field(default="sum", description="The system that all others are compared with.")
    systems: tuple[SystemTable, ...] = Field(default=(), description="None = all that the router can serve.")
    tasks: tuple[TaskTable, ...] = Field(default=(), description="Questions.")
    texts: tuple[TextTable, ...] = Field(default=(), description="Texts.")
    tokenizer: str = Field(
        default="", description="Folder or hub id, for texts and collab: the experts' own."
    )
    sampling: SamplingTable = SamplingTable()
    concurrency: Count = Field(default=16, description="Requests in flight.")

    @classmethod
    def from_toml(cls, path: Path) -> Suite:
        """The suite in a file; relative paths are made absolute.

        Raises:
            InvalidRequest: INVALID_FIELD, naming file, field, value and limit.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidRequest(Reason.INVALID_FIELD, f"suite {path} cannot be read: {error}") from None
        try:
            suite = cls.model_validate(_absolute(content, path.resolve().parent))
        except ValidationError as error:
            lines = [
                f"{path}: {'.'.join(map(str, each['loc'])) or 'suite'} = {each['input']!r} is not allowed: "
                f"{each['msg']}"
                for each in error.errors(include_url=False)
            ]
            raise InvalidRequest(Reason.INVALID_FIELD, "\n".join(lines)) from None
        return suite

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.tasks and not self.texts:
            raise ValueError("a suite needs tasks or texts")
        for kind, names in (
            ("systems", [each.name for each in self.systems]),
            ("tasks and texts", [each.title for each in self.tasks] + [each.name for each in self.texts]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two {kind} have the name {twice[0]!r}")
        if self.texts and not self.tokenizer:
            raise ValueError("texts need `tokenizer`")
        if any(each.kind == "collab" for each in self.systems) and not self.tokenizer:
            raise ValueError("a system of kind collab needs `tokenizer`")
        if self.systems and self.baseline not in [each.name for each in self.systems]:
            raise ValueError(f"the baseline {self.baseline!r} is not among the systems")
        return self

    def digest_values(self) -> dict[str, Any]:
        """As plain values, for facts."""
        return self.model_dump(mode="json")


def _absolute(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With the paths of files meant from the folder."""

    def of(table: Any) -> Any:
        if not isinstance(table, dict):
            return table
        return {
            key: str(folder / value) if key in _PATHS and isinstance(value, str) else value
            for key, value in table.items()
        }

    lists = ("systems", "tasks", "texts")
    return {
        key: [of(each) for each in value] if key in lists and isinstance(value, list) else value
        for key, value in content.items()
    }
