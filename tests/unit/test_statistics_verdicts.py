"""Sentences about comparisons say what was found, and what was not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from evaluation.findings import ALL, NLL, Comparison
from evaluation.statistics.intervals import Estimate
from evaluation.statistics.verdicts import verdict_sentence

AHEAD = Comparison(
    first="cdpo/sum", second="route", stratum="coverage=gap", num_questions=300, num_clusters=120,
    difference=Estimate(0.138, 0.126, 0.151), over_seeds=None, mixed=None,
    only_first=60, only_second=20, p_value=0.0001, p_adjusted=0.0004, detectable=0.04, per_seed={1: 0.138},
)  # fmt: skip
NULL = replace(AHEAD, difference=Estimate(0.006, -0.003, 0.015), p_value=0.21, p_adjusted=0.63)


def test_a_clear_difference_names_who_is_ahead_where_and_by_how_much():
    text = verdict_sentence(AHEAD, {"cdpo/sum": "after CDPO"})
    assert text.startswith(
        "after CDPO is ahead of route on coverage=gap: +0.138 [+0.126, +0.151]; p < 0.001 after Holm"
    )
    assert "300 questions in 120 clusters" in text
    assert "whether another training would show the same is not known" in text


def test_a_loss_is_told_as_plainly():
    text = verdict_sentence(replace(AHEAD, difference=Estimate(-0.1, -0.2, -0.05), stratum=ALL))
    assert text.startswith("cdpo/sum is behind route on all questions: -0.100")


def test_a_smaller_loss_per_token_is_ahead():
    text = verdict_sentence(replace(AHEAD, measure=NLL, difference=Estimate(-0.1, -0.2, -0.05)))
    assert "is ahead of" in text
    assert "-0.100 nats per token" in text


def test_a_null_result_comes_with_what_it_could_have_missed():
    text = verdict_sentence(NULL)
    assert text.startswith("No difference shown between cdpo/sum and route")
    assert "p = 0.630 after Holm" in text
    assert "would show a true difference of 0.040 in four of five cases" in text


def test_what_the_family_costs_is_a_hint():
    text = verdict_sentence(replace(AHEAD, p_value=0.02, p_adjusted=0.09))
    assert text.startswith("No difference shown")
    assert "p = 0.020 before Holm: a hint, no more" in text


def test_a_small_p_value_alone_is_not_enough():
    text = verdict_sentence(replace(AHEAD, difference=Estimate(0.01, -0.001, 0.02)))
    assert text.startswith("No difference shown")
    assert "the interval of the bootstrap holds 0" in text


@pytest.mark.parametrize(
    ("low", "words"),
    [(0.02, "mixed effects): [+0.020, +0.250]."), (-0.02, "which holds 0: it may come out otherwise")],
)
def test_seeds_have_their_say(low, words):
    text = verdict_sentence(replace(AHEAD, per_seed={1: 0.1, 2: 0.2}, mixed=Estimate(0.138, low, 0.25)))
    assert "is ahead of" in text
    assert "300 questions in 120 clusters, 2 seeds" in text
    assert words in text
    assert ("holds 0" in text) is (low < 0)


def test_too_few_clusters_show_nothing_whatever_the_numbers():
    text = verdict_sentence(replace(AHEAD, num_clusters=5, detectable=math.inf))
    assert "cannot show any difference" in text
    assert "ahead" not in text
