"""Rules, filters and noise, each against its plain definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.fusion import (
    Choice,
    CombineRule,
    HeadLayout,
    Row,
    Sampling,
    SeenTokens,
    choose,
    decide,
    decide_all,
    drawn_expert,
    drawn_experts,
    fuse,
    needs_router,
    next_best,
    softmax,
    softplus,
    top_candidates,
    without_expert,
)
from fusionroute.noise import gumbel_noise
from fusionroute.sampling import logsumexp, logsumexps

FULL = HeadLayout(num_experts=3, has_gate=True, has_sum_gate=True)
#                   routing          gate                  sum gate
SCORES = np.array([0.1, 2.0, -1.0, 0.0, 1.0, 3.0, 2.0, 0.5], np.float32)
WIDTH = 40

rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=WIDTH).map(
    lambda v: np.array(v, np.float32)
)


def row(seed: int, width: int = WIDTH) -> Row:
    return np.random.default_rng(seed).normal(0, 3, width).astype(np.float32)


def log_softmax(values: Row) -> np.ndarray:
    exact = values.astype(np.float64)
    return exact - np.log(np.exp(exact - exact.max()).sum()) - exact.max()


def test_the_sum_rule_asks_the_routed_expert_and_adds_its_logits_to_the_routers() -> None:
    decision = decide(CombineRule.SUM, FULL, SCORES)
    assert decision.expert == 1
    np.testing.assert_allclose(decision.weights, softmax(SCORES[:3]))
    np.testing.assert_array_equal(fuse(CombineRule.SUM, decision, row(1), row(2)), row(1) + row(2))


def test_raw_logits_and_log_probabilities_choose_the_same_token() -> None:
    decision = decide(CombineRule.SUM, FULL, SCORES)
    for seed in range(50):
        e, r = row(seed), row(1000 + seed)
        raw = fuse(CombineRule.SUM, decision, e, r)
        logs = fuse(
            CombineRule.SUM, decision, log_softmax(e).astype(np.float32), log_softmax(r).astype(np.float32)
        )
        assert choose(raw, Sampling(), 0).token_id == choose(logs, Sampling(), 0).token_id


def test_a_sum_gate_of_zero_is_the_plain_sum() -> None:
    scores = SCORES.copy()
    scores[-1] = 0.0
    decision = decide(CombineRule.GATED_SUM, FULL, scores)
    assert decision.complement == pytest.approx(1.0, abs=1e-12)
    scores[-1] = 1.5
    decision = decide(CombineRule.GATED_SUM, FULL, scores)
    assert decision.complement == pytest.approx(math.log1p(math.exp(1.5 + math.log(math.e - 1))))
    fused = fuse(CombineRule.GATED_SUM, decision, row(1), row(2))
    np.testing.assert_allclose(fused, row(1) + decision.complement * row(2), rtol=1e-5)


def test_mixture_is_the_log_of_the_gate_weighted_mean_of_probabilities() -> None:
    decision = decide(CombineRule.MIXTURE, FULL, SCORES)
    assert decision.expert == 2
    gate = softmax(SCORES[3:7]).astype(np.float64)
    np.testing.assert_allclose(decision.weights, gate, rtol=1e-6)
    fused = fuse(CombineRule.MIXTURE, decision, row(1), row(2))
    wanted = np.log((1 - gate[-1]) * np.exp(log_softmax(row(1))) + gate[-1] * np.exp(log_softmax(row(2))))
    np.testing.assert_allclose(fused, wanted, atol=1e-5)


def test_mixture_asks_nobody_where_the_router_has_all_the_weight() -> None:
    scores = SCORES.copy()
    scores[6] = 30.0
    decision = decide(CombineRule.MIXTURE, FULL, scores)
    assert decision.expert is None
    np.testing.assert_array_equal(fuse(CombineRule.MIXTURE, decision, None, row(2)), row(2))


def test_select_asks_an_expert_only_where_one_has_the_largest_weight() -> None:
    assert decide(CombineRule.SELECT, FULL, SCORES).expert == 2
    decision = decide(CombineRule.SELECT, FULL, SCORES)
    np.testing.assert_array_equal(fuse(CombineRule.SELECT, decision, row(1), row(2)), row(1))
    scores = SCORES.copy()
    scores[6] = 3.5
    assert decide(CombineRule.SELECT, FULL, scores).expert is None


def test_route_is_the_expert_alone_and_router_the_router_alone() -> None:
    decision = decide(CombineRule.ROUTE, FULL, SCORES)
    np.testing.assert_array_equal(fuse(CombineRule.ROUTE, decision, row(1), row(2)), row(1))
    assert decide(CombineRule.ROUTER, FULL, SCORES).expert is None


def test_a_fixed_expert_replaces_the_routed_one_and_alone_needs_no_router() -> None:
    assert decide(CombineRule.SUM, FULL, SCORES, given_expert=2).expert == 2
    assert not needs_router(CombineRule.ROUTE, 2)
    assert needs_router(CombineRule.ROUTE, None)
    assert needs_router(CombineRule.SUM, 2)
    assert decide(CombineRule.ROUTE, FULL, None, given_expert=2).expert == 2


@pytest.mark.parametrize("rule", [CombineRule.SUM, CombineRule.ROUTE, CombineRule.GATED_SUM])
def test_the_next_best_expert_has_the_next_routing_weight(rule: CombineRule) -> None:
    """Routing scores are 0.1, 2 and -1."""
    decision = decide(rule, FULL, SCORES)
    assert decision.expert == 1
    there = [next_best(rule, decision, up.__contains__) for up in ({0, 2}, {2}, {1, 2})]
    assert [d.expert for d in there if d is not None] == [0, 2, 1]
    for other in there:
        assert other is not None
        assert (other.weights is decision.weights, other.complement) == (True, decision.complement)
    assert next_best(rule, decision, lambda index: False) is None


@pytest.mark.parametrize("rule", [CombineRule.MIXTURE, CombineRule.SELECT])
def test_under_a_gate_the_router_competes_with_its_weight(rule: CombineRule) -> None:
    """Gate scores are 0, 1 and 3, the router's 2: the third expert is picked, then the router, then the second."""
    decision = decide(rule, FULL, SCORES)
    assert decision.expert == 2
    router = next_best(rule, decision, lambda index: index in (0, 1))
    assert router is not None and router.expert is None
    weak_router = SCORES.copy()
    weak_router[6] = 0.5
    decision = decide(rule, FULL, weak_router)
    second = next_best(rule, decision, lambda index: index in (0, 1))
    assert second is not None and second.expert == 1
    first = next_best(rule, decision, lambda index: index == 0)
    assert first is not None and first.expert is None
    nobody = next_best(rule, decision, lambda index: False)
    assert nobody is not None and nobody.expert is None


@pytest.mark.parametrize("rule", [rule for rule in CombineRule if not rule.asks_several])
def test_without_its_expert_a_token_is_the_routers(rule: CombineRule) -> None:
    decision, router = decide(rule, FULL, SCORES), row(2)
    assert fuse(rule, without_expert(decision), None, router) is router


def test_rules_without_their_gate_are_not_available() -> None:
    plain = (CombineRule.SUM, CombineRule.ROUTE, CombineRule.ROUTER, CombineRule.ENSEMBLE)
    assert HeadLayout(3).available_rules() == plain
    assert set(FULL.available_rules()) == set(CombineRule) - {CombineRule.PROXY}
    assert set(FULL.available_rules(has_base=True)) == set(CombineRule)


def test_an_ensemble_is_the_normalised_geometric_mean_of_all_experts_and_asks_no_router() -> None:
    assert not needs_router(CombineRule.ENSEMBLE, None)
    decision = decide(CombineRule.ENSEMBLE, FULL, None)
    assert (decision.expert, decision.others, len(decision.weights)) == (None, (0, 1, 2), 0)
    experts = [row(seed) for seed in (1, 2, 3)]
    before = [each.copy() for each in experts]
    fused = fuse(CombineRule.ENSEMBLE, decision, None, None, experts)
    assert fused.dtype == np.float32
    mean = np.mean([log_softmax(each) for each in experts], axis=0)
    np.testing.assert_allclose(log_softmax(fused), log_softmax(mean), atol=1e-5)
    np.testing.assert_array_equal(experts, before)


def test_proxy_tuning_adds_the_router_and_takes_the_base_away() -> None:
    decision = decide(CombineRule.PROXY, FULL, SCORES)
    assert (decision.expert, decision.others) == (1, (3,))
    np.testing.assert_allclose(decision.weights, softmax(SCORES[:3]))
    assert decide(CombineRule.PROXY, FULL, SCORES, given_expert=2).expert == 2
    e, r, b = row(1), row(2), row(3)
    fused = fuse(CombineRule.PROXY, decision, e, r, [b])
    np.testing.assert_array_equal(fused, (e + r) - b)
    np.testing.assert_array_equal(fuse(CombineRule.PROXY, decision, e, r, [r]), (e + r) - r)
    np.testing.assert_array_equal((e, r, b), (row(1), row(2), row(3)))


def splitmix(value: int) -> int:
    """The finaliser of splitmix64, of plain numbers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**20), st.integers(1, 9))
def test_a_drawn_expert_is_the_one_with_most_noise_by_definition(seed: int, position: int, n: int) -> None:
    golden = 0x9E3779B97F4A7C15
    key = splitmix((seed + splitmix((position + 1) * golden % 2**64)) % 2**64)
    bits = [splitmix((key + (2**32 + index) * golden) % 2**64) >> 12 for index in range(n)]
    assert drawn_expert(seed, position, n) == bits.index(max(bits))


def test_each_expert_is_drawn_equally_often_and_after_each_other_one() -> None:
    drawn = np.array([drawn_expert(7, position, 3) for position in range(9000)])
    pairs = np.bincount(drawn[:-1] * 3 + drawn[1:], minlength=9)
    expected = 8999 / 9
    assert ((pairs - expected) ** 2 / expected).sum() < 26.1  # chi-square of 8 degrees of freedom, 1 in 1000
    assert (drawn != [drawn_expert(8, position, 3) for position in range(9000)]).any()


def test_equal_scores_go_to_the_lowest_id() -> None:
    assert choose(np.array([1, 5, 5, 5, 0], np.float32), Sampling(), 0).token_id == 1


def test_the_logprob_is_that_of_the_fused_distribution_before_temperature_and_filters() -> None:
    fused = row(3)
    choice = choose(fused, Sampling(temperature=2.0, top_k=1, logit_bias={4: 9.0}), 0)
    assert choice.logprob == pytest.approx(log_softmax(fused)[choice.token_id], abs=1e-5)


@given(rows, st.integers(0, 2**64 - 1), st.integers(0, 5000))
def test_the_choice_is_a_pure_function_of_scores_seed_and_position(
    scores: Row, seed: int, position: int
) -> None:
    sampling = Sampling(temperature=0.8, seed=seed)
    first = choose(scores, sampling, position)
    np.random.default_rng(0).random(7)
    assert choose(scores.copy(), sampling, position) == first


@given(rows, st.floats(0.05, 5), st.integers(0, 2**64 - 1))
def test_dropping_hopeless_candidates_never_changes_the_choice(
    scores: Row, temperature: float, seed: int
) -> None:
    noise = gumbel_noise(seed, 3, np.arange(len(scores)))
    naive = int(np.argmax(scores.astype(np.float64) / temperature + noise))
    assert choose(scores, Sampling(temperature=temperature, seed=seed), 3).token_id == naive


@given(rows, st.integers(1, WIDTH + 3), st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.integers(0, 1000))
def test_filters_keep_exactly_the_tokens_of_their_definition(
    scores: Row, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:top_k]
    probabilities = np.exp(scores[order].astype(np.float64) - float(scores.max()))
    shares = probabilities / probabilities.sum()
    allowed: set[int] = set()
    before = 0.0
    for token, probability, share in zip(order, probabilities, shares, strict=True):
        if allowed and (before >= top_p + 1e-9 or probability < min_p - 1e-9):
            break
        allowed.add(token)
        before += share
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert {choose(scores, sampling, position).token_id for position in range(30)} <= allowed


def test_sampled_frequencies_follow_the_distribution() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = 20_000
    counts = np.bincount(
        [choose(scores, Sampling(temperature=1.0, seed=11), position).token_id for position in range(draws)],
        minlength=4,
    )
    expected = draws * np.exp(scores)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 16.27  # 99.9 % quantile at 3 degrees of freedom


def test_noise_differs_between_seeds_positions_and_ids_and_is_gumbel() -> None:
    ids = np.arange(50_000)
    noise = gumbel_noise(1, 2, ids)
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)
    for other in (gumbel_noise(2, 2, ids), gumbel_noise(1, 3, ids)):
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02


def test_repetition_penalty_covers_the_prompt_the_others_only_the_answer() -> None:
    seen = SeenTokens([0, 1])
    seen.add(1)
    seen.add(2)
    seen.add(2)
    scores = np.array([4.0, 4.0, -4.0, 4.0], np.float32)
    repeated = Sampling(repetition_penalty=2.0)
    assert choose(scores, repeated, 0, seen) == Choice(3, pytest.approx(log_softmax(scores)[3], abs=1e-5))
    frequent = Sampling(presence_penalty=0.5, frequency_penalty=1.0, logit_bias={3: -1.2, 2: 7.9})
    # scores: 4.0, 4 - 0.5 - 1 = 2.5, -4 - 0.5 - 2 + 7.9 = 1.4, 2.8
    assert choose(scores, frequent, 0, seen).token_id == 0
    assert choose(np.array([0.0, 4.0, 4.0, 0.0], np.float32), frequent, 0, seen).token_id == 2


def test_seen_tokens_grow_beyond_their_first_room() -> None:
    seen = SeenTokens(range(100))
    for token in range(50, 300):
        seen.add(token)
    assert list(seen.ids) == list(range(300))
    assert list(seen.counts) == [0.0] * 50 + [1.0] * 250


def test_a_bias_can_force_and_forbid_a_token() -> None:
    fused = row(5)
    assert choose(fused, Sampling(logit_bias={7: 100.0}), 0).token_id == 7
    best = int(np.argmax(fused))
    assert choose(fused, Sampling(logit_bias={best: -100.0}), 0).token_id != best


def test_top_candidates_come_best_first_with_their_log_probabilities() -> None:
    values = np.array([1, 3, 3, 2], np.float32)
    top = top_candidates(values, 3)
    assert [candidate.token_id for candidate in top] == [1, 2, 3]
    assert top[0].logprob == pytest.approx(log_softmax(values)[1], abs=1e-6)
    assert len(top_candidates(values, 9)) == 4


def test_softplus_is_stable_at_both_ends() -> None:
    assert softplus(800.0) == 800.0
    assert softplus(-800.0) == 0.0
    assert softplus(0.0) == pytest.approx(math.log(2))


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
def test_sparing_candidates_their_noise_never_changes_the_choice_in_a_large_vocabulary(spread: float) -> None:
    width = 5000
    for seed in range(40):
        scores = np.random.default_rng(seed).normal(0, spread, width).astype(np.float32)
        naive = int(np.argmax(scores.astype(np.float64) + gumbel_noise(seed, 9, np.arange(width))))
        assert choose(scores, Sampling(temperature=1.0, seed=seed), 9).token_id == naive


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_the_sorted_whole(top_p: float) -> None:
    scores = np.random.default_rng(3).normal(0, 1.0, 3000).astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    shares = np.exp(scores[order].astype(np.float64))
    count = int(np.searchsorted(np.cumsum(shares) / shares.sum(), top_p)) + 1
    assert 64 < count < 3000
    kept = np.full_like(scores, -np.inf)
    kept[order[:count]] = scores[order[:count]]
    for seed in range(100):
        noise = gumbel_noise(seed, 0, np.arange(3000))
        naive = int(np.argmax(kept.astype(np.float64) + noise))
        assert choose(scores, Sampling(temperature=1.0, top_p=top_p, seed=seed), 0).token_id == naive


def test_a_token_that_mixture_gives_no_probability_can_still_be_forced() -> None:
    far = np.array([0.0, -500.0], np.float32)
    fused = fuse(CombineRule.MIXTURE, decide(CombineRule.MIXTURE, FULL, SCORES), far, far)
    assert choose(fused, Sampling(logit_bias={1: 100.0}), 0).token_id == 1


@pytest.mark.parametrize("has_scores", [True, False])
def test_decisions_of_several_rules_and_tokens_are_those_of_each(has_scores: bool) -> None:
    layout, rng = HeadLayout(5, has_gate=True, has_sum_gate=True), np.random.default_rng(3)
    scores = rng.normal(size=(40, 12)).astype(np.float32) * 4 if has_scores else None
    rules = list(CombineRule) if has_scores else [CombineRule.ROUTE, CombineRule.ENSEMBLE]
    given: list[list[int | None]] = [
        [place % 5 if which % 2 else None for place in range(40)] for which in range(9)
    ]
    if not has_scores:
        given = [[3] * 40] * 2
    found = decide_all(rules, layout, scores, given[: len(rules)])
    for rule, experts, of_rule in zip(rules, given, found, strict=False):
        for place, decision in enumerate(of_rule):
            alone = decide(rule, layout, None if scores is None else scores[place], experts[place])
            assert decision.weights.tobytes() == alone.weights.tobytes()
            mine, its = ((each.expert, each.complement, each.others) for each in (decision, alone))
            assert mine == its


@pytest.mark.parametrize("width", [1, 7, 8, 65, 129, 4096])
def test_many_rows_at_once_have_the_bits_of_each_alone(width: int) -> None:
    rows = np.random.default_rng(width).normal(size=(33, width)).astype(np.float32) * 9
    assert logsumexps(rows) == [logsumexp(row) for row in rows]
    assert softmax(rows).tobytes() == b"".join(softmax(row).tobytes() for row in rows)


def test_experts_of_many_positions_are_those_of_each() -> None:
    drawn = drawn_experts(77, 5, 200, 4)
    assert drawn == [drawn_expert(77, 5 + place, 4) for place in range(200)]
    assert set(drawn) == {0, 1, 2, 3}
