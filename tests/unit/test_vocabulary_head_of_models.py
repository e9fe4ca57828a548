"""Heads of whole models: those of all families, tied and untied, padded, scaled, with adapters; and what is refused."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from fusionroute.errors import ModelRejected, Reason
from tests.tiny_models import WIDTH, tiny_model
from trainer.vocabulary_head import VocabularyHead, final_hidden

LORA_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft's own use


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_training_through_chunks_gives_the_gradients_of_the_models_own_loss(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    head = VocabularyHead.of(model, WIDTH)
    ids = torch.tensor([[5, 9, 2, 40, 17, 3, 3, 22], [8, 1, 60, 4, 9, 2, 7, 12]])

    hidden = final_hidden(model, ids)[:, :-1].flatten(0, 1)
    head.gold_logprobs(hidden, ids[:, 1:].flatten(), 4).sum().backward()
    chunked = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    rows = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    (-nn.functional.cross_entropy(rows, ids[:, 1:].flatten(), reduction="sum")).backward()

    assert ("lm_head.weight" in chunked) != tied
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def scaled_model(family: str) -> PreTrainedModel:
    sizes = {
        "vocab_size": WIDTH,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if family == "cohere":
        return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.0625))
    return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0))


@pytest.mark.parametrize(("family", "scale"), [("cohere", 0.0625), ("granite", 0.125)])
def test_a_familys_own_scale_of_logits_is_found(family: str, scale: float) -> None:
    model = scaled_model(family)
    head = VocabularyHead.of(model, WIDTH)
    ids = torch.tensor([[5, 9, 2, 40]])
    assert head.scale == scale
    torch.testing.assert_close(head.rows(final_hidden(model, ids)[0]), model(input_ids=ids).logits[0])


def test_a_model_keeps_its_mode_and_its_gradients_while_its_head_is_checked() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    VocabularyHead.of(model, WIDTH)
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_disturb_the_check() -> None:
    VocabularyHead.of(tiny_model("llama", attention_dropout=0.9).train(), WIDTH)


def test_the_head_follows_a_parameter_that_is_exchanged() -> None:
    model = tiny_model("llama")
    head = VocabularyHead.of(model, WIDTH)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    assert head.weight is model.lm_head.weight


def test_a_model_whose_logits_are_no_function_of_its_head_is_refused_by_name() -> None:
    class Doubled(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, **arguments):
            output = super().forward(**arguments)
            output.logits = output.logits * 2
            return output

    model = Doubled(tiny_model("llama").config)
    with pytest.raises(ModelRejected, match=r"Doubled.*llama.*differ") as refused:
        VocabularyHead.of(model, WIDTH)
    assert refused.value.reason is Reason.MODEL_UNSUPPORTED


def with_adapters(target_modules: str | list[str], *, silent: bool):
    peft = import_module("peft")
    config = peft.LoraConfig(
        r=2, target_modules=target_modules, task_type="CAUSAL_LM", init_lora_weights=silent
    )
    return peft.get_peft_model(tiny_model("llama"), config)


@LORA_WARNINGS
def test_a_model_with_adapters_learns_through_chunks_as_through_its_own_loss() -> None:
    model = with_adapters("all-linear", silent=False)
    head = VocabularyHead.of(model, WIDTH)
    ids = torch.tensor([[5, 9, 2, 40, 17, 3, 3, 22]])
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    logprobs = head.gold_logprobs(final_hidden(model, ids)[0, :-1], ids[0, 1:], 4)
    chunked = torch.autograd.grad(logprobs.sum(), list(adapters.values()))
    rows = model(input_ids=ids, use_cache=False).logits[0, :-1]
    plain = torch.autograd.grad(
        -nn.functional.cross_entropy(rows, ids[0, 1:], reduction="sum"), list(adapters.values())
    )

    assert all("lora" in name for name in adapters)
    for got, wanted in zip(chunked, plain, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@LORA_WARNINGS
def test_adapters_on_the_output_embedding_are_refused() -> None:
    model = with_adapters(["lm_head"], silent=True)  # changes no logit yet
    with pytest.raises(ModelRejected, match=r"llama.*output embedding"):
        VocabularyHead.of(model, WIDTH)


def test_fewer_output_embeddings_than_ids_are_refused_with_both_numbers() -> None:
    with pytest.raises(ModelRejected, match=f"{WIDTH} output.* {WIDTH + 1} ids") as refused:
        VocabularyHead.of(tiny_model("llama"), WIDTH + 1)
    assert refused.value.reason is Reason.VOCABULARY_MISMATCH
