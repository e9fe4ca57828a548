"""The benchmark's in-process reference equals a loop without caches; its arithmetic adds up."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.bench_decode import Report, Speed, shares
from evaluation.bench_reference import CachedFusion, CachedModel, generate_with_one
from fusionroute.v1.router_pb2 import GenerationStatistics

PROMPT = [3, 1, 4, 1, 5]


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, initializer_range=0.5, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def without_cache(router, experts, weight, bias, num_tokens):
    ids, chosen = list(PROMPT), []
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = router(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            chosen.append(int(torch.argmax(weight @ output.hidden_states[-1][0, -1] + bias)))
            logits = experts[chosen[-1]](torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(torch.argmax(logits + output.logits[0, -1])))
    return ids[len(PROMPT) :], chosen


def test_the_cached_reference_equals_a_loop_without_caches_across_expert_switches() -> None:
    router, experts = tiny(0), [tiny(1), tiny(2), tiny(3)]
    weight, bias = torch.randn(3, 16), torch.zeros(3)
    fusion = CachedFusion(CachedModel(router), [CachedModel(expert) for expert in experts], weight, bias)
    expected, chosen = without_cache(router, experts, weight, bias, 24)
    assert len(set(chosen)) == 3, "the case must make experts catch up"
    for _ in range(2):
        assert fusion.generate(PROMPT, 24) == expected
        assert fusion.chosen == chosen


def test_generate_with_one_gives_exactly_as_many_tokens_as_asked() -> None:
    assert len(generate_with_one(tiny(1), PROMPT, 9)) == 9


def turn(total: float) -> GenerationStatistics:
    return GenerationStatistics(
        total_seconds=total, router_seconds=0.25, expert_seconds=0.5, expert_forward_seconds=0.375,
        fuse_seconds=0.0625, store_seconds=0.03125,
    )  # fmt: skip


def test_the_parts_of_a_served_token_add_up_to_the_total_of_the_median_turn() -> None:
    parts = shares([turn(9.0), turn(1.0), turn(2.0)], num_tokens=1000)
    assert parts["total"] == pytest.approx(2.0)
    assert parts["wire"] == pytest.approx(0.125)
    assert sum(value for name, value in parts.items() if name != "total") == pytest.approx(2.0)


def test_the_report_gives_medians() -> None:
    report = Report({"cpu": "x"}, (Speed("served", (3.0, 1.0, 2.0)),), {"total": 2.0}, 64)
    assert report.to_json()["ms_per_token"][0]["median"] == 2.0
