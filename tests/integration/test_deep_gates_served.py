"""Gates with a hidden layer, served: what the services stream is what the plain loop writes, under every rule."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusionroute.router_model import Heads, load_checkpoint, save_checkpoint
from tests.equivalence import assert_all_equal, compare, make_cases
from tests.served_stack import make_family, served

UNITS = 12


async def test_gates_with_a_hidden_layer_serve_what_the_plain_loop_writes(tmp_path: Path) -> None:
    family = make_family(tmp_path / "family")
    deepen(family.router)
    reference = family.reference()
    cases = [case for case in make_cases(reference, 72) if case.rule in ("gated_sum", "mixture", "select")]
    experts = [token.expert for case in cases for token in case.wanted if case.rule == "select"]
    assert len(set(experts)) >= 3 and None in experts, "several experts and the router alone take part"
    async with served(family) as stack:
        verdict = await compare(cases, stack.answer, 16)
        assert_all_equal(verdict, len(cases))


def deepen(folder: Path) -> None:
    """Gives a checkpoint gates with a hidden layer, of random weights, in place of its linear ones."""
    checkpoint, generator = load_checkpoint(folder), torch.Generator().manual_seed(3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    hidden, num_experts = model.config.hidden_size, len(checkpoint.manifest.experts)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads = Heads(
        checkpoint.heads.routing_weight,
        checkpoint.heads.routing_bias,
        gate_weight=random(num_experts + 1, UNITS) * 0.3,
        gate_bias=torch.zeros(num_experts + 1),
        sum_gate_weight=random(1, UNITS) * 0.1,
        sum_gate_bias=torch.zeros(1),
        gate_hidden_weight=random(UNITS, hidden),
        gate_hidden_bias=random(UNITS),
        sum_gate_hidden_weight=random(UNITS, hidden),
        sum_gate_hidden_bias=random(UNITS),
    )
    save_checkpoint(folder, model, tokenizer, heads, checkpoint.manifest)
