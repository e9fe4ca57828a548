"""Experts inside the trainer are the experts that are served: same fingerprints, same rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusionroute.engine import load_model
from fusionroute.errors import ModelRejected, Reason
from tests.tiny_models import MAX_CONTEXT, WIDTH, eager_rows, save_tiny_model, tiny_model
from trainer.config import ExpertSource
from trainer.frozen_models import FrozenModel, load_experts

FAMILIES = ["llama", "gemma2", "qwen2", "qwen3"]


def test_its_record_is_what_a_service_of_the_same_folder_reports(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "expert")
    served = load_model(str(folder)).facts

    record = FrozenModel.load(str(folder), "math").record

    assert (record.slot, record.name) == ("math", "expert")
    assert record.weights_fingerprint == served.weights_fingerprint
    assert record.tokenizer_fingerprint == served.tokenizer_fingerprint
    assert record.logits_width == served.logits_width == WIDTH


def test_another_number_format_changes_the_weights_and_not_their_fingerprint(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "expert"))
    stored, cast = FrozenModel.load(folder, "math"), FrozenModel.load(folder, "math", dtype="bfloat16")
    assert cast.model.dtype == torch.bfloat16
    assert cast.record == stored.record


def test_a_name_of_its_own_goes_into_the_record(tmp_path: Path) -> None:
    source = ExpertSource(model=str(save_tiny_model(tmp_path / "expert")), name="Llama-Math")
    expert = FrozenModel.load(source, "math")
    assert expert.record.name == "Llama-Math"
    assert expert.max_context_tokens == MAX_CONTEXT


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_rows_equal_the_models_own_one_by_one(family: str, tmp_path: Path) -> None:
    expert = FrozenModel.load(str(save_tiny_model(tmp_path / "expert", family, seed=3)), "math")
    rows = [[5, 9, 2, 40, 17, 3, 3, 22, 8, 1, 60, 4], [7], [8, 1, 60, 4, 9]]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [0] * (12 - len(row)) for row in rows])

    hidden = expert.hidden(ids, lengths)

    for index, row in enumerate(rows):
        wanted = eager_rows(tiny_model(family, seed=3), row)
        torch.testing.assert_close(expert.head.rows(hidden[index, : len(row)]), wanted, rtol=1e-4, atol=1e-4)
        assert torch.count_nonzero(hidden[index, len(row) :]) == 0


def test_nothing_of_it_requires_a_gradient(tmp_path: Path) -> None:
    expert = FrozenModel.load(str(save_tiny_model(tmp_path / "expert")), "math")
    hidden = expert.hidden(torch.tensor([[5, 9, 2]]))
    assert not hidden.requires_grad
    assert not expert.head.rows(hidden[0]).requires_grad
    assert not expert.model.training
    assert not any(parameter.requires_grad for parameter in expert.model.parameters())


def test_autocast_around_it_does_not_round_what_it_says(tmp_path: Path) -> None:
    expert = FrozenModel.load(str(save_tiny_model(tmp_path / "expert")), "math")
    ids = torch.tensor([[5, 9, 2, 44]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = expert.hidden(ids)
    assert torch.equal(inside, expert.hidden(ids))


def test_experts_are_loaded_in_their_order(tmp_path: Path) -> None:
    sources = {
        slot: str(save_tiny_model(tmp_path / slot, seed=seed))
        for seed, slot in enumerate(("strings", "math"))
    }
    assert [expert.record.slot for expert in load_experts(sources)] == ["strings", "math"]


def test_experts_of_two_vocabularies_are_refused_naming_both(tmp_path: Path) -> None:
    sources = {
        "math": str(save_tiny_model(tmp_path / "math")),
        "code": str(save_tiny_model(tmp_path / "code", vocab_size=WIDTH + 1)),
    }
    with pytest.raises(ModelRejected, match=r"'math'.*'code'.*logits_width 61 and 62") as refused:
        load_experts(sources)
    assert refused.value.reason is Reason.VOCABULARY_MISMATCH


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="nowhere") as refused:
        FrozenModel.load(str(tmp_path / "nowhere"), "math")
    assert refused.value.reason is Reason.MODEL_NOT_FOUND
