"""What labels are of: these experts' opinions about these rows. Labels of another key are of no use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusionroute.router_model import ExpertRecord
from trainer.rows import RowSet

CACHE_VARIABLE = "FUSIONROUTE_CACHE_DIR"
KEY_FORMAT = 1

_DECISIVE = ("tokenizer_fingerprint", "logits_width", "weights_fingerprint")


@dataclass(frozen=True, slots=True)
class LabelKey:
    """Whose opinions about what.

    Attributes:
        experts: in the order of the columns; their names do not matter.
        rows_digest: `RowSet.digest`.
        num_targets: T.
    """

    experts: tuple[ExpertRecord, ...]
    rows_digest: str
    num_targets: int

    @classmethod
    def of(cls, rows: RowSet, experts: Sequence[ExpertRecord]) -> LabelKey:
        """The key of these experts' labels of these rows."""
        return cls(tuple(experts), rows.digest, rows.num_targets)

    @property
    def slots(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(expert.slot for expert in self.experts)

    @property
    def digest(self) -> str:
        """Names the folder in the cache."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:24]

    def to_json(self) -> str:
        """The text of `key.json`."""
        experts = [
            {"slot": expert.slot} | {name: getattr(expert, name) for name in _DECISIVE}
            for expert in self.experts
        ]
        content = {
            "format": KEY_FORMAT,
            "rows_digest": self.rows_digest,
            "num_targets": self.num_targets,
            "experts": experts,
        }
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    def differences(self, found: dict[str, Any]) -> list[str]:
        """What is another in the content of a `key.json`; empty where it is this key."""
        mine = json.loads(self.to_json())
        if found.get("format") != KEY_FORMAT:
            return [f"format is {found.get('format')!r}, wanted {KEY_FORMAT}"]
        differences = [
            f"{name} is {found.get(name)}, wanted {mine[name]}"
            for name in ("rows_digest", "num_targets")
            if found.get(name) != mine[name]
        ]
        theirs = found.get("experts", [])
        slots = [expert.get("slot") for expert in theirs]
        if slots != list(self.slots):
            return [*differences, f"experts are {', '.join(map(str, slots))}, wanted {', '.join(self.slots)}"]
        for expert, other in zip(mine["experts"], theirs, strict=True):
            differences += [
                f"{name} of expert {expert['slot']!r} is {other.get(name)}, wanted {expert[name]}"
                for name in _DECISIVE
                if other.get(name) != expert[name]
            ]
        return differences


def cached_folder(key: LabelKey) -> Path:
    """Where labels lie unless told otherwise: ``$FUSIONROUTE_CACHE_DIR``, else ``~/.cache/fusionroute``."""
    root = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/fusionroute").expanduser()
    return root / "labels" / key.digest
