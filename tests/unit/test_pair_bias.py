"""What the experts think of pairs before anything is trained."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fusionroute.errors import Reason, TrainingFailed
from trainer.pair_bias import BiasStatistics, Histogram, pair_bias, render_histogram
from trainer.rows import Labels, PairSet, Row, RowSet

# pair 0: responses of 2 and 3 targets; pair 1: of 1 and 2
ROW_TARGETS = (2, 3, 1, 2)
NUM_TARGETS = sum(ROW_TARGETS)


def pairs() -> PairSet:
    rows = [Row.of([5] * (2 + count), [False, False] + [True] * count) for count in ROW_TARGETS]
    return PairSet(RowSet.of(rows))


def labels(seed: int = 0) -> Labels:
    draw = np.random.default_rng(seed)
    logprobs = draw.uniform(-4, 0, (NUM_TARGETS, 3)).astype(np.float32)
    return Labels(logprobs, np.zeros((NUM_TARGETS, 3), dtype=np.int32))


def statistics(*bias: float) -> BiasStatistics:
    return BiasStatistics(np.asarray(bias, dtype=np.float32), beta=0.1)


def by_hand(given: Labels, routes, *, mean: bool = False) -> list[float]:
    picked = [float(given.gold_logprobs[place, routes[place]]) for place in range(NUM_TARGETS)]
    responses, place = [], 0
    for count in ROW_TARGETS:
        total = sum(picked[place : place + count])
        responses.append(total / count if mean else total)
        place += count
    return [0.1 * (responses[0] - responses[1]), 0.1 * (responses[2] - responses[3])]


def test_the_bias_is_the_routed_experts_difference_between_both_responses():
    routes = np.array([0, 2, 1, 1, 0, 2, 2, 0], dtype=np.int32)
    result = pair_bias(labels(), pairs(), routes)
    assert result.bias == pytest.approx(by_hand(labels(), routes), rel=1e-5)


def test_the_mean_does_not_grow_with_the_length_of_a_response():
    routes = np.zeros(NUM_TARGETS, dtype=np.int32)
    even = Labels(np.full((NUM_TARGETS, 3), -1.0, np.float32), np.zeros((NUM_TARGETS, 3), np.int32))
    assert pair_bias(even, pairs(), routes).bias == pytest.approx([0.1, 0.1])
    assert pair_bias(even, pairs(), routes, bias_reduction="mean").bias == pytest.approx([0.0, 0.0])
    mean = pair_bias(labels(), pairs(), routes, bias_reduction="mean")
    assert mean.bias == pytest.approx(by_hand(labels(), routes, mean=True), rel=1e-5)


def test_scale_and_beta_multiply_the_bias():
    routes = np.zeros(NUM_TARGETS, dtype=np.int32)
    whole = pair_bias(labels(), pairs(), routes).bias
    assert pair_bias(labels(), pairs(), routes, bias_scale=0.5, beta=0.2).bias == pytest.approx(whole)
    assert pair_bias(labels(), pairs(), routes, bias_scale=0.0).bias.tolist() == [0.0, 0.0]


def test_many_pairs_in_blocks_are_as_one_by_one():
    rows = [
        Row.of([5, 6, 7][: 2 + index % 2], [False, True, True][: 2 + index % 2]) for index in range(10_000)
    ]
    many = PairSet(RowSet.of(rows))
    draw = np.random.default_rng(1)
    logprobs = draw.uniform(-4, 0, (many.rows.num_targets, 2)).astype(np.float32)
    routes = draw.integers(0, 2, many.rows.num_targets)
    result = pair_bias(Labels(logprobs, np.zeros_like(logprobs, dtype=np.int32)), many, routes)
    starts = many.rows.target_starts
    for number in (0, 4095, 4096, 4999):
        chosen, rejected = (
            sum(float(logprobs[place, routes[place]]) for place in range(starts[row], starts[row + 1]))
            for row in (2 * number, 2 * number + 1)
        )
        assert result.bias[number] == pytest.approx(0.1 * (chosen - rejected), rel=1e-4, abs=1e-6)


def test_labels_of_other_targets_are_refused():
    with pytest.raises(ValueError, match="8 targets, but 8 labels and 7 routes"):
        pair_bias(labels(), pairs(), np.zeros(7, dtype=np.int32))


def test_a_log_probability_that_is_no_number_names_its_pair():
    broken = labels()
    broken.gold_logprobs[6, 0] = -np.inf
    with pytest.raises(TrainingFailed, match="bias of pair 1") as caught:
        pair_bias(broken, pairs(), np.zeros(NUM_TARGETS, dtype=np.int32))
    assert caught.value.reason is Reason.LOSS_NOT_FINITE


def test_the_loss_and_the_gradients_scale_at_step_0_follow_from_the_bias():
    given = statistics(-1.0, 0.0, 2.0)
    losses = [-math.log(1 / (1 + math.exp(-bias))) for bias in (-1.0, 0.0, 2.0)]
    assert given.loss == pytest.approx(sum(losses) / 3)
    assert given.sigmoid_neg_margin == pytest.approx([1 / (1 + math.exp(bias)) for bias in (-1.0, 0.0, 2.0)])
    assert statistics(0.0).loss == pytest.approx(math.log(2))
    assert statistics(900.0).sigmoid_neg_margin[0] == 0.0


def test_a_mean_bias_far_above_zero_is_warned_of_and_says_why():
    warning = statistics(2.0, 3.0).warning
    assert warning is not None
    assert "+2.50" in warning and "tell these pairs apart already" in warning and "train pairs" in warning
    assert statistics(1.0, 1.0).warning is None
    assert statistics(-5.0).warning is None
    assert "WARNING: mean bias +2.50" in render_histogram(statistics(2.0, 3.0))
    assert "WARNING" not in render_histogram(statistics(-2.0))


def test_every_value_is_in_exactly_one_bin_and_zero_is_an_edge():
    values = np.random.default_rng(0).normal(1.0, 2.0, 5000).astype(np.float32)
    histogram = Histogram.of_bias(values, num_bins=14)
    assert sum(histogram.counts) == 5000
    assert 0.0 in histogram.edges
    below = sum(count for edge, count in zip(histogram.edges, histogram.counts, strict=False) if edge < 0)
    assert below == int((values < 0).sum())
    assert 10 <= len(histogram.counts) <= 20


@pytest.mark.parametrize("values", [[], [0.0], [3.0, 3.0], [1e-9, 2e-9], [-7000.0, 12.0]])
def test_odd_pairs_have_a_histogram_too(values: list[float]):
    text = render_histogram(statistics(*values))
    assert f"bias of {len(values)} pairs" in text
    assert len(text.splitlines()) < 40
    json.dumps(statistics(*values).to_json(), allow_nan=False)


def test_bars_are_as_long_as_their_counts():
    lines = list(Histogram((0.0, 1.0, 2.0, 3.0), (4, 2, 0)).lines(width=8))
    assert [line.count("█") for line in lines] == [8, 4, 0]
    assert lines[0].startswith("  0 .. 1  ")
    assert [len(line) for line in lines] == [len(lines[0])] * 3
