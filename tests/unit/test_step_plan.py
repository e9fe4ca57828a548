"""Which rows a step learns from, however it is divided."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import TrainingTable
from trainer.step_plan import Items, StepPlan

NONE = np.empty(0, np.int64)


def plan_of(num_sft=20, num_pairs=0, per_pair=1.0, world_size=1, **table) -> StepPlan:
    random = np.random.default_rng(5)
    lengths = random.integers(3, 30, size=num_sft), random.integers(3, 30, size=num_pairs)
    return StepPlan(TrainingTable(**table), *lengths, per_pair, world_size)


def items_of_epoch(plan: StepPlan, epoch: int) -> list[Items]:
    return [plan.items(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]


def all_of(items: list[Items], kind: str) -> list[int]:
    return sorted(np.concatenate([getattr(part, kind) for part in items]).tolist())


def test_an_epoch_of_texts_has_every_row_once_and_the_next_has_another_order():
    plan = plan_of(num_sft=21, batch_rows=4)
    first, second = items_of_epoch(plan, 0), items_of_epoch(plan, 1)
    assert all_of(first, "sft_rows") == all_of(second, "sft_rows") == list(range(21))
    assert [len(items.sft_rows) for items in first] == [4, 4, 4, 4, 4, 1]
    assert first[0].sft_rows.tolist() != second[0].sft_rows.tolist()


def test_the_same_seed_gives_the_same_steps_and_another_seed_others():
    for step in (0, 7):
        same = plan_of(batch_rows=4, seed=3).items(step).sft_rows.tolist()
        assert plan_of(batch_rows=4, seed=3).items(step).sft_rows.tolist() == same
        assert plan_of(batch_rows=4, seed=4).items(step).sft_rows.tolist() != same


@given(
    num_sft=st.integers(1, 40),
    num_pairs=st.integers(1, 30),
    per_pair=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    batch_rows=st.integers(1, 9),
    accumulation_steps=st.integers(1, 3),
    world_size=st.integers(1, 3),
)
def test_an_epoch_of_pairs_has_every_pair_once_in_shares_that_are_never_too_large(
    num_sft, num_pairs, per_pair, batch_rows, accumulation_steps, world_size
):
    sizes = {"batch_rows": batch_rows, "accumulation_steps": accumulation_steps}
    plan = plan_of(num_sft, num_pairs, per_pair, world_size, **sizes)
    items = items_of_epoch(plan, 0)
    assert all_of(items, "pairs") == list(range(num_pairs))
    assert len(all_of(items, "sft_rows")) == round(num_pairs * per_pair)
    for step, whole in enumerate(items):
        shares = plan.shares(step)
        assert len(shares) == accumulation_steps * world_size
        assert all(len(share.sft_rows) + 2 * len(share.pairs) <= plan.batch_rows for share in shares)
        assert all_of(shares, "pairs") == sorted(whole.pairs.tolist())
        assert all_of(shares, "sft_rows") == sorted(whole.sft_rows.tolist())
    rows = [len(part.sft_rows) + 2 * len(part.pairs) for part in items]
    assert all(count >= plan.rows_per_step - 1 for count in rows[:-1])


def test_texts_beside_pairs_are_drawn_anew_and_equally_often():
    plan = plan_of(num_sft=10, num_pairs=5, batch_rows=4)
    draws = [all_of(items_of_epoch(plan, epoch), "sft_rows") for epoch in range(4)]
    assert draws[0] != draws[1]
    assert np.bincount(np.concatenate(draws)).tolist() == [2] * 10


def test_pairs_and_texts_are_shuffled_together():
    plan = plan_of(num_sft=100, num_pairs=100, batch_rows=12)
    mixed = [len(items.pairs) > 0 and len(items.sft_rows) > 0 for items in items_of_epoch(plan, 0)]
    assert sum(mixed) > 0.9 * len(mixed)


@pytest.mark.parametrize("num_pairs", [0, 9])
def test_a_step_is_the_same_however_it_is_divided(num_pairs):
    divisions = [
        plan_of(20, num_pairs, batch_rows=8),
        plan_of(20, num_pairs, batch_rows=2, accumulation_steps=4),
        plan_of(20, num_pairs, batch_rows=4, world_size=2),
        plan_of(20, num_pairs, batch_rows=2, accumulation_steps=2, world_size=2),
    ]
    assert len({plan.num_steps for plan in divisions}) == 1
    for step in range(divisions[0].num_steps):
        items = [plan.items(step) for plan in divisions]
        assert len({tuple(part.sft_rows.tolist()) for part in items}) == 1
        assert len({tuple(part.pairs.tolist()) for part in items}) == 1


def test_rows_of_like_length_share_a_forward():
    plan = plan_of(64, batch_rows=4, accumulation_steps=16)
    padded = sum(plan.sft_lengths[share.sft_rows].max() * len(share.sft_rows) for share in plan.shares(0))
    assert padded < 1.15 * plan.sft_lengths.sum()


def test_steps_follow_from_epochs_unless_they_are_given():
    assert plan_of(20, batch_rows=8, epochs=2).num_steps == 6
    assert plan_of(20, batch_rows=8, epochs=0.5).num_steps == 2
    assert plan_of(20, batch_rows=8, epochs=2, max_steps=5).num_steps == 5


def test_nothing_to_learn_from_is_refused():
    with pytest.raises(ValueError, match="neither"):
        plan_of(0, 0)
