"""Intervals against values worked out elsewhere, and properties that an interval must have."""

from __future__ import annotations

import pytest

from evaluation.statistics.intervals import paired_difference, wilson_interval, wilson_of_share


@pytest.mark.parametrize(
    ("num_right", "num_items", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_equal_the_published_ones(
    num_right: int, num_items: int, low: float, high: float
) -> None:
    estimate = wilson_interval(num_right, num_items)
    assert estimate.value == pytest.approx(num_right / num_items)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_a_wilson_interval_is_the_mirror_image_of_that_of_the_wrong_ones() -> None:
    right, wrong = wilson_interval(7, 9), wilson_interval(2, 9)
    assert (right.low, right.high) == pytest.approx((1 - wrong.high, 1 - wrong.low))


def test_a_wilson_interval_stays_inside_zero_and_one() -> None:
    assert wilson_interval(0, 3).low == 0.0
    assert wilson_interval(3, 3).high == 1.0


def test_less_confidence_makes_a_narrower_interval() -> None:
    wide, narrow = wilson_interval(5, 10, 0.99), wilson_interval(5, 10, 0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(("num_right", "num_items"), [(0, 0), (4, 3), (-1, 3)])
def test_a_share_that_cannot_be_is_refused(num_right: int, num_items: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(num_right, num_items)


def test_a_share_of_half_as_many_items_is_known_less_well():
    whole, half = wilson_of_share(0.7, 50.0), wilson_of_share(0.7, 25.0)
    assert whole == wilson_interval(35, 50)
    assert half.low < whole.low < whole.high < half.high
    with pytest.raises(ValueError, match="no interval"):
        wilson_of_share(1.1, 5)


def test_a_confidence_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, 1.0)


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    estimate = paired_difference([1.0, 0.5, 0.75], [0.5, 0.0, 0.25], ["a", "a", "b"])
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)
    assert estimate.excludes_zero


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_independent_items() -> None:
    first = [1.0] * 300 + [0.0] * 700
    estimate = paired_difference(first, [0.0] * 1000, range(1000), num_resamples=8000)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert estimate.value == pytest.approx(0.3)
    assert (estimate.low, estimate.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)


def test_repeating_every_item_within_its_cluster_adds_no_certainty() -> None:
    first, second, clusters = [1.0, 0.0, 1.0, 1.0, 0.0], [0.0] * 5, list("abcde")
    once = paired_difference(first, second, clusters)
    thrice = paired_difference(first * 3, second * 3, clusters * 3)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))
    alone = paired_difference(first * 3, second * 3, range(15))
    assert alone.high - alone.low < thrice.high - thrice.low


def test_pairing_cancels_what_both_systems_find_hard() -> None:
    easy_or_hard = [float(i % 2) for i in range(100)]
    estimate = paired_difference(easy_or_hard, easy_or_hard, range(100))
    assert (estimate.low, estimate.high) == (0.0, 0.0)
    assert not estimate.excludes_zero


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]
    assert paired_difference(first, second, range(4), seed=3) == paired_difference(
        first, second, range(4), seed=3
    )


def test_scores_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference([1.0], [1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference([], [], [])
