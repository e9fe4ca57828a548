"""What the lab's evaluation compares the family with: which variants there are, what each needs, where it lies.

    <family>.variants/<name>-<digest>/
        <name>/          a router checkpoint, or a causal LM folder
        facts.json       seconds, metrics
        COMPLETE         written last

How each is made: `variant_stage`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from fusionroute.errors import invalid
from trainer.lab_family.cache import digest_of_sources
from trainer.lab_family.recipe import EXPERT_SLOTS, Recipe

SINGLE_STARTS = ("base", *EXPERT_SLOTS)

# CPU seconds of one step at full size: only their proportions count
_CDPO_STEP, _NORMALISED_STEP, _SFT_STEP, _EXPERT_ANSWERS, _MERGE = 0.11, 0.18, 0.05, 4.0, 0.5


class VariantKind(Enum):
    """What a variant is on disk."""

    ROUTER = "router checkpoint"
    MODEL = "causal LM, fine-tuned"
    MERGE = "causal LM, merged"
    PREPARATION = "what others need"


@dataclass(frozen=True, slots=True)
class Variant:
    """One of them.

    Attributes:
        name: of its folder and in tables.
        kind: what it is.
        meaning: in one line.
        after: the variant that it is made from.
    """

    name: str
    kind: VariantKind
    meaning: str
    after: str | None = None


ALL_GOLD_LABELS = "all_gold_labels"

_ROUTERS = {
    "cdpo_bias0": "phase II as plain DPO: cdpo.bias_scale 0",
    "cdpo_normalised": "phase II on the normalised product: cdpo.policy normalised",
    "cdpo_mean_bias": "phase II with the bias per token: cdpo.bias_reduction mean",
    "cdpo_frozen_routes": "phase II with the routes of phase I: cdpo.routes frozen",
    "cdpo_pairs_only": "phase II without SFT rows: mixed.sft_rows_per_pair 0",
    "cdpo_expert_pairs": "phase II on as many pairs whose rejected answers are those of single experts",
    "sft_continued": "phase I longer: as many SFT steps as phase II has, at its rates",
    "sft_all_gold": "phase I on the gold answers of the pairs too, as many epochs",
    "sft_all_tokens": "phase I with L_expert on all targets: sft.tokens all",
    "sft_from_base": "phase I from the base instead of an expert",
}
_MERGES = {
    "merge_average": "mean of the experts' weights",
    "merge_task_0.5": "task arithmetic, scale 0.5",
    "merge_task_1.0": "task arithmetic, scale 1",
    "merge_dare": "task arithmetic, scale 0.5, half of the differences dropped",
    "merge_ties": "TIES, scale 1, a fifth of the differences kept",
}


def _all() -> Iterable[Variant]:
    yield Variant(ALL_GOLD_LABELS, VariantKind.PREPARATION, "labels of all gold answers")
    for name, meaning in _ROUTERS.items():
        after = ALL_GOLD_LABELS if name == "sft_all_gold" else None
        yield Variant(name, VariantKind.ROUTER, meaning, after)
    for start in SINGLE_STARTS:
        meaning = f"one model from {start} on the router's data, L_LM alone, steps and rates of phase I"
        yield Variant(f"single_from_{start}", VariantKind.MODEL, meaning)
    for start in SINGLE_STARTS:
        meaning = (
            f"one model from {start} on the router's data and the gold answers of the pairs, as many epochs"
        )
        yield Variant(f"single_all_gold_from_{start}", VariantKind.MODEL, meaning, ALL_GOLD_LABELS)
    meaning = "single_from_format after plain DPO on the family's pairs, mixed with gold answers"
    yield Variant("single_dpo", VariantKind.MODEL, meaning, "single_from_format")
    for name, meaning in _MERGES.items():
        yield Variant(name, VariantKind.MERGE, meaning)


_KNOWN = {variant.name: variant for variant in _all()}

VARIANTS = {name: variant for name, variant in _KNOWN.items() if variant.kind is not VariantKind.PREPARATION}
"""All that may be asked for, in the order in which tables show them."""


def with_needed(names: Iterable[str]) -> list[str]:
    """The variants of these names and those that they are made from, each before what needs it.

    Raises:
        InvalidRequest: INVALID_FIELD, a name is unknown.
    """
    needed: dict[str, None] = {}
    for name in names:
        if name not in VARIANTS:
            raise invalid("variants", name, f"one of {', '.join(VARIANTS)}")
        if (after := VARIANTS[name].after) is not None:
            needed[after] = None
        needed[name] = None
    order = list(_KNOWN)
    return sorted(needed, key=order.index)


def needs(name: str) -> str | None:
    """The variant that this one is made from, if any."""
    return _KNOWN[name].after


def variant_folder(family: Path, name: str) -> Path:
    """Where a family's variant lies, or will lie; `variant_folder(...) / name` is the model itself."""
    digest = hashlib.sha256(f"{family.name} {name} {_code_digest()}".encode()).hexdigest()[:12]
    return variants_folder(family) / f"{name}-{digest}"


def variants_folder(family: Path) -> Path:
    """Where all variants of a family lie."""
    return family.with_name(f"{family.name}.variants")


def num_steps(name: str, recipe: Recipe) -> int:
    """Steps that are reported of a variant; of those whose data decide it, about so many."""
    if name.startswith("merge_") or name == ALL_GOLD_LABELS:
        return 1
    if name.startswith("cdpo_") or name in ("sft_continued", "single_dpo"):
        return recipe.preferences.num_steps
    return all_gold_steps(recipe) if "all_gold" in name else recipe.router.num_steps


def all_gold_steps(recipe: Recipe) -> int:
    """Steps over router items and pair prompts in as many epochs as phase I makes of its items."""
    num_items = recipe.num_router_items + recipe.num_pair_prompts
    return round(recipe.router.num_steps * num_items / recipe.num_router_items)


def seconds(name: str, recipe: Recipe) -> float:
    """About how many CPU seconds a variant takes at full size; only proportions count."""
    steps = num_steps(name, recipe)
    if name.startswith("merge_"):
        return _MERGE
    if name == ALL_GOLD_LABELS:
        return (recipe.num_router_items + recipe.num_pair_prompts) / 1000
    if name == "cdpo_normalised":
        return steps * _NORMALISED_STEP
    if name.startswith("cdpo_") or name == "single_dpo":
        return steps * _CDPO_STEP + (_EXPERT_ANSWERS if name == "cdpo_expert_pairs" else 0.0)
    return steps * _SFT_STEP


def _code_digest() -> str:
    """Of what decides variants beyond what decides families (which is in the family's name)."""
    here = Path(__file__).parent
    files = [here / "variants.py", here / "variant_stage.py", *sorted((here.parent / "merging").glob("*.py"))]
    return digest_of_sources(files)
