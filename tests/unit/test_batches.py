"""Rows as tensors: targets, labels and pairs stay aligned."""

import numpy as np
import pytest
import torch

from tests.loop_lessons import pair_lesson, random_labels, sft_lesson
from trainer.batches import Batch, BatchMaker, pad
from trainer.loop_inputs import SftLesson
from trainer.rows import Row, RowSet
from trainer.step_plan import Items


def items(sft_rows=(), pairs=()) -> Items:
    return Items(np.asarray(sft_rows, np.int64), np.asarray(pairs, np.int64))


@pytest.fixture
def maker() -> BatchMaker:
    return BatchMaker(sft_lesson(), pair_lesson(), 2, all_targets=False)


def batch_of(maker: BatchMaker, chosen: Items) -> Batch:
    return maker.batch(chosen, maker.counts(chosen), step=1)


def test_a_target_stands_one_cell_before_its_token():
    rows = RowSet.of(
        [Row.of([5, 7, 2, 9, 1], [False, False, False, True, True]), Row.of([4, 3], [False, True])]
    )
    padded = pad(rows, np.array([1, 0]))
    assert padded.ids.tolist() == [[4, 0, 0, 0], [5, 7, 2, 9]]
    assert padded.cells.tolist() == [0, 6, 7]
    assert padded.gold.tolist() == [3, 9, 1]
    assert padded.targets.tolist() == [2, 0, 1]
    assert padded.owners.tolist() == [0, 1, 1]
    assert padded.num_tokens == 5


def test_every_target_keeps_the_labels_of_its_place_in_the_data(maker):
    sft, pairs = sft_lesson(), pair_lesson()
    batch = batch_of(maker, items([5, 0, 9], [3, 1]))
    expected_gold, expected_labels, expected_owners = [], [], []
    for lesson_rows, labels, members in (
        (sft.rows, sft.labels, [5, 0, 9]),
        (pairs.pairs.rows, pairs.labels, [6, 7, 2, 3]),
    ):
        for place, index in enumerate(members):
            row, first = lesson_rows[index], lesson_rows.target_starts[index]
            expected_gold += row.ids[row.supervised].tolist()
            expected_labels.append(labels.gold_logprobs[first : first + row.num_targets])
            if lesson_rows is not sft.rows:
                expected_owners += [place] * row.num_targets
    assert batch.gold.tolist() == expected_gold
    np.testing.assert_array_equal(batch.gold_logprobs, np.concatenate(expected_labels))
    assert batch.owners.tolist() == expected_owners
    assert batch.reference_logprobs.tolist() == pairs.reference_logprobs[[6, 7, 2, 3]].tolist()


def test_the_token_after_a_cell_is_the_target(maker):
    sft = sft_lesson()
    batch = batch_of(maker, items([5, 0], [3]))
    cells = batch.ids.reshape(-1)
    row = sft.rows[5]
    positions = np.flatnonzero(row.supervised) - 1
    assert cells[batch.cells[: row.num_targets]].tolist() == row.ids[positions].tolist()
    assert batch.ids.shape[0] == 4


def test_counts_of_a_step_are_the_sums_of_its_shares(maker):
    parts = [items([1, 2], [0]), items([3], [1, 2]), items()]
    whole = maker.counts(items([1, 2, 3], [0, 1, 2]))
    batches = [batch_of(maker, part) for part in parts]
    assert whole.targets == sum(batch.num_sft_targets for batch in batches)
    assert whole.informative == sum(int(batch.informative.sum()) for batch in batches)
    assert whole.pairs == sum(batch.num_pairs for batch in batches) == 3
    assert 0 < whole.informative < whole.targets


def test_an_empty_share_is_a_row_of_padding_without_targets(maker):
    batch = batch_of(maker, items())
    assert batch.ids.tolist() == [[0]]
    assert len(batch.gold) == batch.num_pairs == batch.num_sft_targets == 0


def test_all_targets_count_where_the_switch_says_so():
    lesson = sft_lesson()
    maker = BatchMaker(lesson, None, 2, all_targets=True)
    everything = maker.counts(items(range(len(lesson.rows))))
    assert everything.informative == everything.targets == lesson.rows.num_targets


def test_tallies_say_how_many_targets_and_tokens_there_are(maker):
    batch = batch_of(maker, items([4], [2]))
    pairs = pair_lesson().pairs.rows
    chosen, rejected = pairs[4], pairs[5]
    lengths = len(sft_lesson().rows[4].ids) + len(chosen.ids) + len(rejected.ids)
    targets = sft_lesson().rows[4].num_targets
    assert batch.tallies.tolist() == [
        targets,
        int(batch.informative.sum()),
        chosen.num_targets,
        rejected.num_targets,
        lengths - 3,
    ]


def test_moving_to_a_device_moves_every_tensor(maker):
    batch = batch_of(maker, items([4], [2])).to(torch.device("meta"))
    tensors = [getattr(batch, name) for name in Batch.__slots__ if torch.is_tensor(getattr(batch, name))]
    assert len(tensors) == 10
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_labels_of_other_rows_are_refused():
    rows = sft_lesson(4).rows
    with pytest.raises(ValueError, match="targets, but labels"):
        SftLesson(rows, random_labels(sft_lesson(5).rows, 1))
