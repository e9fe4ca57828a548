"""Our own forward of the known families computes what transformers' module does, on the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fusionroute.engine import LoadedModel, prepare_model
from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.decoder import Decoder
from fusionroute.engine.kv_cache import SessionCache
from fusionroute.engine.module_forward import ModuleForward
from fusionroute.errors import InvalidRequest
from tests.tiny_models import MAX_CONTEXT, WIDTH, eager_rows, tiny_model, word_tokenizer

FAMILIES = ["gemma2", "llama", "qwen2", "qwen3"]


def prepared(model: PreTrainedModel, **changes: Any) -> LoadedModel:
    return prepare_model(model, word_tokenizer(), name="tiny", epoch=1, **changes)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_hidden_states_are_those_of_the_module(family: str) -> None:
    """Two sessions in uneven chunks, longer than any window, some columns wanted."""
    loaded, reference = prepared(tiny_model(family), heads=lambda hidden: hidden), tiny_model(family)
    assert isinstance(loaded._network, Decoder)
    rng = random.Random(family)
    texts = [[rng.randrange(WIDTH) for _ in range(40)] for _ in range(2)]
    reference.set_attn_implementation("eager")
    hidden = [reference.model(torch.tensor([text])).last_hidden_state[0] for text in texts]
    rows = [eager_rows(reference, text) for text in texts]
    caches = [SessionCache(MAX_CONTEXT), SessionCache(MAX_CONTEXT)]
    for start, stop in ((0, 1), (1, 19), (19, 20), (20, 40)):
        count = stop - start
        segments = [Segment(cache, start, i * count, (i + 1) * count) for i, cache in enumerate(caches)]
        tokens, positions = texts[0][start:stop] + texts[1][start:stop], [*range(start, stop)] * 2
        for wanted in ([0, 2 * count - 1], list(range(2 * count)), []):
            output = loaded.forward(RaggedBatch(segments), tokens, positions, wanted)
            places = [(column // count, start + column % count) for column in wanted]
            assert output.rows.shape == (len(wanted), WIDTH)
            assert output.head_scores is not None
            for row, state, (text, position) in zip(output.rows, output.head_scores, places, strict=True):
                torch.testing.assert_close(row, rows[text][position], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(state, hidden[text][position], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_keep_names_and_numbers_and_are_stored_once(family: str) -> None:
    model, untouched = tiny_model(family), tiny_model(family).state_dict()
    loaded = prepared(model)
    state = model.state_dict()
    assert list(state) == list(untouched)
    assert all(torch.equal(state[name], untouched[name]) for name in state)
    first = loaded._network._layers[0]  # type: ignore[attr-defined]
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for fused, parts in (
        (first._qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (first._gate_up, (mlp.gate_proj, mlp.up_proj)),
    ):
        storages = {part.weight.untyped_storage().data_ptr() for part in parts}
        assert storages == {fused.untyped_storage().data_ptr()}
        assert fused.shape[0] == sum(part.weight.shape[0] for part in parts)


def test_a_model_that_was_prepared_can_be_saved_and_trained(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    prepared(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    model.set_attn_implementation("eager")
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_model_prepared_within_inference_mode_works_too() -> None:
    with torch.inference_mode():
        assert isinstance(prepared(tiny_model("llama"))._network, Decoder)


def test_a_module_that_computes_something_else_keeps_its_own_forward() -> None:
    """Its first layer looks like any other; the check at load finds the second one's activation."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    assert isinstance(prepared(model)._network, ModuleForward)


def test_a_module_with_hooks_or_maps_of_its_own_keeps_its_own_forward() -> None:
    class Louder(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked, patched = tiny_model("llama"), tiny_model("llama")
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    patched.model.layers[2].self_attn.o_proj.__class__ = Louder
    assert isinstance(prepared(hooked)._network, ModuleForward)
    assert isinstance(prepared(patched)._network, ModuleForward)


def test_exact_rows_are_refused_where_the_module_computes() -> None:
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda *_: None)
    batch = RaggedBatch([Segment(SessionCache(1), 0, 0, 1)])
    with pytest.raises(InvalidRequest, match=r"exact = True.*'tiny'"):
        prepared(model).forward(batch, [3], [0], [0], exact=True)


def test_rotary_angles_do_not_depend_on_how_far_others_have_got() -> None:
    """Read in jumps over several blocks of the table, and from the start on."""
    long = {"max_position_embeddings": 5000, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    jumping, plain = (prepared(tiny_model("llama", **long))._network._rotary for _ in range(2))  # type: ignore[attr-defined]
    positions = [4999, 0, 1023, 1024, 2048, 17]
    cos, sin = jumping.at(positions)
    for index, position in enumerate(positions):
        alone = plain.at([position])
        assert torch.equal(alone[0][0], cos[index]) and torch.equal(alone[1][0], sin[index])
    reference = tiny_model("llama", **long).model.rotary_emb
    wanted = reference(torch.zeros(1), torch.tensor([positions]))
    torch.testing.assert_close(cos[:, 0], wanted[0][0])
    half = cos.shape[-1] // 2
    torch.testing.assert_close(sin[:, 0, half:], wanted[1][0, :, half:])
    torch.testing.assert_close(sin[:, 0, :half], -wanted[1][0, :, :half])
