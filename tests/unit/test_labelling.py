"""What experts say about targets equals what the plain models say, however it is batched, sharded or interrupted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fusionroute.errors import InvalidRequest, ModelRejected, Reason, TrainingFailed
from tests.tiny_models import MAX_CONTEXT, eager_rows, save_tiny_model
from trainer.config import DataTable, ExpertSource, LabelJob, LabelsTable
from trainer.labelling import label_rows, run_label
from trainer.rows import Labels, Row, RowSet
from trainer.run_context import RunContext, Stop, Stopped

FAMILIES = {"math": "llama", "code": "gemma2", "talk": "qwen2"}


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> dict[str, ExpertSource]:
    folder = tmp_path_factory.mktemp("experts")
    return {
        slot: ExpertSource(model=str(save_tiny_model(folder / slot, family, seed=index)))
        for index, (slot, family) in enumerate(FAMILIES.items())
    }


def random_rows(num_rows: int = 23, seed: int = 3) -> RowSet:
    """Rows of unlike lengths with targets anywhere, one row without any."""
    dice = random.Random(seed)
    rows = [Row.of([5, 6, 7], [False, False, False])]
    for _ in range(num_rows - 1):
        length = dice.randint(2, 30)
        marks = [False, True, *(dice.random() < 0.4 for _ in range(length - 2))]
        rows.append(Row.of([dice.randrange(2, 61) for _ in range(length)], marks))
    dice.shuffle(rows)
    return RowSet.of(rows)


def plain_labels(rows: RowSet, experts: dict[str, ExpertSource]) -> Labels:
    """One row at a time through each model's own eager forward."""
    gold = np.empty((rows.num_targets, len(experts)), np.float32)
    argmax = np.empty((rows.num_targets, len(experts)), np.int32)
    for column, source in enumerate(experts.values()):
        model = AutoModelForCausalLM.from_pretrained(source.model).eval()
        for index in range(len(rows)):
            row, start = rows[index], int(rows.target_starts[index])
            logprobs = torch.log_softmax(eager_rows(model, row.ids.tolist()).double(), dim=1)
            for place, position in enumerate(np.flatnonzero(row.supervised)):
                gold[start + place, column] = logprobs[position - 1, row.ids[position]]
                argmax[start + place, column] = logprobs[position - 1].argmax()
    return Labels(gold, argmax)


def context(folder: Path, stop: Stop | None = None) -> RunContext:
    return RunContext(folder, stop=stop or Stop())


class StopAfter(Stop):
    """Asks to stop at the so-manyth check."""

    def __init__(self, num_checks: int) -> None:
        super().__init__()
        self.num_checks = num_checks

    def check(self) -> None:
        self.num_checks -= 1
        if self.num_checks <= 0:
            self.request()
        super().check()


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
@pytest.mark.parametrize("rows_per_shard", [4, 1000])
def test_labels_equal_those_of_the_plain_models(tmp_path, experts, batch_tokens, rows_per_shard):
    rows = random_rows()
    table = LabelsTable(folder=tmp_path / "labels", batch_tokens=batch_tokens, rows_per_shard=rows_per_shard)
    labels, records = label_rows(rows, experts, table, context(tmp_path))
    expected = plain_labels(rows, experts)
    assert labels.gold_logprobs.shape == (rows.num_targets, 3)
    assert np.abs(labels.gold_logprobs - expected.gold_logprobs).max() < 1e-4
    assert np.array_equal(labels.argmax_ids, expected.argmax_ids)
    assert [record.slot for record in records] == list(FAMILIES)


def test_labels_that_are_there_are_not_computed_again(tmp_path, experts):
    rows, table = random_rows(), LabelsTable(folder=tmp_path / "labels")
    label_rows(rows, experts, table, context(tmp_path))
    path = tmp_path / "labels" / "gold_logprobs.npy"
    changed = np.load(path) - 1
    np.save(path, changed)
    labels, _ = label_rows(rows, experts, table, context(tmp_path))
    assert np.array_equal(labels.gold_logprobs, changed)


def test_a_run_that_was_stopped_goes_on_at_its_last_shard_and_gives_the_same_labels(tmp_path, experts):
    rows = random_rows()
    table = LabelsTable(folder=tmp_path / "labels", rows_per_shard=4, batch_tokens=40)
    with pytest.raises(Stopped):
        label_rows(rows, experts, table, context(tmp_path, StopAfter(20)))
    shards = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "labels" / "shards").iterdir()}
    assert 0 < len(shards) < 18
    with pytest.raises(Stopped):
        label_rows(rows, experts, table, context(tmp_path, StopAfter(20)))
    later = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "labels" / "shards").iterdir()}
    assert len(later) > len(shards) and shards.items() <= later.items()
    labels, _ = label_rows(rows, experts, table, context(tmp_path))
    whole, _ = label_rows(
        rows, experts, table.model_copy(update={"folder": tmp_path / "whole"}), context(tmp_path)
    )
    assert np.array_equal(labels.gold_logprobs, whole.gold_logprobs)
    assert np.array_equal(labels.argmax_ids, whole.argmax_ids)


def test_labels_of_another_expert_are_refused_by_name(tmp_path, experts):
    rows, table = random_rows(), LabelsTable(folder=tmp_path / "labels")
    label_rows(rows, experts, table, context(tmp_path))
    other = experts | {"code": ExpertSource(model=str(save_tiny_model(tmp_path / "other", "gemma2", seed=9)))}
    with pytest.raises(TrainingFailed, match="weights_fingerprint of expert 'code'") as caught:
        label_rows(rows, other, table, context(tmp_path))
    assert caught.value.reason is Reason.LABELS_STALE


def test_an_expert_whose_files_changed_is_noticed_within_one_process(tmp_path):
    source = {"math": ExpertSource(model=str(save_tiny_model(tmp_path / "math", seed=1)))}
    rows, table = random_rows(), LabelsTable(folder=tmp_path / "labels")
    label_rows(rows, source, table, context(tmp_path))
    save_tiny_model(tmp_path / "math", seed=2)
    with pytest.raises(TrainingFailed, match="weights_fingerprint"):
        label_rows(rows, source, table, context(tmp_path))


def test_without_a_folder_labels_lie_in_the_cache_each_key_apart(tmp_path, experts, monkeypatch):
    monkeypatch.setenv("FUSIONROUTE_CACHE_DIR", str(tmp_path / "cache"))
    one = {"math": experts["math"]}
    for rows in (random_rows(seed=1), random_rows(seed=2), random_rows(seed=1)):
        label_rows(rows, one, LabelsTable(), context(tmp_path))
    folders = list((tmp_path / "cache" / "labels").iterdir())
    assert len(folders) == 2 and all((folder / "COMPLETE").exists() for folder in folders)


def test_experts_of_different_vocabularies_are_refused_together(tmp_path, experts):
    other = {"wide": ExpertSource(model=str(save_tiny_model(tmp_path / "wide", vocab_size=70)))}
    with pytest.raises(ModelRejected, match=r"'math'.*'wide'") as caught:
        label_rows(random_rows(), experts | other, LabelsTable(folder=tmp_path / "labels"), context(tmp_path))
    assert caught.value.reason is Reason.VOCABULARY_MISMATCH


def test_rows_that_an_expert_cannot_read_are_refused_with_both_lengths(tmp_path, experts):
    long = RowSet.of([Row.of([2] * (MAX_CONTEXT + 2), [False] + [True] * (MAX_CONTEXT + 1))])
    with pytest.raises(InvalidRequest, match=f"{MAX_CONTEXT + 2} tokens.*'math' is {MAX_CONTEXT}") as caught:
        label_rows(long, experts, LabelsTable(folder=tmp_path / "labels"), context(tmp_path))
    assert caught.value.reason is Reason.CONTEXT_FULL


def test_a_last_token_beyond_the_context_can_still_be_asked_about(tmp_path, experts):
    full = RowSet.of([Row.of([2] * (MAX_CONTEXT + 1), [False] * MAX_CONTEXT + [True])])
    one = {"math": experts["math"]}
    labels, _ = label_rows(full, one, LabelsTable(folder=tmp_path / "labels"), context(tmp_path))
    assert labels.gold_logprobs.shape == (1, 1)


def test_rows_of_another_vocabulary_or_without_targets_are_refused(tmp_path, experts):
    table = LabelsTable(folder=tmp_path / "labels")
    with pytest.raises(InvalidRequest, match="token 61; ids of the experts go from 0 to 60") as caught:
        label_rows(RowSet.of([Row.of([2, 61], [False, True])]), experts, table, context(tmp_path))
    assert caught.value.reason is Reason.TOKEN_OUT_OF_RANGE
    with pytest.raises(InvalidRequest, match="no token to be learnt"):
        label_rows(RowSet.of([Row.of([2, 3], [False, False])]), experts, table, context(tmp_path))


def test_the_label_job_leaves_labels_that_later_runs_find(tmp_path, experts):
    lines = [json.dumps({"prompt": f"w{n} w5", "completion": f" w{n + 1} w6"}) for n in range(2, 40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    data = DataTable(files=(tmp_path / "texts.jsonl",))
    job = LabelJob(experts=experts, data=data, labels=LabelsTable(folder=tmp_path / "labels"))
    result = run_label(job, context(tmp_path))
    assert not result.is_checkpoint and result.artifact == tmp_path / "labels" / "texts"
    assert result.metrics["rows"] == 38 and result.metrics["targets"] == 38 * 3
    labels = np.load(result.artifact / "gold_logprobs.npy")
    argmax = np.load(result.artifact / "argmax_ids.npy")
    assert result.metrics["gold_logprob/code"] == pytest.approx(float(labels[:, 1].mean()), rel=1e-5)
    disputed = [len(set(row)) > 1 for row in argmax.tolist()]
    assert result.metrics["informative_share"] == pytest.approx(sum(disputed) / len(disputed))
