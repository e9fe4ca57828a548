"""What a router checkpoint says about itself, readable without loading any of its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusionroute.fusion import CombineRule

MANIFEST_FORMAT = 1
HEAD_FILE = "routing_head.safetensors"
MANIFEST_FILE = "fusionroute.json"
COMPLETE_FILE = "COMPLETE"


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """An expert as the checkpoint knows it; its place in the manifest is its index in the heads."""

    slot: str
    name: str
    tokenizer_fingerprint: str
    logits_width: int
    weights_fingerprint: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """For which experts a checkpoint routes, and where it comes from.

    Attributes:
        experts: in the order of the heads' outputs.
        combine: the rule used when a request names none.
        tokenizer_fingerprint: of the vocabulary shared by router and experts.
        logits_width: of that vocabulary.
        lineage: parents and data it was trained from.
        switches: the training's switches.
        metrics: what was measured of it.
        code_version: of the code that wrote it.
    """

    experts: tuple[ExpertRecord, ...]
    combine: str
    tokenizer_fingerprint: str
    logits_width: int
    lineage: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    code_version: str = ""
    format: int = MANIFEST_FORMAT

    @property
    def slots(self) -> tuple[str, ...]:
        """The experts' slots in order."""
        return tuple(expert.slot for expert in self.experts)

    def to_json(self) -> str:
        """The text of `fusionroute.json`."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads what `to_json` wrote. Raises ValueError, KeyError or TypeError where it is not that."""
        content = json.loads(text)
        if content.get("format") != MANIFEST_FORMAT:
            raise ValueError(f"format = {content.get('format')!r}, this version reads {MANIFEST_FORMAT}")
        content["experts"] = tuple(ExpertRecord(**expert) for expert in content["experts"])
        manifest = cls(**content)
        if not manifest.experts:
            raise ValueError("experts = [] is empty")
        if len(set(manifest.slots)) != len(manifest.slots):
            raise ValueError(f"slots are not distinct: {', '.join(manifest.slots)}")
        CombineRule(manifest.combine)
        return manifest


def written_fingerprint(folder: str | Path) -> str:
    """The fingerprint of a checkpoint in the number format of its files, as its writer knew it; empty when not told."""
    try:
        return (Path(folder) / COMPLETE_FILE).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
