"""A router checkpoint: a causal LM, the heads that route and gate, and the manifest that says for which experts.

folder/
    config.json, model.safetensors, tokenizer files      as `save_pretrained` writes them
    routing_head.safetensors                             routing.*, and where trained gate.*, sum_gate.*, and of gates
                                                         with a hidden layer gate_hidden.*, sum_gate_hidden.*
    fusionroute.json                                     the manifest
    COMPLETE                                             written last; without it the folder is not a checkpoint;
                                                         holds the checkpoint's fingerprint
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fusionroute.errors import FusionRouteError, ModelRejected, Reason
from fusionroute.fusion import CombineRule
from fusionroute.manifest import COMPLETE_FILE, HEAD_FILE, MANIFEST_FILE, ExpertRecord, Manifest
from fusionroute.router_heads import Heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "COMPLETE_FILE",
    "HEAD_FILE",
    "MANIFEST_FILE",
    "ExpertRecord",
    "Heads",
    "Manifest",
    "RouterCheckpoint",
    "load_checkpoint",
    "save_checkpoint",
]


@dataclass(frozen=True, slots=True)
class RouterCheckpoint:
    """A checkpoint's heads and manifest; its causal LM is loaded from `folder` like any other."""

    folder: Path
    manifest: Manifest
    heads: Heads
    head_digest: str

    def fingerprint(self, weights_fingerprint: str) -> str:
        """Digest of heads, manifest and the weights of the causal LM."""
        return _fingerprint(self.head_digest, weights_fingerprint)

    def available_rules(self, *, has_base: bool = False) -> tuple[CombineRule, ...]:
        """The combine rules that its heads can serve; with a base model beside the experts, `proxy` too."""
        return self.heads.layout.available_rules(has_base=has_base)


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heads: Heads,
    manifest: Manifest,
) -> None:
    """Writes a checkpoint beside `folder` and moves it there once it is whole, replacing what was there.

    Raises:
        ValueError: heads and manifest do not fit each other or the model.
    """
    from safetensors.torch import save_file

    from fusionroute.engine.model import weights_fingerprint

    Heads.from_tensors(heads.tensors(), len(manifest.experts), model.config.hidden_size)
    Manifest.from_json(manifest.to_json())
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        staged = Path(name) / "checkpoint"
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        save_file(heads.tensors(), staged / HEAD_FILE)
        (staged / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        staged.chmod(0o755)
        for path in staged.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which a container's other user could not read
            _sync(path)
        fingerprint = _fingerprint(_head_digest(staged), weights_fingerprint(model))
        (staged / COMPLETE_FILE).write_text(fingerprint + "\n", encoding="ascii")
        _sync(staged / COMPLETE_FILE)
        _sync(staged)
        if target.exists():
            target.rename(Path(name) / "replaced")
        staged.rename(target)
        _sync(target.parent)


def load_checkpoint(folder: str | Path) -> RouterCheckpoint:
    """Reads heads and manifest, strictly.

    Raises:
        ModelRejected: MODEL_NOT_FOUND, CHECKPOINT_INCOMPLETE or MODEL_BROKEN, naming folder and fault.
    """
    from safetensors.torch import load_file

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ModelRejected(
            Reason.MODEL_NOT_FOUND, f"router checkpoint folder {str(folder)!r} does not exist"
        )
    for name in (COMPLETE_FILE, MANIFEST_FILE, HEAD_FILE, "config.json"):
        if not (path / name).is_file():
            raise ModelRejected(
                Reason.CHECKPOINT_INCOMPLETE,
                f"{str(folder)!r} is not a complete router checkpoint: it lacks {name}",
            )
    try:
        text = (path / MANIFEST_FILE).read_text(encoding="utf-8")
        manifest = Manifest.from_json(text)
        hidden_size = json.loads((path / "config.json").read_text(encoding="utf-8"))["hidden_size"]
        heads = Heads.from_tensors(load_file(path / HEAD_FILE), len(manifest.experts), hidden_size)
    except FusionRouteError:
        raise
    except Exception as error:
        raise ModelRejected(
            Reason.MODEL_BROKEN, f"router checkpoint {str(folder)!r}: {type(error).__name__}: {error}"
        ) from error
    checkpoint = RouterCheckpoint(path, manifest, heads, head_digest=_head_digest(path))
    if CombineRule(manifest.combine) not in checkpoint.available_rules():
        raise ModelRejected(
            Reason.MODEL_BROKEN,
            f"router checkpoint {str(folder)!r}: combine {manifest.combine!r} needs a gate it lacks",
        )
    return checkpoint


def _fingerprint(head_digest: str, weights_fingerprint: str) -> str:
    return hashlib.sha256(f"{head_digest}:{weights_fingerprint}".encode()).hexdigest()[:32]


def _head_digest(folder: Path) -> str:
    hasher = hashlib.sha256()
    for name in (HEAD_FILE, MANIFEST_FILE, "config.json"):
        hasher.update((folder / name).read_bytes())
    return hasher.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
