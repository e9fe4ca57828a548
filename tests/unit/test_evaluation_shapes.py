"""Random families for benchmarks are families like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.bench_reference import CachedFusion
from evaluation.bench_shapes import Shape, prompt, write_family
from fusionroute.engine import load_model
from fusionroute.router_model import load_checkpoint

SHAPE = Shape(hidden=32, layers=2, heads=4, key_value_heads=2, intermediate=48, vocabulary=300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_random_family_can_be_served_and_changes_experts(tmp_path: Path, dtype: str) -> None:
    family = write_family(tmp_path, SHAPE, dtype)
    checkpoint = load_checkpoint(family.router)
    assert checkpoint.manifest.slots == tuple(family.experts)
    facts = [load_model(str(path)).facts for path in (family.router, *family.experts.values())]
    assert {(f.dtype, f.logits_width, f.tokenizer_fingerprint) for f in facts} == {
        (dtype, 300, checkpoint.manifest.tokenizer_fingerprint)
    }
    assert len({f.weights_fingerprint for f in facts}) == 4
    ids = prompt(SHAPE)
    assert len(ids) == 64
    assert max(ids) < 300
    fusion = CachedFusion.load(family.router, family.experts)
    fusion.generate(ids, 30)
    assert len(fusion.chosen) == 30
