"""Whole runs in one process on tiny models: SFT, CDPO, one more expert; what they write says where it is from."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.fusion import CombineRule
from fusionroute.router_model import load_checkpoint
from fusionroute.vocabulary import load_tokenizer
from tests.tiny_models import save_tiny_model
from trainer.config import CdpoJob, ExtendJob, SftJob
from trainer.run import run
from trainer.run_context import RunContext, RunProgress, Stop, Stopped

SLOTS = ("math", "code", "chat")


class World:
    """Tiny experts, a tiny router, and small data, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for seed, name in enumerate((*SLOTS, "router", "late")):
            save_tiny_model(folder / name, seed=seed)
        random = Random(0)
        texts = [{"prompt": words(random, 4), "completion": words(random, 3)} for _ in range(24)]
        self.texts = write(folder / "texts.jsonl", texts)
        pairs = [
            {"prompt": words(random, 4), "chosen": words(random, 3), "rejected": words(random, 2)}
            for _ in range(12)
        ]
        self.pairs = write(folder / "pairs.jsonl", pairs)

    def values(self, **changes: Any) -> dict[str, Any]:
        return {
            "experts": {slot: str(self.folder / slot) for slot in SLOTS},
            "data": {"files": [str(self.texts)]},
            "labels": {"folder": str(self.folder / "labels")},
            "router": str(self.folder / "router"),
            "training": {"batch_rows": 8, "epochs": 2, "learning_rate": 1e-3, "log_every_steps": 1, "device": "cpu"},
            "gates": {"num_steps": 10},
            **changes,
        }


def words(random: Random, count: int) -> str:
    return " ".join(f"w{random.randrange(2, 60)}" for _ in range(count))


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def phase_one(world: World) -> Path:
    stages: list[str] = []

    def note(progress: RunProgress) -> None:
        stages.append(progress.stage)

    context = RunContext(world.folder / "sft", note)
    result = run(SftJob.from_values(world.values()), context)
    assert result.is_checkpoint
    assert {"training", "gates", "report"} <= set(stages)
    return result.artifact


def test_phase_one_writes_a_checkpoint_that_serves_every_rule_and_says_where_it_is_from(world, phase_one) -> None:
    checkpoint = load_checkpoint(phase_one)
    manifest = checkpoint.manifest
    assert manifest.slots == SLOTS
    assert set(checkpoint.available_rules(has_base=True)) == set(CombineRule)
    switches = {"expert_weight": pytest.approx(1 / 3), "aggregate": "linear", "tokens": "informative"}
    assert manifest.switches["sft"] == switches
    assert manifest.lineage["parent"] == "router" and manifest.lineage["data"]["texts"]["rows"] == 24
    assert manifest.metrics["ownership"]["slots"] == list(SLOTS)
    assert (phase_one.parent / "report.png").stat().st_size > 10_000
    assert (phase_one.parent / "metrics.jsonl").read_text().count("\n") == 6


def test_phase_two_starts_from_it_fits_the_gates_anew_and_names_its_switches(world, phase_one) -> None:
    values = world.values(
        router=str(phase_one),
        pairs={"files": [str(world.pairs)]},
        cdpo={"bias_scale": 0.5, "routes": "frozen"},
        mixed={"sft_loss": "expert"},
    )
    notes: list[str] = []
    context = RunContext(world.folder / "cdpo", lambda progress: notes.append(progress.note))
    result = run(CdpoJob.from_values(values), context)
    assert next(note for note in notes if note).startswith("bias of 12 pairs before any training")
    before, after = load_checkpoint(phase_one), load_checkpoint(result.artifact)
    assert after.manifest.switches["cdpo"]["bias_scale"] == 0.5
    assert after.manifest.switches["cdpo"]["routes"] == "frozen"
    assert after.manifest.switches["mixed"]["sft_loss"] == "expert"
    assert after.manifest.lineage["phase"] == "cdpo" and after.manifest.lineage["grandparents"]["phase"] == "sft"
    assert after.heads.gate_weight is not None and not after.heads.gate_weight.equal(before.heads.gate_weight)
    assert not after.heads.routing_weight.equal(before.heads.routing_weight)
    bias = json.loads((world.folder / "cdpo" / "bias.json").read_text())
    assert bias["num_pairs"] == 12


def test_phase_two_without_gates_leaves_those_of_phase_one_out(world, phase_one, tmp_path) -> None:
    values = world.values(router=str(phase_one), pairs={"files": [str(world.pairs)]}, gates={"enabled": False})
    result = run(CdpoJob.from_values(values), RunContext(tmp_path / "run"))
    assert load_checkpoint(result.artifact).heads.gate_weight is None


def test_the_chat_template_of_the_training_is_that_of_the_checkpoint(world, tmp_path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }} {% endfor %}")
    data = {"files": [str(world.texts)], "chat_template": str(template)}
    config = SftJob.from_values(world.values(data=data, gates={"enabled": False}, report={"enabled": False}))
    result = run(config, RunContext(tmp_path / "run"))
    assert load_tokenizer(str(result.artifact)).chat_template == template.read_text()


def test_a_finished_run_is_not_done_again(world, phase_one) -> None:
    before = (phase_one / "routing_head.safetensors").stat().st_mtime_ns
    again = run(SftJob.from_values(world.values()), RunContext(phase_one.parent))
    assert again.artifact == phase_one
    assert (phase_one / "routing_head.safetensors").stat().st_mtime_ns == before


def test_phase_two_refuses_a_checkpoint_of_other_experts(world, phase_one, tmp_path) -> None:
    experts = {slot: str(world.folder / slot) for slot in ("math", "chat", "code")}
    values = world.values(experts=experts, router=str(phase_one), pairs={"files": [str(world.pairs)]})
    values["labels"] = {"folder": str(tmp_path / "labels")}
    with pytest.raises(FusionRouteError, match="math, code, chat in this order") as error:
        run(CdpoJob.from_values(values), RunContext(tmp_path / "run"))
    assert error.value.reason is Reason.EXPERTS_MISMATCH
    assert not (tmp_path / "labels").exists()


def test_phase_two_refuses_experts_whose_weights_have_changed_since(world, phase_one, tmp_path) -> None:
    values = world.values(router=str(phase_one), pairs={"files": [str(world.pairs)]})
    values["experts"] = {**values["experts"], "code": str(world.folder / "late")}
    values["labels"] = {"folder": str(tmp_path / "labels")}
    with pytest.raises(FusionRouteError, match="expert 'code' has weights") as error:
        run(CdpoJob.from_values(values), RunContext(tmp_path / "run"))
    assert error.value.reason is Reason.EXPERTS_MISMATCH


def test_phase_one_refuses_a_router_of_another_vocabulary(world, tmp_path) -> None:
    save_tiny_model(tmp_path / "other", vocab_size=40)
    with pytest.raises(FusionRouteError) as error:
        run(SftJob.from_values(world.values(router=str(tmp_path / "other"))), RunContext(tmp_path / "run"))
    assert error.value.reason is Reason.VOCABULARY_MISMATCH


def test_a_later_expert_gets_rows_of_its_own_and_the_lm_keeps_its_bytes(world, phase_one, tmp_path) -> None:
    values = world.values(router=str(phase_one), old_data={"files": [str(world.texts)]}, num_steps=20)
    for name in ("training", "gates"):
        del values[name]
    values["experts"] = {**values["experts"], "late": str(world.folder / "late")}
    values["labels"] = {"folder": str(tmp_path / "labels")}
    result = run(ExtendJob.from_values(values), RunContext(tmp_path / "run"))
    before, after = load_checkpoint(phase_one), load_checkpoint(result.artifact)
    assert after.manifest.slots == (*SLOTS, "late")
    assert after.heads.routing_weight[:3].equal(before.heads.routing_weight)
    assert (result.artifact / "model.safetensors").read_bytes() == (phase_one / "model.safetensors").read_bytes()
    assert set(result.metrics) >= {"old/routed_to_new", "old/expert_right_before", "old/expert_right_after"}


def test_extending_by_none_or_two_experts_is_refused(world, phase_one, tmp_path) -> None:
    values = world.values(router=str(phase_one))
    for name in ("training", "gates"):
        del values[name]
    with pytest.raises(FusionRouteError, match="one more"):
        run(ExtendJob.from_values(values), RunContext(tmp_path / "run"))


def test_a_stopped_run_goes_on_where_it_was_and_ends_as_if_undisturbed(world, phase_one, tmp_path) -> None:
    stop = Stop()

    def stop_at_step_three(progress: RunProgress) -> None:
        if progress.stage == "training" and progress.step == 3:
            stop.request()

    config = SftJob.from_values(world.values())
    with pytest.raises(Stopped):
        run(config, RunContext(tmp_path / "run", stop_at_step_three, stop))
    assert not (tmp_path / "run" / "checkpoint").exists()
    resumed = run(config, RunContext(tmp_path / "run"))
    for name in ("model.safetensors", "routing_head.safetensors"):
        assert (resumed.artifact / name).read_bytes() == (phase_one / name).read_bytes(), name
