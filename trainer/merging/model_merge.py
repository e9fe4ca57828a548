"""From model folders to a merged one, a piece of a tensor at a time: memory does not grow with the models.

<output>/
    config.json, tokenizer files        of the first model
    model*.safetensors                  shards and dtypes as in the first model
    merge.json                          method, numbers, seed, digests of what went in and came out
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusionroute import __version__
from fusionroute.errors import InvalidRequest, ModelRejected, Reason, invalid
from trainer.merging import methods
from trainer.merging.folders import INDEX_FILE, ModelFolder, OpenWeights, TensorPlace, common_tensors
from trainer.merging.methods import MergeMethod, MergeSettings
from trainer.merging.weights_file import WeightsWriter, raw_bytes
from trainer.training_state import storage_errors, sync

MERGE_FILE = "merge.json"
PIECE_NUMBERS = 1 << 24
"""128 MiB of each model in double precision."""


@dataclass(frozen=True, slots=True)
class MergeProgress:
    """How far a merge is, in numbers (weights) of the merged model."""

    tensor: str
    done: int
    total: int


def merge(
    models: Sequence[Path | str],
    output: Path | str,
    settings: MergeSettings,
    base: Path | str | None = None,
    report: Callable[[MergeProgress], None] = lambda progress: None,
    piece_numbers: int = PIECE_NUMBERS,
) -> Path:
    """Merges models into a new folder, which is there whole or not at all.

    Numbers are computed in twice the precision that they are stored in (16-bit ones in float32).

    Args:
        models: local folders of one architecture, one vocabulary and, for all but an average, one base.
        output: must not exist yet.
        settings: how.
        base: from which all models were trained; an average has none.
        report: told after each piece.
        piece_numbers: numbers of a tensor that are merged at a time.

    Returns:
        The output folder.

    Raises:
        InvalidRequest: INVALID_FIELD, naming field, value and limit.
        ModelRejected: a model cannot be read, two do not fit each other, or a merged number is not finite; names
            tensor and models.
        TrainingFailed: STORAGE_FULL.
    """
    target = Path(output).expanduser()
    _check_wish(models, target, settings, base)
    folders = [ModelFolder.open(path) for path in (*models, *([base] if base is not None else []))]
    names = common_tensors(folders)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}-staged")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with storage_errors(target):
            staged.mkdir()
            digests = _write_weights(
                folders, names, settings, staged, base is not None, piece_numbers, report
            )
            _write_rest(folders, names, settings, digests, staged, base is not None)
            staged.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return target


def _check_wish(
    models: Sequence[Path | str], target: Path, settings: MergeSettings, base: Path | str | None
) -> None:
    if not models:
        raise invalid("models", [], "at least one")
    settings.for_models(len(models))
    if settings.method.needs_base and base is None:
        raise invalid(
            "base", base, f"the folder of the common base: {settings.method} works on differences from it"
        )
    if not settings.method.needs_base and base is not None:
        raise invalid("base", str(base), f"none: {settings.method} uses the models alone")
    if target.exists():
        raise InvalidRequest(
            Reason.INVALID_FIELD, f"output = {str(target)!r} exists already; it is not overwritten"
        )


def _write_weights(
    folders: Sequence[ModelFolder],
    names: Sequence[str],
    settings: MergeSettings,
    staged: Path,
    has_base: bool,
    piece_numbers: int,
    report: Callable[[MergeProgress], None],
) -> list[str]:
    """Writes all shards; digests of the weights of each folder and of the merged ones."""
    first, wanted = folders[0], set(names)
    hashers = [hashlib.sha256() for _ in (*folders, None)]
    total = sum(_count(first.tensors[name]) for name in names)
    done = 0
    with ExitStack() as stack:
        opened = [stack.enter_context(OpenWeights(folder)) for folder in folders]
        for file, held in sorted(first.shards().items()):
            shard = {name: first.tensors[name] for name in held if name in wanted}
            if not shard:
                continue
            with WeightsWriter(staged / file, shard) as writer:
                for name, place in shard.items():
                    _note_tensor(hashers, name, place)
                    for pieces in _merged_pieces(name, opened, settings, has_base, piece_numbers):
                        merged = _stored(pieces[-1], pieces[0].dtype, name, folders)
                        writer.write(merged)
                        _note_pieces(hashers, [*pieces[:-1], merged])
                        done += merged.numel()
                        report(MergeProgress(name, done, total))
    return [hasher.hexdigest() for hasher in hashers]


def _merged_pieces(
    name: str, opened: Sequence[OpenWeights], settings: MergeSettings, has_base: bool, piece_numbers: int
) -> Iterator[list[Tensor]]:
    """Of one tensor, piece by piece: that of every folder as it is stored, then the merged one, not yet stored."""
    slices = [weights.slice_of(name) for weights in opened]
    num_models = len(slices) - has_base
    state = _State.of(name, slices, settings, num_models)
    for rows in _pieces(tuple(slices[0].get_shape()), piece_numbers):
        stored = [piece[rows] for piece in slices]
        if not stored[0].is_floating_point():
            for other in stored[1:]:
                if not torch.equal(stored[0], other):
                    why = f"tensor {name} holds {stored[0].dtype}, which is not merged, and differs between models"
                    raise ModelRejected(Reason.MODEL_UNSUPPORTED, why)
            yield [*stored, stored[0]]
            continue
        numbers = [tensor.to(_precise(stored[0].dtype)) for tensor in stored]
        base = numbers[-1] if has_base else None
        yield [*stored, state.merged(base, numbers[:num_models])]


@dataclass(frozen=True, slots=True)
class _State:
    """What a method must know of a whole tensor."""

    settings: MergeSettings
    scales: tuple[float, ...]
    generators: Sequence[torch.Generator] = ()
    thresholds: Sequence[float] = ()

    @classmethod
    def of(cls, name: str, slices: Sequence[Any], settings: MergeSettings, num_models: int) -> _State:
        scales = settings.for_models(num_models)
        if settings.method is MergeMethod.DARE:
            generators = [methods.generator_for(settings.seed, name, index) for index in range(num_models)]
            return cls(settings, scales, generators=generators)
        if settings.method is MergeMethod.TIES and "F" in slices[0].get_dtype():
            thresholds = [_threshold(piece, slices[-1], settings.density) for piece in slices[:num_models]]
            return cls(settings, scales, thresholds=thresholds)
        return cls(settings, scales)

    def merged(self, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
        """One piece of the tensor."""
        if base is None:
            return methods.average(models, self.scales)
        match self.settings.method:
            case MergeMethod.DARE:
                return methods.dare(base, models, self.scales, self.settings.drop_rate, self.generators)
            case MergeMethod.TIES:
                return methods.ties(base, models, self.scales, self.thresholds)
            case _:
                return methods.task_arithmetic(base, models, self.scales)


def _threshold(model: Any, base: Any, density: float) -> float:
    of_model, of_base = model[...], base[...]
    precise = _precise(of_model.dtype)
    return methods.trim_threshold(of_model.to(precise) - of_base.to(precise), density)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


def _pieces(shape: tuple[int, ...], piece_numbers: int) -> Iterator[Any]:
    """Indices that cut a tensor along its first axis into parts of about `piece_numbers`."""
    if not shape:
        yield ...
        return
    row = max(1, torch.Size(shape[1:]).numel())
    step = max(1, piece_numbers // row)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _stored(merged: Tensor, dtype: torch.dtype, name: str, folders: Sequence[ModelFolder]) -> Tensor:
    stored = merged.to(dtype)
    if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
        paths = ", ".join(str(folder.path) for folder in folders)
        raise ModelRejected(
            Reason.MODEL_BROKEN,
            f"tensor {name} merged from {paths} holds numbers that are not finite in {dtype}",
        )
    return stored


def _note_tensor(hashers: Sequence[Any], name: str, place: TensorPlace) -> None:
    for hasher in hashers:
        hasher.update(f"{name} {list(place.shape)}\n".encode())


def _note_pieces(hashers: Sequence[Any], pieces: Sequence[Tensor]) -> None:
    for hasher, piece in zip(hashers, pieces, strict=True):
        hasher.update(raw_bytes(piece))


def _count(place: TensorPlace) -> int:
    return torch.Size(place.shape).numel()


def _write_rest(
    folders: Sequence[ModelFolder],
    names: Sequence[str],
    settings: MergeSettings,
    digests: Sequence[str],
    staged: Path,
    has_base: bool,
) -> None:
    first = folders[0]
    for file in first.files_beside_weights():
        shutil.copyfile(file, staged / file.name)
    _write_index(first, names, staged)
    facts = _facts(folders, settings, digests, has_base)
    (staged / MERGE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for path in staged.iterdir():
        sync(path)
    sync(staged)


def _write_index(first: ModelFolder, names: Sequence[str], staged: Path) -> None:
    """The first model's index without what was left out of the merged weights."""
    source = first.path / INDEX_FILE
    if not source.is_file():
        return
    index = json.loads(source.read_text(encoding="utf-8"))
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in names}
    (staged / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _facts(
    folders: Sequence[ModelFolder], settings: MergeSettings, digests: Sequence[str], has_base: bool
) -> dict[str, Any]:
    method, num_models = settings.method, len(folders) - has_base
    numbers: dict[str, Any] = {"scales": list(settings.for_models(num_models))}
    if method is MergeMethod.DARE:
        numbers |= {"drop_rate": settings.drop_rate, "seed": settings.seed}
    if method is MergeMethod.TIES:
        numbers |= {"density": settings.density}
    named = [
        {"name": folder.path.resolve().name, "weights_sha256": digest}
        for folder, digest in zip(folders, digests, strict=False)
    ]
    return {
        "method": method.value,
        **numbers,
        "models": named[:num_models],
        "base": named[-1] if has_base else None,
        "weights_sha256": digests[-1],
        "code_version": __version__,
    }
