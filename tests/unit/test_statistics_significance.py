"""p-values and Student's t: against numbers from printed tables, each other, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.statistics import student
from evaluation.statistics.significance import SMALLEST, holm, mcnemar, sign_flip


@pytest.mark.parametrize(
    ("confidence", "freedom", "t"),
    [  # Fisher and Yates, table III
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 10, 2.228),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.99, 4, 4.604),
        (0.90, 5, 2.015),
    ],
)
def test_students_quantiles_equal_the_printed_ones(confidence, freedom, t):
    assert student.quantile(confidence, freedom) == pytest.approx(t, abs=5e-4)


def test_series_and_expansion_of_students_t_meet():
    for freedom in (201, 202, 500):
        assert student.within(student.quantile(0.95, freedom), freedom) == pytest.approx(0.95, abs=1e-9)


def test_students_interval_of_three_values_is_the_hand_computed_one():
    estimate = student.mean_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


def test_one_value_has_no_students_interval():
    with pytest.raises(ValueError, match="at least 2"):
        student.mean_interval([1.0])
    with pytest.raises(ValueError, match="freedom = 0"):
        student.quantile(0.95, 0)
    with pytest.raises(ValueError, match="confidence"):
        student.quantile(1.0, 3)


@pytest.mark.parametrize(
    ("first", "second", "p_value"),
    [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (8, 2, 112 / 1024), (1, 9, 22 / 1024)],
)
def test_mcnemars_test_is_that_of_a_fair_coin(first, second, p_value):
    assert mcnemar(first, second) == pytest.approx(p_value, rel=1e-12)


def test_a_negative_number_of_questions_is_refused():
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 2)


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_with_one_question_in_each_cluster_flipping_signs_is_mcnemars_test(first, second, same):
    differences = [1.0] * first + [-1.0] * second + [0.0] * same
    assert sign_flip(differences) == pytest.approx(mcnemar(first, second), rel=1e-9)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9), st.sampled_from([1.0, 0.5, 1 / 3, 0.1]))
@settings(max_examples=60, deadline=None)
def test_flipping_signs_counts_what_trying_all_signs_counts(totals, unit):
    observed = abs(sum(totals))
    sums = [sum(s * each for s, each in zip(signs, totals, strict=True))
            for signs in itertools.product((1, -1), repeat=len(totals))]  # fmt: skip
    expected = sum(abs(each) >= observed for each in sums) / len(sums)
    assert sign_flip([each * unit for each in totals]) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-6), min_size=1, max_size=10))
@settings(max_examples=60, deadline=None)
def test_a_p_value_is_a_share_and_does_not_care_who_is_first_or_about_the_unit(values):
    p_value = sign_flip(values)
    assert 0.0 < p_value <= 1.0
    assert sign_flip([-each for each in values]) == p_value
    assert sign_flip([each * 7.3 for each in values]) == pytest.approx(p_value, rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6, 1.0])
def test_the_saddlepoint_formula_agrees_with_trying_all_flips(shift):
    values = np.random.default_rng(4).normal(shift, 1.0, size=20)
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums + value, sums - value])
    expected = np.mean(np.abs(sums) >= abs(values.sum()) - 1e-9)
    assert sign_flip(values) == pytest.approx(expected, rel=0.05)


def test_all_clusters_on_one_side_have_the_least_p_value_there_is():
    assert sign_flip(np.linspace(0.1, 1.0, 20) * math.pi) == pytest.approx(2.0**-19)
    assert sign_flip(np.ones(3000)) == SMALLEST


def test_no_difference_anywhere_is_no_evidence():
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([]) == 1.0


def test_holms_adjustment_of_four_is_the_hand_computed_one():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0.0, 1.0), max_size=20))
def test_holm_keeps_the_order_lowers_nothing_and_is_milder_than_bonferroni(p_values):
    adjusted = holm(p_values)
    assert len(adjusted) == len(p_values)
    for p, q in zip(p_values, adjusted, strict=True):
        assert p <= q <= min(1.0, len(p_values) * p) + 1e-12
    in_order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    assert [adjusted[at] for at in in_order] == sorted(adjusted)
