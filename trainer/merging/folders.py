"""Folders of models that are to be merged: which tensors they hold, and whether they fit each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fusionroute.errors import ModelRejected, Reason
from fusionroute.vocabulary import load_tokenizer, tokenizer_fingerprint

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OUTPUT_EMBEDDING = "lm_head.weight"
"""What a model that shares it with its input embedding may leave out."""

_MUST_BE_EQUAL = ("model_type", "architectures", "vocab_size", "tie_word_embeddings", "quantization_config")
_EXCEPT_WEIGHTS = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "chat_template*"),
)


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies and what it is.

    Attributes:
        file: its name within the folder.
        dtype: as safetensors writes it, for example ``BF16``.
        shape: of the tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A causal LM in a local folder, its weights in safetensors.

    Attributes:
        path: the folder.
        config: its config.json.
        tensors: by name.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorPlace]

    @classmethod
    def open(cls, path: Path | str) -> ModelFolder:
        """Reads configuration and headers, no weights.

        Raises:
            ModelRejected: MODEL_NOT_FOUND or MODEL_BROKEN, naming folder and file.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ModelRejected(Reason.MODEL_NOT_FOUND, f"model folder {str(path)!r} does not exist")
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            tensors = {}
            for file in _weight_files(folder):
                with safe_open(folder / file, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 - not a mapping
                        piece = weights.get_slice(name)
                        tensors[name] = TensorPlace(file, piece.get_dtype(), tuple(piece.get_shape()))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelRejected(Reason.MODEL_BROKEN, f"model folder {str(path)!r}: {error}") from error
        return cls(folder, config, tensors)

    def files_beside_weights(self) -> list[Path]:
        """Configuration and tokenizer: what makes weights a model."""
        return sorted(
            {file for pattern in _EXCEPT_WEIGHTS for file in self.path.glob(pattern) if file.is_file()}
        )

    def shards(self) -> dict[str, list[str]]:
        """Names of tensors by file, as they lie in it."""
        files: dict[str, list[str]] = {}
        for name, place in self.tensors.items():
            files.setdefault(place.file, []).append(name)
        return files


class OpenWeights:
    """Tensors of a folder, mapped into memory; a context manager."""

    def __init__(self, folder: ModelFolder) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> OpenWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def slice_of(self, name: str) -> Any:
        """A tensor as something that is read where it is indexed."""
        file = self._folder.tensors[name].file
        if file not in self._files:
            opened = safe_open(self._folder.path / file, framework="pt")
            self._files[file] = self._stack.enter_context(opened)
        return self._files[file].get_slice(name)


def common_tensors(folders: Sequence[ModelFolder]) -> list[str]:
    """Names of the tensors of models that can be merged, in the order of the first.

    Raises:
        ModelRejected: MODEL_UNSUPPORTED or VOCABULARY_MISMATCH, naming two models and the field or tensor in which they
            differ.
    """
    first = folders[0]
    for other in folders[1:]:
        _check_config(first, other)
        _check_tokenizer(first, other)
        _check_tensors(first, other)
        _check_tensors(other, first)
    return [name for name in first.tensors if all(name in folder.tensors for folder in folders)]


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if strangers := [file for file in files if Path(file).name != file]:
            raise ValueError(f"{INDEX_FILE} names {strangers[0]!r}, which is not in the folder")
        return sorted(files)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"neither {WEIGHTS_FILE} nor {INDEX_FILE} is there; only safetensors are read")
    return [WEIGHTS_FILE]


def _check_config(first: ModelFolder, other: ModelFolder) -> None:
    for field in _MUST_BE_EQUAL:
        mine, theirs = first.config.get(field), other.config.get(field)
        if mine != theirs:
            raise _unlike(
                first, other, f"{field} {mine!r} and {theirs!r}", is_vocabulary=field == "vocab_size"
            )
    if "quantization_config" in first.config:
        raise ModelRejected(
            Reason.MODEL_UNSUPPORTED,
            f"model {str(first.path)!r} is quantised; only plain weights can be merged",
        )


def _check_tokenizer(first: ModelFolder, other: ModelFolder) -> None:
    mine, theirs = (tokenizer_fingerprint(load_tokenizer(str(folder.path))) for folder in (first, other))
    if mine != theirs:
        raise _unlike(first, other, f"tokenizer fingerprints {mine} and {theirs}", is_vocabulary=True)


def _check_tensors(first: ModelFolder, other: ModelFolder) -> None:
    for name, place in first.tensors.items():
        theirs = other.tensors.get(name)
        if theirs is None:
            if name == OUTPUT_EMBEDDING and first.config.get("tie_word_embeddings"):
                continue
            raise _unlike(first, other, f"tensor {name}, which only the first has")
        if theirs.shape != place.shape:
            raise _unlike(
                first, other, f"tensor {name} of shapes {list(place.shape)} and {list(theirs.shape)}"
            )


def _unlike(
    first: ModelFolder, other: ModelFolder, what: str, *, is_vocabulary: bool = False
) -> ModelRejected:
    reason = Reason.VOCABULARY_MISMATCH if is_vocabulary else Reason.MODEL_UNSUPPORTED
    return ModelRejected(
        reason, f"models {str(first.path)!r} and {str(other.path)!r} cannot be merged: they have {what}"
    )
