"""Random families for benchmarks are families like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.bench_deepened import write_deepened
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
    records = [record.weights_fingerprint for record in checkpoint.manifest.experts]
    assert records == [each.weights_fingerprint for each in facts[1:]], "written without being loaded"
    fusion = CachedFusion.load(family.router, family.experts)
    answer = fusion.generate(ids, 40)
    assert len(set(fusion.chosen)) > 1
    assert len(set(answer)) > 8, "no loop of one token"


def test_a_family_has_as_many_experts_as_wanted_and_a_smaller_router_with_gates(tmp_path: Path) -> None:
    small = replace(SHAPE, hidden=16, layers=1)
    family = write_family(tmp_path, SHAPE, "float32", num_experts=5, router_shape=small, with_gates=True)
    checkpoint = load_checkpoint(family.router)
    assert len(family.experts) == len(checkpoint.manifest.experts) == 5
    assert checkpoint.heads.layout.has_gate and checkpoint.heads.layout.has_sum_gate
    assert checkpoint.heads.routing_weight.shape == (5, 16)


def test_prompts_of_different_numbers_share_no_beginning() -> None:
    for number in range(1, 8):
        assert prompt(SHAPE, number=number)[0] != prompt(SHAPE, number=0)[0]


def test_keys_and_values_are_counted_as_the_model_keeps_them() -> None:
    # two layers, two key-value heads of size 8, keys and values of two bytes
    assert SHAPE.kv_bytes_per_token("bfloat16") == 2 * 2 * 2 * 8 * 2


def test_deeper_experts_write_the_same_and_cost_more_layers(tmp_path: Path) -> None:
    family = write_family(tmp_path / "shallow", SHAPE, "float32")
    experts = {slot: str(path) for slot, path in family.experts.items()}
    deep = write_deepened(tmp_path / "deep", str(family.router), experts, times=4)
    ids = prompt(SHAPE)
    shallow_fusion = CachedFusion.load(family.router, family.experts)
    deep_fusion = CachedFusion.load(deep.router, deep.experts)
    assert deep_fusion.generate(ids, 12) == shallow_fusion.generate(ids, 12)
    for shallow_expert, deep_expert in zip(shallow_fusion.experts, deep_fusion.experts, strict=True):
        logits = [model.model(torch.tensor([ids])).logits for model in (shallow_expert, deep_expert)]
        assert torch.equal(*logits), "the added layers change nothing"
    assert deep_fusion.experts[0].model.config.num_hidden_layers == 8
    records = load_checkpoint(deep.router).manifest.experts
    loaded = [load_model(str(deep.experts[record.slot])).facts.weights_fingerprint for record in records]
    assert [record.weights_fingerprint for record in records] == loaded
