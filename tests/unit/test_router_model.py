"""Router checkpoints: written whole or not at all, read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusionroute.errors import ModelRejected, Reason
from fusionroute.fusion import CombineRule
from fusionroute.router_model import (
    COMPLETE_FILE,
    HEAD_FILE,
    MANIFEST_FILE,
    ExpertRecord,
    Heads,
    Manifest,
    load_checkpoint,
    save_checkpoint,
)
from tests.tiny_models import tiny_model, word_tokenizer

HIDDEN = 32
EXPERTS = tuple(ExpertRecord(slot, slot, "vocabulary", 61, f"weights-{slot}") for slot in ("math", "code"))
MANIFEST = Manifest(EXPERTS, "sum", "vocabulary", 61, switches={"lambda": 1 / 3})


def make_heads(num_experts: int = 2, *, gates: bool = True) -> Heads:
    torch.manual_seed(0)
    routing = (torch.randn(num_experts, HIDDEN), torch.randn(num_experts))
    if not gates:
        return Heads(*routing)
    gate = (torch.randn(num_experts + 1, HIDDEN), torch.randn(num_experts + 1))
    return Heads(*routing, *gate, torch.randn(1, HIDDEN), torch.randn(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "router"
    save_checkpoint(path, tiny_model("llama"), word_tokenizer(), make_heads(), MANIFEST)
    return path


def rejection(folder: Path) -> ModelRejected:
    with pytest.raises(ModelRejected) as caught:
        load_checkpoint(folder)
    assert str(folder) in caught.value.message
    return caught.value


def test_what_was_saved_is_loaded(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert checkpoint.manifest == MANIFEST
    for name, tensor in make_heads().tensors().items():
        assert torch.equal(checkpoint.heads.tensors()[name], tensor)
    assert set(checkpoint.available_rules(has_base=True)) == set(CombineRule)
    assert not list(folder.parent.glob(".router-*"))


def test_the_heads_give_each_score_its_place() -> None:
    heads = make_heads()
    hidden = torch.randn(5, HIDDEN)
    scores = heads.to_scores()(hidden)
    layout = heads.layout
    row = scores[3].numpy()
    torch.testing.assert_close(
        torch.tensor(layout.routing(row)), heads.routing_weight @ hidden[3] + heads.routing_bias
    )
    assert heads.gate_weight is not None and heads.gate_bias is not None
    torch.testing.assert_close(
        torch.tensor(layout.gate(row)), heads.gate_weight @ hidden[3] + heads.gate_bias
    )
    assert heads.sum_gate_weight is not None and heads.sum_gate_bias is not None
    wanted = float(heads.sum_gate_weight @ hidden[3] + heads.sum_gate_bias)
    assert layout.sum_gate(row) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", [COMPLETE_FILE, MANIFEST_FILE, HEAD_FILE, "config.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused_by_its_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = rejection(folder)
    assert error.reason is Reason.CHECKPOINT_INCOMPLETE
    assert name in error.message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert rejection(tmp_path / "nothing").reason is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("routing.bias"), "routing.bias is missing"),
        (lambda t: t.pop("gate.bias"), "gate.bias is missing"),
        (lambda t: t.update({"routing.weight": torch.zeros(3, HIDDEN)}), "expected (2, 32)"),
        (lambda t: t.update({"gate.weight": torch.zeros(2, HIDDEN)}), "expected (3, 32)"),
        (lambda t: t.update({"poetry": torch.zeros(1)}), "poetry"),
        (lambda t: t["routing.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_heads_that_do_not_fit_are_refused(folder: Path, change, named: str) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / HEAD_FILE)
    change(tensors)
    save_file(tensors, folder / HEAD_FILE)
    error = rejection(folder)
    assert error.reason is Reason.MODEL_BROKEN
    assert named in error.message


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"format": 1', '"format": 9', "9"),
        ('"combine": "sum"', '"combine": "product"', "product"),
        ('"slot": "code"', '"slot": "math"', "math"),
        ('"experts"', '"specialists"', "experts"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, old: str, new: str, named: str) -> None:
    text = (folder / MANIFEST_FILE).read_text()
    assert old in text
    (folder / MANIFEST_FILE).write_text(text.replace(old, new))
    error = rejection(folder)
    assert error.reason is Reason.MODEL_BROKEN
    assert named in error.message


def test_a_default_rule_without_its_gate_is_refused(tmp_path: Path) -> None:
    manifest = Manifest(EXPERTS, "mixture", "vocabulary", 61)
    save_checkpoint(tmp_path / "r", tiny_model("llama"), word_tokenizer(), make_heads(gates=False), manifest)
    assert "mixture" in rejection(tmp_path / "r").message


def test_saving_over_a_checkpoint_replaces_it_whole(folder: Path) -> None:
    before = load_checkpoint(folder)
    save_checkpoint(folder, tiny_model("llama", seed=3), word_tokenizer(), make_heads(gates=False), MANIFEST)
    after = load_checkpoint(folder)
    assert after.head_digest != before.head_digest
    assert CombineRule.MIXTURE not in after.available_rules()


def test_heads_for_another_number_of_experts_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected"):
        save_checkpoint(tmp_path / "r", tiny_model("llama"), word_tokenizer(), make_heads(3), MANIFEST)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_follows_heads_manifest_and_weights(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    assert (
        checkpoint.fingerprint("a") == load_checkpoint(folder).fingerprint("a") != checkpoint.fingerprint("b")
    )
    text = (folder / MANIFEST_FILE).read_text()
    (folder / MANIFEST_FILE).write_text(text.replace('"code_version": ""', '"code_version": "x"'))
    assert load_checkpoint(folder).fingerprint("a") != checkpoint.fingerprint("a")
