"""Intervals hold the truth, and p-values alarm, about as often as they say: in simulated worlds whose truth is known.

Draws are seeded, so these tests come out the same every time; the limits leave room for the hundred repetitions.
"""

from __future__ import annotations

from statistics import NormalDist, fmean, median

import numpy as np
import pytest

from evaluation.statistics import student
from evaluation.statistics.mixed import crossed_mean, nested_mean
from evaluation.statistics.significance import mcnemar, sign_flip
from tests.simulated_worlds import World, share_held

NUM_WORLDS = 100


def test_intervals_of_one_seed_hold_the_truth_as_often_as_they_say():
    world = World(num_clusters=30, num_seeds=1, lead=0.8)
    held = share_held(world.difference, (each.difference for each in world.comparisons(NUM_WORLDS)))
    assert 0.90 <= held <= 0.985


def test_wilson_intervals_of_clustered_questions_hold_the_truth_and_naive_ones_do_not():
    world = World(num_clusters=30, num_seeds=1, lead=0.8)
    found = list(world.cells(300))
    assert 0.91 <= share_held(world.share, (each.estimate for each in found)) <= 0.98
    half = 1.96 * (world.share * (1 - world.share) / fmean(each.num_questions for each in found)) ** 0.5
    assert fmean(abs(each.estimate.value - world.share) < half for each in found) < 0.88


@pytest.mark.parametrize("seed_spread", [0.0, 0.4])
def test_intervals_over_three_seeds_hold_the_truth_whether_seeds_differ_or_not(seed_spread):
    world = World(num_clusters=30, num_seeds=3, lead=0.5, seed_spread=seed_spread)
    found = list(world.comparisons(NUM_WORLDS))
    assert 0.90 <= share_held(world.difference, (each.mixed for each in found)) <= 1.0
    assert 0.88 <= share_held(world.difference, (each.difference for each in found)) <= 1.0


def test_p_values_of_equal_systems_are_small_as_rarely_as_they_say_and_mcnemars_is_not():
    rng = np.random.default_rng(7)
    alarms, naive = [], []
    for _ in range(400):
        lean = rng.choice([-1, 0, 0, 1], size=60)  # whom a cluster speaks for, with all of its questions
        sizes = rng.integers(1, 6, size=60)
        alarms.append(sign_flip(lean * sizes) < 0.05)
        naive.append(mcnemar(int(sizes[lean > 0].sum()), int(sizes[lean < 0].sum())) < 0.05)
    assert 0.02 <= np.mean(alarms) <= 0.07
    assert np.mean(naive) > 0.12


def test_a_difference_as_large_as_the_detectable_one_is_found_in_four_of_five_cases():
    world = World(num_clusters=60, num_seeds=1)
    detectable = median(each.detectable for each in world.comparisons(20))
    lead = NormalDist(sigma=2**0.5).inv_cdf(0.5 + detectable)
    found = fmean(each.p_value < 0.05 for each in World(60, 1, lead).comparisons(NUM_WORLDS))
    assert 0.70 <= found <= 0.90


def test_students_interval_over_seeds_takes_questions_as_fixed_and_the_mixed_summary_does_not():
    rng = np.random.default_rng(3)
    held, students = [], []
    for _ in range(400):
        values = (
            rng.normal(size=40)[None, :] + 0.1 * rng.normal(size=4)[:, None] + 0.3 * rng.normal(size=(4, 40))
        )
        both, seeds = crossed_mean(values), student.mean_interval(values.mean(axis=1).tolist())
        held.append(both.low <= 0.0 <= both.high)
        students.append(seeds.low <= 0.0 <= seeds.high)
    assert 0.92 <= np.mean(held) <= 0.98
    assert np.mean(students) < 0.9


def test_an_effect_that_is_not_there_is_pooled_away():
    rest = np.array([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
    flat = crossed_mean(rest)  # neither seeds nor clusters differ: eight values like any other
    half = student.quantile(0.95, 7) * np.sqrt(8 / 7 / 8)
    assert (flat.low, flat.high) == pytest.approx((-half, half))
    seeds = crossed_mean(np.array([[5.0] * 4, [3.0] * 4]) + rest)  # clusters do not: Student's over seeds
    assert (seeds.low, seeds.high) == pytest.approx((4 - 12.7062, 4 + 12.7062), abs=1e-3)


def test_seeds_that_agree_too_well_do_not_make_questions_certain():
    estimate = nested_mean([0.5, 0.5, 0.5], [0.01, 0.01, 0.04])
    half = student.quantile(0.95, 2) * np.sqrt(0.02 / 3)
    assert (estimate.low, estimate.high) == pytest.approx((0.5 - half, 0.5 + half))


def test_one_seed_or_one_cluster_has_no_mixed_summary():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        crossed_mean([[1.0, 2.0]])
    with pytest.raises(ValueError, match="2 or more"):
        nested_mean([1.0], [0.1])
