"""What a training job is told: one TOML file per job, strict, every field with its meaning.

    kind     does                                                          needs
    label    asks every expert about every target of a data set           experts, data
    sft      phase I: router and routing head, then the gates              experts, data, router (a causal LM)
    pairs    wrong answers of a serving router as rejected ones            data (prompts with gold answers)
    cdpo     phase II: preference pairs mixed with SFT rows                experts, data, pairs, router (a checkpoint)
    extend   one more expert for an existing router                        experts, data, router (a checkpoint)

Relative paths are meant from the folder of the file. The whole configuration travels as JSON.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fusionroute.errors import InvalidRequest, Reason
from trainer.gates_table import FittedGates, GatesTable
from trainer.remote_table import Remote

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class JobKind(StrEnum):
    """What a job does."""

    LABEL = "label"
    SFT = "sft"
    PAIRS = "pairs"
    CDPO = "cdpo"
    EXTEND = "extend"


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ExpertSource(_Table):
    """Where an expert is: files for what runs in the trainer itself. A plain string is a `model`."""

    model: str = Field(min_length=1, description="Folder or hub id of the causal LM.")
    name: str = Field(default="", description="Name in the manifest; empty = last part of `model`.")


Expert = Annotated[
    ExpertSource, BeforeValidator(lambda value: {"model": value} if isinstance(value, str) else value)
]
Experts = Annotated[
    dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")], Expert],
    Field(
        min_length=1,
        description="By slot, in the order of the heads: folder or hub id, or a table with `model` and `name`.",
    ),
]


class DataTable(_Table):
    """Texts or pairs: files (JSONL, JSONL.gz, Parquet) or a data set by its hub id."""

    files: tuple[Path, ...] = Field(default=(), description="Read one after the other.")
    dataset: str = Field(default="", description="Hub id instead of files.")
    subset: str = Field(default="", description="Configuration of the hub data set.")
    split: str = Field(default="train", description="Split of the hub data set.")
    max_rows: Count | None = Field(default=None, description="Read no more than so many rows.")
    max_tokens: Count = Field(default=2048, description="Tokens of one row, prompt included.")
    overlong: Literal["truncate", "drop", "refuse"] = Field(
        default="truncate", description="What becomes of longer rows: cut at the right, left out, or an error."
    )
    end_of_text: bool = Field(default=True, description="Append EOS to texts and completions that are whole.")
    chat_template: Path | None = Field(default=None, description="Jinja file instead of the tokenizer's template.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.files) == bool(self.dataset):
            raise ValueError("exactly one of `files` and `dataset` must be given")
        return self


class LabelsTable(_Table):
    """Where the experts' labels are kept and who gives them."""

    folder: Path | None = Field(default=None, description="Absent = a folder named by their key, in the cache.")
    source: Literal["local", "services"] = Field(
        default="local", description="`local` loads the experts here, `services` asks those that serve."
    )
    router: str = Field(
        default="127.0.0.1:50050", description="Router whose registry names the services, HOST:PORT."
    )
    rows_per_shard: Count = Field(default=1024, description="Rows that are lost at most when a run is killed.")
    batch_tokens: Count = Field(default=16384, description="Padded tokens of one forward (local).")
    concurrency: Count = Field(default=4, description="Sequences that each service is asked about at a time.")


class LoraTable(_Table):
    """Train low-rank adapters instead of all weights; they are merged into the checkpoint."""

    rank: Count = Field(default=16, description="Of each adapter.")
    alpha: Rate = Field(default=32.0, description="An adapter's output is scaled by alpha / rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="Before each adapter.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="Names of the layers that get one."
    )


class TrainingTable(_Table):
    """The loop: AdamW, linear warm-up, then cosine."""

    epochs: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Passes over the data.")
    max_steps: Count | None = Field(default=None, description="Optimiser steps instead of epochs.")
    batch_rows: Count = Field(default=8, description="Rows (a pair counts as two) of one forward of one process.")
    accumulation_steps: Count = Field(default=1, description="Forwards before an optimiser step.")
    learning_rate: Rate = Field(default=1e-5, description="Of the router, after the warm-up.")
    head_learning_rate_factor: Rate = Field(default=3.0, description="The routing head's rate over the router's.")
    betas: tuple[float, float] = Field(default=(0.9, 0.98), description="Of AdamW.")
    weight_decay: Weight = Field(default=0.01, description="Of AdamW, on matrices.")
    max_gradient_norm: Rate = Field(default=1.0, description="Longer gradients are shortened to it.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=20, description="Of the learning rate, linear.")
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Where the cosine ends."
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 = autocast over fp32 weights.")
    gradient_checkpointing: bool = Field(default=False, description="Less memory, a third more time.")
    chunk_tokens: Count = Field(default=1024, description="Targets whose vocabulary rows exist at a time.")
    save_every_steps: Count = Field(default=200, description="Steps that are lost at most when a run is killed.")
    log_every_steps: Count = Field(default=10, description="Between two lines of metrics.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of order and adapters.")
    device: str = Field(default="auto", description="auto, cpu, cuda, ... of a run with one process.")
    num_processes: Count = Field(default=1, description="Data-parallel processes on this machine.")
    launcher: tuple[str, ...] = Field(
        default=(),
        description="Instead of `num_processes`: what stands before `-m trainer.loop_process FOLDER`, for example "
        "accelerate launch --config_file fsdp.yaml.",
    )
    tensorboard: bool = Field(default=True, description="Write its logs beside the metrics.")
    lora: LoraTable | None = Field(default=None, description="Adapters instead of all weights.")


class SftLossTable(_Table):
    """Method section 2."""

    expert_weight: Weight = Field(default=1 / 3, description="lambda of L_SFT = L_LM + lambda L_expert.")
    aggregate: Literal["linear", "mixture"] = Field(
        default="linear", description="sum_i w_i (-g_i), or -log sum_i w_i pi_i."
    )
    tokens: Literal["informative", "all"] = Field(
        default="informative", description="L_expert over S, where the experts disagree, or over all targets."
    )


class CdpoLossTable(_Table):
    """Method section 3."""

    beta: Rate = Field(default=0.1, description="Of the margin.")
    policy: Literal["product", "normalised"] = Field(
        default="product", description="`normalised`: log-softmax of the summed logits; loads the experts."
    )
    bias_scale: Annotated[float, Field(ge=0, le=1)] = Field(default=1.0, description="0 = plain DPO.")
    bias_reduction: Literal["sum", "mean"] = Field(default="sum", description="mean = per token, robust to length.")
    routes: Literal["live", "frozen"] = Field(default="live", description="k(p) of the router now, or of phase I.")


class MixedLossTable(_Table):
    """What SFT rows add in phase II: L_SFT, lambda L_expert alone, or lambda L_SFT."""

    sft_loss: Literal["sft", "expert", "scaled_sft"] = Field(
        default="sft", description="L_SFT, lambda L_expert, or lambda L_SFT."
    )
    sft_rows_per_pair: Weight = Field(default=1.0, description="SFT rows for each pair, drawn anew; 0 = pairs alone.")


class ReportTable(_Table):
    """The picture of a run."""

    enabled: bool = Field(default=True, description="Measure who was right, and draw.")
    max_rows: Count = Field(default=256, description="Rows on which is measured who was right; needs the experts here.")


PUBLISHED_PREFIX = "checkpoint:"
_ROUTER = (
    "What training starts from: a folder or hub id; `checkpoint:ID` for one that the trainer service has published."
)


class JobConfig(_Table):
    """What every job has."""

    kind: ClassVar[JobKind]

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")] = Field(
        default="run", description="Part of the name of what the job makes."
    )

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """The configuration in a file; relative paths are made absolute.

        Raises:
            InvalidRequest: INVALID_FIELD, naming file, field, value and limit.
        """
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InvalidRequest(Reason.INVALID_FIELD, f"configuration {path} cannot be read: {error}") from None
        config = cls._validated(content, str(path))
        return config.at(path.resolve().parent)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The configuration that `to_json` wrote. Raises InvalidRequest as `from_toml`."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # the latter for brackets nested by the thousand
            raise InvalidRequest(Reason.INVALID_FIELD, f"config is not valid JSON: {error}") from None
        return cls._validated(content, "config")

    @classmethod
    def from_values(cls, content: Mapping[str, Any], origin: str = "config") -> Self:
        """The configuration of plain values; `origin` stands in errors. Raises InvalidRequest as `from_toml`."""
        return cls._validated(content, origin)

    def to_json(self) -> str:
        """The whole configuration, defaults included."""
        return self.model_dump_json()

    def at(self, folder: Path) -> Self:
        """With relative paths meant from `folder`."""
        return self._validated(_absolute(self.model_dump(mode="python"), folder), "config")

    def with_published(self, folder_of: Callable[[str], Path]) -> Self:
        """With `checkpoint:ID` replaced by the folder that `folder_of` gives for the id; raises what it raises."""
        router = getattr(self, "router", "")
        if not router.startswith(PUBLISHED_PREFIX):
            return self
        return self.model_copy(update={"router": str(folder_of(router.removeprefix(PUBLISHED_PREFIX)))})

    @classmethod
    def _validated(cls, content: Any, origin: str) -> Self:
        try:
            config = cls.model_validate(content)
        except ValidationError as error:
            lines = [_explained(detail, origin) for detail in error.errors(include_url=False)]
            raise InvalidRequest(Reason.INVALID_FIELD, "\n".join(lines)) from None
        for field, text in _texts(config.model_dump(mode="python")):
            if not _is_storable(text):
                found = f"{origin}: {field} = {text!r} is not allowed"
                raise InvalidRequest(Reason.INVALID_FIELD, f"{found}: should be Unicode text without NUL")
        return config


class LabelJob(JobConfig):
    """`fusionroute train label`."""

    kind = JobKind.LABEL
    experts: Experts
    data: DataTable
    labels: LabelsTable = LabelsTable()


class PairsJob(JobConfig):
    """`fusionroute train pairs`: prompts with gold answers to a file of prompt, chosen, rejected."""

    kind = JobKind.PAIRS
    data: DataTable
    output: Path = Field(description="JSONL or JSONL.gz file of the pairs; must not exist yet.")
    router: str = Field(default="127.0.0.1:50050", description="Router that is asked, HOST:PORT.")
    checkpoint: str = Field(
        default="", description="Folder of the checkpoint that it serves; empty = where the router says it is."
    )
    combine: Literal["sum", "gated_sum", "mixture", "select", "route", "router"] = Field(
        default="sum", description="The rule whose mistakes are wanted."
    )
    max_new_tokens: Count = Field(default=400, description="Of each answer.")
    samples: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Tries at `temperature` where the greedy answer is right; 0 = greedy alone."
    )
    temperature: Rate = Field(default=1.0, description="Of the tries after a right greedy answer.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of these tries.")
    verifier: Literal["exact", "number", "choice"] = Field(
        default="exact", description="When an answer is right: equal text, equal last number, equal last choice letter."
    )
    concurrency: Count = Field(default=16, description="Answers asked for at a time.")
    experts: dict[str, Expert] = Field(
        default_factory=dict, description="To print the bias of the pairs: the experts, as in cdpo."
    )
    beta: Rate = Field(default=0.1, description="With which the bias is printed.")
    remote: Remote = None


class _RouterJob(JobConfig):
    experts: Experts
    data: DataTable
    labels: LabelsTable = LabelsTable()
    router: str = Field(min_length=1, description=_ROUTER)
    training: TrainingTable = TrainingTable()
    gates: GatesTable = GatesTable()
    report: ReportTable = ReportTable()
    combine: Literal["sum", "gated_sum", "mixture", "select"] = Field(
        default="sum", description="The checkpoint's default rule."
    )


class SftJob(_RouterJob):
    """`fusionroute train sft`: `router` is a causal LM of the experts' vocabulary."""

    kind = JobKind.SFT
    routing: Literal["fresh", "kept"] = Field(
        default="fresh", description="`kept`: the routing head of `router`, a checkpoint for these experts, learns on."
    )
    sft: SftLossTable = SftLossTable()


class CdpoJob(_RouterJob):
    """`fusionroute train cdpo`: `router` is a checkpoint of phase I; the gates are fitted anew."""

    kind = JobKind.CDPO
    pairs: DataTable
    gates: FittedGates = GatesTable()
    sft: SftLossTable = SftLossTable()
    cdpo: CdpoLossTable = CdpoLossTable()
    mixed: MixedLossTable = MixedLossTable()


class ExtendJob(JobConfig):
    """`fusionroute train extend`: `experts` are those of the checkpoint in their order and one more."""

    kind = JobKind.EXTEND
    experts: Experts
    data: DataTable = Field(description="Texts of the new domain.")
    old_data: DataTable | None = Field(default=None, description="Texts of the old domains, to report on and replay.")
    labels: LabelsTable = LabelsTable()
    router: str = Field(min_length=1, description=_ROUTER)
    num_steps: Count = Field(default=300, description="Optimiser steps.")
    batch_targets: Count = Field(default=512, description="Targets of one step.")
    learning_rate: Rate = Field(default=1e-2, description="After a short warm-up; then cosine to a tenth.")
    max_targets: Count = Field(default=200_000, description="Targets of each data set that are used.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of the choice and order of targets.")
    device: str = Field(default="auto", description="auto, cpu, cuda, ...")


JOBS: dict[JobKind, type[JobConfig]] = {
    job.kind: job for job in (LabelJob, SftJob, PairsJob, CdpoJob, ExtendJob)
}

_PATH_FIELDS = frozenset({"files", "folder", "chat_template", "output", "api_key_file"})
_MODEL_FIELDS = frozenset({"model", "router", "checkpoint"})


def _absolute(value: Any, folder: Path, field: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _absolute(child, folder, name) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_absolute(child, folder, field) for child in value]
    if field in _PATH_FIELDS and isinstance(value, Path):
        return folder / value.expanduser()
    if field in _MODEL_FIELDS and isinstance(value, str) and value and (folder / value).exists():
        return str((folder / value).resolve())
    return value


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text and path of a dumped configuration, with the field it is in."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _texts(child, f"{field}.{name}" if field else str(name))
    elif isinstance(value, (list, tuple)):
        for place, child in enumerate(value):
            yield from _texts(child, f"{field}.{place}")
    elif isinstance(value, (str, Path)):
        yield field, str(value)


def _is_storable(text: str) -> bool:
    """JSON in UTF-8 has no room for half a surrogate pair, which escapes can say; no file's name has room for NUL."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def _explained(detail: Any, origin: str) -> str:
    field = ".".join(str(part) for part in detail["loc"]) or "configuration"
    if detail["type"] == "missing":
        return f"{origin}: {field} is missing"
    if detail["type"] == "extra_forbidden":
        return f"{origin}: {field} is not a field"
    limit = str(detail["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return f"{origin}: {field} = {detail['input']!r} is not allowed: {limit}"
