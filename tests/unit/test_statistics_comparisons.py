"""Cells and comparisons from outcomes: hand-computed small cases, equivalences, and what is refused."""

from __future__ import annotations

import math
import random

import pytest

from evaluation.findings import ALL, NLL, Cell, Comparison
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.statistics.cells import cells, weighted_cells
from evaluation.statistics.comparing import compare, weighted_compare
from evaluation.statistics.intervals import paired_difference, wilson_interval
from evaluation.statistics.mixed import crossed_mean
from evaluation.statistics.panels import divisions_of, strata_names

PAIR = [("a", "b")]


def question(number: int, cluster: str = "", group: str = "gap") -> Question:
    return Question(f"t/{number}", "t", "?", cluster=cluster, strata={"group": group})


def scored(system: str, scores, *, seed: int = 0, clusters=None, group: str = "gap") -> list[Outcome]:
    """Outcomes of as many questions as there are scores."""
    clusters = clusters or [""] * len(scores)
    return [
        Outcome(question(at, cluster, group), system, seed, Answer("", True), Verdict(float(score)))
        for at, (score, cluster) in enumerate(zip(scores, clusters, strict=True))
    ]


def forced(system: str, logprobs, tokens, *, clusters, seed: int = 0) -> list[Outcome]:
    return [
        Outcome(question(at, cluster), system, seed, Answer("", True, number, logprob), Verdict(0.0))
        for at, (logprob, number, cluster) in enumerate(zip(logprobs, tokens, clusters, strict=True))
    ]


def one(outcomes, **options) -> Comparison:
    (found,) = compare(outcomes, PAIR, [ALL], **options)
    return found


def cell(outcomes, system: str = "a", stratum: str = ALL) -> Cell:
    (found,) = cells(outcomes, [system], [stratum])
    return found


def coins(number: int, chance: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [float(draw.random() < chance) for _ in range(number)]


def test_one_seed_of_independent_questions_has_wilsons_interval():
    found = cell(scored("a", [1] * 7 + [0] * 3))
    assert found.estimate == wilson_interval(7, 10)
    assert (found.num_questions, found.per_seed) == (10, {0: 0.7})


def test_asking_every_question_thrice_within_its_cluster_adds_no_certainty_to_a_cell():
    once = cell(scored("a", [1] * 14 + [0] * 6, clusters=[f"c{n}" for n in range(20)])).estimate
    thrice = cell(scored("a", ([1] * 14 + [0] * 6) * 3, clusters=[f"c{n}" for n in range(20)] * 3)).estimate
    assert thrice.value == pytest.approx(once.value)
    assert thrice.high - thrice.low >= once.high - once.low
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.1)


def test_all_right_counts_clusters_not_questions():
    found = cell(scored("a", [1] * 30, clusters=["x", "y", "z"] * 10))
    assert found.estimate == wilson_interval(3, 3)
    several = [
        each for seed in (1, 2) for each in scored("a", [1] * 30, clusters=["x", "y", "z"] * 10, seed=seed)
    ]
    assert cell(several).estimate == wilson_interval(3, 3)


def test_with_several_seeds_the_value_is_the_mean_of_the_seeds_means():
    outcomes = [*scored("a", [1, 1, 0, 0], seed=1), *scored("a", [1, 1, 1, 0], seed=2)]
    found = cell(outcomes)
    assert found.per_seed == {1: 0.5, 2: 0.75}
    assert found.estimate.value == 0.625
    assert 0.0 <= found.estimate.low < 0.5
    assert 0.75 < found.estimate.high <= 1.0


def test_cells_come_by_system_and_stratum_and_know_task_and_strata():
    outcomes = [*scored("a", [1, 0]), *scored("b", [0, 0])]
    found = cells(outcomes, ["b", "a"], [ALL, "task=t", "group=gap"])
    assert [(each.system, each.stratum) for each in found] == [
        (system, stratum) for system in "ba" for stratum in (ALL, "task=t", "group=gap")
    ]
    assert strata_names(divisions_of(outcomes)) == (ALL, "group=gap", "task=t")


def test_a_comparison_of_ten_questions_is_the_hand_computed_one():
    found = one([*scored("a", [1, 1, 1, 1, 1, 1, 1, 0, 1, 0]), *scored("b", [0, 0, 0, 0, 0, 0, 0, 1, 1, 0])])
    assert found.difference.value == pytest.approx(0.6)
    assert (found.only_first, found.only_second) == (7, 1)
    assert found.p_value == found.mcnemar == found.p_adjusted == pytest.approx(2 * 9 / 256)
    assert (found.over_seeds, found.mixed) == (None, None)
    assert found.per_seed == {0: pytest.approx(0.6)}
    assert (found.num_questions, found.num_clusters) == (10, 10)
    # sqrt(8) / 10 for eight questions answered differently
    assert found.detectable == pytest.approx((1.959964 + 0.841621) * math.sqrt(8) / 10, rel=1e-6)


def test_with_one_question_in_each_cluster_the_p_value_is_mcnemars_far_out_too():
    found = one([*scored("a", coins(97, 0.8, 1)), *scored("b", coins(97, 0.4, 2))])
    assert found.only_first + found.only_second > 30
    assert found.p_value == pytest.approx(found.mcnemar, rel=1e-9)


def test_an_interval_of_scores_ends_where_scores_end():
    found = one([*scored("a", [1] * 7), *scored("b", [0] * 6 + [1])])
    assert found.difference.value == pytest.approx(6 / 7)
    assert found.difference.high == 1.0


def test_the_mixed_summary_is_that_of_the_table_of_seeds_and_questions():
    first = {seed: coins(25, 0.7, seed) for seed in (1, 2, 3)}
    second = {seed: coins(25, 0.5, 50 + seed) for seed in (1, 2, 3)}
    expected = crossed_mean(
        [[a - b for a, b in zip(first[seed], second[seed], strict=True)] for seed in first]
    )
    clusters = [str(at) for at in range(25)]
    for times in (1, 2):  # asking all questions twice weighs nothing more
        asked = clusters * times
        outcomes = [
            each for seed in first for each in scored("a", first[seed] * times, seed=seed, clusters=asked)
        ]
        outcomes += [
            each for seed in first for each in scored("b", second[seed] * times, seed=seed, clusters=asked)
        ]
        found = one(outcomes).mixed
        assert found is not None
        assert (found.value, found.low, found.high) == pytest.approx(
            (expected.value, expected.low, expected.high)
        )


def test_swapping_the_systems_turns_everything_around():
    outcomes = [*scored("a", coins(80, 0.7, 1)), *scored("b", coins(80, 0.5, 2))]
    there, back = (compare(outcomes, [pair], [ALL])[0] for pair in (("a", "b"), ("b", "a")))
    assert back.difference.value == -there.difference.value
    assert (back.difference.low, back.difference.high) == pytest.approx(
        (-there.difference.high, -there.difference.low)
    )
    assert (back.p_value, back.detectable) == (there.p_value, there.detectable)
    assert (back.only_first, back.only_second) == (there.only_second, there.only_first)


def test_a_constant_difference_has_an_interval_of_no_width():
    clusters = ["x", "x", "y"]
    found = one(
        [*scored("a", [1.0, 0.5, 0.75], clusters=clusters), *scored("b", [0.5, 0.0, 0.25], clusters=clusters)]
    )
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.5, 0.5, 0.5)


def test_with_many_clusters_the_interval_is_that_of_the_plain_paired_bootstrap():
    first, second = coins(400, 0.7, 1), coins(400, 0.6, 2)
    clusters = [f"c{at % 150}" for at in range(400)]
    found = one([*scored("a", first, clusters=clusters), *scored("b", second, clusters=clusters)])
    plain = paired_difference(first, second, clusters)
    assert found.difference.value == pytest.approx(plain.value)
    assert (found.difference.low, found.difference.high) == pytest.approx((plain.low, plain.high), abs=0.006)


def test_repeating_every_question_within_its_cluster_adds_no_certainty_to_a_difference():
    first, second, clusters = coins(40, 0.7, 1), coins(40, 0.5, 2), [f"c{at}" for at in range(40)]
    once = one([*scored("a", first, clusters=clusters), *scored("b", second, clusters=clusters)])
    thrice = one(
        [*scored("a", first * 3, clusters=clusters * 3), *scored("b", second * 3, clusters=clusters * 3)]
    )
    alone = one([*scored("a", first * 3), *scored("b", second * 3)])
    assert thrice.difference.low == pytest.approx(once.difference.low, abs=0.04)
    assert thrice.difference.high == pytest.approx(once.difference.high, abs=0.04)
    assert (thrice.p_value, thrice.detectable) == pytest.approx((once.p_value, once.detectable))
    assert alone.difference.high - alone.difference.low < thrice.difference.high - thrice.difference.low
    assert alone.detectable < thrice.detectable


def test_pairing_cancels_what_both_systems_find_hard():
    easy_or_hard = [float(at % 2) for at in range(100)]
    found = one([*scored("a", easy_or_hard), *scored("b", easy_or_hard)])
    assert (found.difference.low, found.difference.high) == (0.0, 0.0)
    assert not found.difference.excludes_zero


def test_identical_systems_differ_by_nothing_and_have_no_evidence():
    scores = coins(60, 0.5, 3)
    outcomes = [each for seed in (1, 2, 3) for name in "ab" for each in scored(name, scores, seed=seed)]
    found = one(outcomes)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.0, 0.0, 0.0)
    assert (found.p_value, found.mcnemar) == (1.0, 1.0)
    assert found.mixed is not None and found.over_seeds is not None
    assert (found.mixed.low, found.mixed.high, found.over_seeds.low) == (0.0, 0.0, 0.0)
    assert 0.1 < found.detectable < 0.15  # six of sixty would have to differ: not nothing


def test_a_system_that_is_better_is_found():
    outcomes = []
    for seed in (1, 2, 3):
        outcomes += scored("a", coins(300, 0.7, seed), seed=seed) + scored(
            "b", coins(300, 0.5, 10 + seed), seed=seed
        )
    found = one(outcomes)
    assert found.p_value < 1e-6
    assert found.difference.low > 0.1
    assert found.mixed is not None
    assert found.mixed.low > 0.05
    assert found.detectable < found.difference.value


def test_questions_of_one_cluster_count_as_one_for_the_p_value_but_not_for_mcnemar():
    clusters = [f"c{at // 4}" for at in range(16)]
    found = one([*scored("a", [1] * 16, clusters=clusters), *scored("b", [0] * 16, clusters=clusters)])
    assert found.p_value == 2 / 2**4
    assert found.mcnemar == pytest.approx(2 / 2**16)
    assert found.detectable == math.inf  # four clusters can never be significant


def test_a_single_cluster_leaves_everything_open():
    found = one([*scored("a", [1, 1], clusters=["c", "c"]), *scored("b", [0, 1], clusters=["c", "c"])])
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.5, -1.0, 1.0)
    assert not found.is_significant


def test_holms_family_is_all_comparisons_of_a_call():
    outcomes = [*scored("a", [1] * 8 + [0] * 8), *scored("b", [0] * 16), *scored("c", [0] * 16)]
    alone = one(outcomes)
    first, *_, null = compare(outcomes, [("a", "b"), ("a", "c"), ("b", "c")], [ALL])
    assert alone.p_adjusted == alone.p_value
    assert first.p_adjusted == pytest.approx(3 * first.p_value)
    assert null.p_adjusted == 1.0


def test_order_of_outcomes_and_other_systems_change_nothing_and_every_run_is_the_same():
    outcomes = [each for seed in (1, 2) for at, name in enumerate("abc")
                for each in scored(name, coins(50, 0.6, 3 * seed + at), seed=seed)]  # fmt: skip
    mixed_up = outcomes[:]
    random.Random(0).shuffle(mixed_up)
    once = compare(outcomes, PAIR, [ALL, "task=t"])
    assert compare(mixed_up, PAIR, [ALL, "task=t"]) == once
    assert (
        compare([each for each in outcomes if each.system != "c"], PAIR, ["task=t"])[0].difference
        == once[1].difference
    )
    assert one(outcomes, seed=1).difference != once[0].difference


def test_seeds_may_have_questions_of_their_own():
    outcomes = []
    for seed in (1, 2, 3):
        clusters = [f"{seed}/{at // 2}" for at in range(100)]
        outcomes += scored("a", coins(100, 0.8, seed), seed=seed, clusters=clusters)
        outcomes += scored("b", coins(100, 0.5, 20 + seed), seed=seed, clusters=clusters)
    found = one(outcomes)
    assert found.num_clusters == 150
    assert found.mixed is not None
    assert found.mixed.value == pytest.approx(found.difference.value)
    assert found.difference.excludes_zero
    assert found.mixed.low < found.difference.value < found.mixed.high


def test_seeds_of_different_lengths_weigh_the_same():
    outcomes = [*scored("a", [1] * 10, seed=1), *scored("b", [0] * 10, seed=1)]
    outcomes += [*scored("a", [0] * 30, seed=2), *scored("b", [0] * 30, seed=2)]
    found = one(outcomes)
    assert found.difference.value == 0.5
    assert found.num_questions == 10


def test_the_loss_is_the_sum_over_tokens_not_the_mean_of_means():
    outcomes = forced("a", [-2.0, -30.0], [2, 10], clusters=["x", "y"])
    (found,) = weighted_cells(outcomes, ["a"], [ALL])
    assert found.estimate.value == pytest.approx(32 / 12)
    assert found.estimate.low == 0.0  # two documents say little, but no loss is negative
    assert found.estimate.high > 3.0
    assert found.measure == NLL


def test_losses_weighted_by_ones_are_compared_as_scores_are():
    first, second, clusters = coins(120, 0.6, 1), coins(120, 0.5, 2), [f"c{at // 3}" for at in range(120)]
    right = one([*scored("a", first, clusters=clusters), *scored("b", second, clusters=clusters)])
    outcomes = forced("a", [-x for x in first], [1] * 120, clusters=clusters)
    outcomes += forced("b", [-x for x in second], [1] * 120, clusters=clusters)
    (loss,) = weighted_compare(outcomes, PAIR, [ALL])
    assert loss.difference == right.difference
    assert loss.p_value == right.p_value
    assert (loss.only_first, loss.only_second) == (right.only_second, right.only_first)
    assert loss.mcnemar is None


def test_a_smaller_loss_is_found():
    draw = random.Random(5)
    tokens, clusters = [draw.randint(5, 40) for _ in range(200)], [f"doc{at // 4}" for at in range(200)]
    worse = [-1.5 * n + draw.gauss(0, 2) for n in tokens]
    better = [each + 0.05 * n + draw.gauss(0, 0.5) for each, n in zip(worse, tokens, strict=True)]
    outcomes = [
        *forced("a", better, tokens, clusters=clusters),
        *forced("b", worse, tokens, clusters=clusters),
    ]
    (found,) = weighted_compare(outcomes, PAIR, [ALL])
    assert found.difference.high < 0.0
    assert found.p_value < 1e-6
    assert found.only_first > found.only_second


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ([*scored("a", [1, 0, 1]), *scored("b", [1])], r"'b' lacks 't/1' of seed 0, 't/2' of seed 0"),
        ([*scored("a", [1]), *scored("b", [1] * 9)], r"'a' lacks .* and 5 more"),
        ([*scored("a", [1]), *scored("b", [1], seed=3)], r"'b' lacks 't/0' of seed 0"),
        (scored("a", [1]), "no outcome of the system 'b'"),
        (scored("a", [1]) * 2, "'a' answered question 't/0' of seed 0 twice"),
        ([*scored("a", [1]), *scored("b", [1], group="domain")], "two questions of seed 0 have the id 't/0'"),
        ([*scored("a", [1.5]), *scored("b", [1])], "score = 1.5 of question 't/0'"),
    ],
)
def test_what_cannot_be_paired_is_refused_and_named(outcomes, message):
    with pytest.raises(ValueError, match=message):
        compare(outcomes, PAIR, [ALL])


@pytest.mark.parametrize("stratum", ["group=domain", "colour=red", "gap"])
def test_a_stratum_without_questions_is_refused(stratum):
    with pytest.raises(ValueError, match=f"stratum = '{stratum}'"):
        cells(scored("a", [1, 0]), ["a"], [stratum])


def test_losses_of_other_tokens_are_not_compared_and_missing_ones_are_named():
    outcomes = [*forced("a", [-1.0], [2], clusters=["x"]), *forced("b", [-1.0], [3], clusters=["x"])]
    with pytest.raises(ValueError, match=r"'t/0' of seed 0 has 2 tokens for 'a' and 3 for 'b'"):
        weighted_compare(outcomes, PAIR, [ALL])
    with pytest.raises(ValueError, match="'a' gave no number of tokens"):
        weighted_cells(forced("a", [-1.0], [0], clusters=["x"]), ["a"], [ALL])
    with pytest.raises(ValueError, match="'a' gave no log-probability"):
        weighted_cells(forced("a", [None], [2], clusters=["x"]), ["a"], [ALL])
    with pytest.raises(ValueError, match="num_clusters = 1"):
        weighted_cells(forced("a", [-1.0], [2], clusters=["x"]), ["a"], [ALL])
