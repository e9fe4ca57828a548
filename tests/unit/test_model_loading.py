"""Which models are taken, which are refused, and what the refusal says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fusionroute.engine import load_model, prepare_model
from fusionroute.errors import ModelRejected, Reason
from fusionroute.vocabulary import load_tokenizer, logits_width, tokenizer_fingerprint
from tests.tiny_models import WIDTH, save_tiny_model, tiny_model, word_tokenizer

SMALL = {"vocab_size": WIDTH, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def rejection(path: str | Path) -> ModelRejected:
    with pytest.raises(ModelRejected) as caught:
        load_model(str(path))
    return caught.value


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "qwen3"])
def test_supported_families_load_and_say_what_they_are(tmp_path: Path, family: str) -> None:
    facts = load_model(str(save_tiny_model(tmp_path, family))).facts
    assert (facts.family, facts.logits_width, facts.dtype) == (family, WIDTH, "float32")
    assert facts.max_context_tokens == 96
    assert facts.epoch > 1_700_000_000_000


def test_a_model_computes_in_the_number_format_asked_for(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny_model(tmp_path)), dtype="bfloat16")
    assert loaded.facts.dtype == "bfloat16"
    assert loaded.model.dtype is torch.bfloat16


def test_a_family_outside_the_list_is_taken_when_its_logits_equal_eager_ones(tmp_path: Path) -> None:
    config = MistralConfig(
        **SMALL, num_key_value_heads=1, intermediate_size=24, sliding_window=8, eos_token_id=1
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).facts.family == "mistral"


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_families_that_keep_their_past_elsewhere_are_refused_by_name(tmp_path: Path, family: str) -> None:
    """Bloom's attention goes by a mask of the whole batch, Mamba has no attention at all."""
    if family == "bloom":
        BloomForCausalLM(BloomConfig(vocab_size=WIDTH, hidden_size=16, n_layer=2, n_head=2)).save_pretrained(
            tmp_path
        )
    else:
        MambaForCausalLM(
            MambaConfig(vocab_size=WIDTH, hidden_size=16, num_hidden_layers=2, state_size=4)
        ).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    error = rejection(tmp_path)
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert f"{family!r}" in error.message
    assert "gemma2, llama, qwen2, qwen3" in error.message


def test_learned_positions_work_where_they_are_given(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=WIDTH, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).facts.family == "gpt2"


def test_rotary_angles_that_depend_on_the_batch_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    error = rejection(save_tiny_model(tmp_path, rope_parameters=rope))
    assert error.reason is Reason.MODEL_UNSUPPORTED
    assert "dynamic" in error.message


def test_nan_weights_are_refused_at_load(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    error = rejection(tmp_path)
    assert error.reason is Reason.MODEL_BROKEN
    assert "not finite" in error.message
    assert str(tmp_path) in error.message


def test_files_may_be_overwritten_while_their_model_serves(tmp_path: Path) -> None:
    loaded = load_model(str(save_tiny_model(tmp_path / "m", "llama")))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    weights = [tensor.clone() for tensor in loaded.model.state_dict().values()]
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    assert all(map(torch.equal, weights, loaded.model.state_dict().values()))
    embedded = loaded.model.get_input_embeddings().weight
    assert not loaded.model.config.tie_word_embeddings or embedded is loaded.model.get_output_embeddings().weight


def test_a_missing_folder_is_named() -> None:
    error = rejection("/nowhere/at/all")
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert "/nowhere/at/all" in error.message


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    error = rejection(tmp_path)
    assert error.reason is Reason.MODEL_BROKEN
    assert str(tmp_path) in error.message


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    error = rejection(tmp_path)
    assert error.reason is Reason.MODEL_BROKEN
    assert "model.layers.1.self_attn.q_proj.weight" in error.message


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    assert rejection(tmp_path).reason is Reason.MODEL_BROKEN


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    word_tokenizer(WIDTH + 4).save_pretrained(tmp_path)
    error = rejection(tmp_path)
    assert error.reason is Reason.VOCABULARY_MISMATCH
    assert str(WIDTH) in error.message
    assert str(WIDTH + 4) in error.message


def test_padding_columns_beyond_the_tokenizer_are_cut_off() -> None:
    model = tiny_model("llama", vocab_size=WIDTH + 3)
    assert prepare_model(model, word_tokenizer(), name="padded").facts.logits_width == WIDTH


def test_other_weights_have_another_fingerprint_and_the_same_ones_the_same() -> None:
    first = prepare_model(tiny_model("llama"), word_tokenizer(), name="a").facts
    again = prepare_model(tiny_model("llama"), word_tokenizer(), name="b").facts
    other = prepare_model(tiny_model("llama", seed=1), word_tokenizer(), name="a").facts
    assert first.weights_fingerprint == again.weights_fingerprint != other.weights_fingerprint


def test_tokenizers_with_the_same_ids_have_the_same_fingerprint() -> None:
    assert tokenizer_fingerprint(word_tokenizer()) == tokenizer_fingerprint(word_tokenizer())
    assert tokenizer_fingerprint(word_tokenizer()) != tokenizer_fingerprint(word_tokenizer(WIDTH + 1))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_models_family_adds_nothing_to_a_generic_tokenizer(tmp_path: Path, family: str) -> None:
    tokenizer = load_tokenizer(str(save_tiny_model(tmp_path, family)))
    assert logits_width(tokenizer) == WIDTH
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(word_tokenizer())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
