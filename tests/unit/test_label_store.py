"""Labels on disk: whole or not there, of one key, continued where a run was cut short."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fusionroute.errors import InternalFault, Reason, TrainingFailed
from fusionroute.router_model import ExpertRecord
from trainer.label_key import LabelKey, cached_folder
from trainer.label_store import LabelStore
from trainer.rows import Row, RowSet
from trainer.run_context import Stop, Stopped

EXPERTS = tuple(ExpertRecord(slot, slot, "tokens", 61, f"weights-{slot}") for slot in ("math", "code"))


def some_rows(num_rows: int = 7) -> RowSet:
    return RowSet.of(
        Row.of([2 + index, 3, 4, 5], [False, index % 3 != 1, True, index % 2 == 0])
        for index in range(num_rows)
    )


ROWS = some_rows()
GOLD = -np.arange(ROWS.num_targets * 2, dtype=np.float32).reshape(-1, 2)
ARGMAX = np.arange(ROWS.num_targets * 2, dtype=np.int32).reshape(-1, 2) + 7


def store_in(folder: Path, rows: RowSet = ROWS, experts=EXPERTS, rows_per_shard: int = 3) -> LabelStore:
    return LabelStore(folder, LabelKey.of(rows, experts), rows, rows_per_shard)


def put_all(store: LabelStore) -> None:
    store.begin()
    for column, slot in enumerate(store.key.slots):
        for span in store.pending(slot):
            targets = slice(span.target_first, span.target_end)
            store.put(slot, span, GOLD[targets, column], ARGMAX[targets, column])


@pytest.mark.parametrize("rows_per_shard", [1, 3, 7, 100])
def test_shards_become_one_table_in_the_order_of_rows_and_experts(tmp_path, rows_per_shard):
    store = store_in(tmp_path, rows_per_shard=rows_per_shard)
    put_all(store)
    assert not store.is_complete
    store.finish()
    labels = store_in(tmp_path).read()
    assert store.is_complete
    assert np.array_equal(labels.gold_logprobs, GOLD) and labels.gold_logprobs.dtype == np.float32
    assert np.array_equal(labels.argmax_ids, ARGMAX) and labels.argmax_ids.dtype == np.int32
    assert isinstance(labels.gold_logprobs, np.memmap) and not labels.gold_logprobs.flags.writeable
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "COMPLETE", "argmax_ids.npy", "gold_logprobs.npy", "key.json",
    ]  # fmt: skip


def test_what_is_written_is_not_asked_for_again(tmp_path):
    store = store_in(tmp_path)
    store.begin()
    first, second, third = store.pending("math")
    store.put("math", second, GOLD[: second.num_targets, 0], ARGMAX[: second.num_targets, 0])
    again = store_in(tmp_path)
    assert again.pending("math") == [first, third]
    assert len(again.pending("code")) == 3


def test_shards_of_another_size_are_not_mistaken_for_ours(tmp_path):
    store = store_in(tmp_path, rows_per_shard=2)
    put_all(store)
    other = store_in(tmp_path, rows_per_shard=3)
    assert [(span.first, span.end) for span in other.pending("math")] == [
        (0, 3),
        (3, 6),
    ]  # 6 to 7 is the same
    put_all(other)
    other.finish()
    assert np.array_equal(other.read().gold_logprobs, GOLD)


OTHERS = {
    "rows_digest is": (some_rows(6), EXPERTS),
    "weights_fingerprint of expert 'code' is weights-code, wanted new": (
        ROWS,
        (EXPERTS[0], replace(EXPERTS[1], weights_fingerprint="new")),
    ),
    "tokenizer_fingerprint of expert 'math' is tokens, wanted other": (
        ROWS,
        (replace(EXPERTS[0], tokenizer_fingerprint="other"), EXPERTS[1]),
    ),
    "logits_width of expert 'math' is 61, wanted 62": (
        ROWS,
        (replace(EXPERTS[0], logits_width=62), EXPERTS[1]),
    ),
    "experts are math, code, wanted code, math": (ROWS, EXPERTS[::-1]),
    "experts are math, code, wanted math": (ROWS, EXPERTS[:1]),
}


@pytest.mark.parametrize("words", OTHERS)
def test_labels_of_something_else_are_stale_and_the_refusal_says_what_differs(tmp_path, words):
    store_in(tmp_path).begin()
    rows, experts = OTHERS[words]
    with pytest.raises(TrainingFailed) as caught:
        store_in(tmp_path, rows, experts)
    assert caught.value.reason is Reason.LABELS_STALE
    assert words in caught.value.message and str(tmp_path) in caught.value.message


def test_another_name_of_an_expert_does_not_make_labels_stale(tmp_path):
    store_in(tmp_path).begin()
    renamed = (replace(EXPERTS[0], name="elsewhere"), EXPERTS[1])
    assert store_in(tmp_path, experts=renamed).key.digest == LabelKey.of(ROWS, EXPERTS).digest


def test_a_key_that_cannot_be_read_is_stale(tmp_path):
    (tmp_path / "key.json").write_text("{")
    with pytest.raises(TrainingFailed, match="unreadable") as caught:
        store_in(tmp_path)
    assert caught.value.reason is Reason.LABELS_STALE


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_never_kept(tmp_path, value):
    store = store_in(tmp_path)
    store.begin()
    span = store.pending("math")[1]
    gold = np.zeros(span.num_targets, np.float32)
    gold[-1] = value
    with pytest.raises(InternalFault, match="expert 'math' gives targets of rows 3 to 5") as caught:
        store.put("math", span, gold, np.zeros(span.num_targets, np.int32))
    assert caught.value.reason is Reason.NON_FINITE_LOGITS
    assert span in store.pending("math")


def test_a_broken_shard_is_named_and_nothing_looks_complete(tmp_path):
    store = store_in(tmp_path)
    put_all(store)
    shard = tmp_path / "shards" / "code-3-6.safetensors"
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(TrainingFailed, match=r"code-3-6\.safetensors cannot be read") as caught:
        store.finish()
    assert caught.value.reason is Reason.STATE_BROKEN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "shards"]
    shard.unlink()
    put_all(store)
    store.finish()
    assert np.array_equal(store.read().argmax_ids, ARGMAX)


def test_one_labels_at_a_time_and_another_waits_its_turn(tmp_path):
    first, second = store_in(tmp_path), store_in(tmp_path)
    entered = threading.Event()

    def wait_for_turn() -> None:
        with second.locked(wait_seconds=30):
            entered.set()

    with first.locked():
        with (
            pytest.raises(TrainingFailed, match="another process labels into") as caught,
            second.locked(wait_seconds=0),
        ):
            raise AssertionError("two at a time")
        assert caught.value.reason is Reason.JOB_STATE
        waiting = threading.Thread(target=wait_for_turn)
        waiting.start()
        assert not entered.wait(0.3)
    waiting.join(20)
    assert entered.is_set()


def test_waiting_for_another_ends_when_asked_to_stop(tmp_path):
    stop = Stop()
    stop.request()
    with store_in(tmp_path).locked(), pytest.raises(Stopped), store_in(tmp_path).locked(stop.check):
        raise AssertionError("two at a time")


def test_the_cache_has_a_folder_for_each_key(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSIONROUTE_CACHE_DIR", str(tmp_path))
    key, other = LabelKey.of(ROWS, EXPERTS), LabelKey.of(ROWS, EXPERTS[::-1])
    assert cached_folder(key) == tmp_path / "labels" / key.digest
    assert cached_folder(key) != cached_folder(other)
