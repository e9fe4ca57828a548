"""The losses against their closed forms, and at the edges where a mean has nothing to average."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.losses import (
    expert_loss,
    expert_loss_tokens,
    gate_loss,
    gold_loss,
    informative_tokens,
    lm_loss,
    sft_loss,
    sum_gate_factor,
    sum_gate_loss,
)

NUM_TOKENS, NUM_EXPERTS, WIDTH = 7, 3, 11


def make_logprobs(*shape: int, seed: int = 0) -> torch.Tensor:
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5


def make_normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every(value: bool) -> torch.Tensor:
    return torch.full((NUM_TOKENS,), value)


def test_the_routing_gradient_equals_its_closed_form() -> None:
    scores = make_normal(NUM_TOKENS, NUM_EXPERTS).requires_grad_()
    nll = -make_logprobs(NUM_TOKENS, NUM_EXPERTS)
    informative = torch.tensor([True, False, True, True, False, True, True])

    expert_loss(scores, -nll, informative).backward()

    weights = torch.softmax(scores.detach(), dim=1)
    expected = weights * (nll - (weights * nll).sum(dim=1, keepdim=True)) / informative.sum()
    expected[~informative] = 0
    torch.testing.assert_close(scores.grad, expected)


def test_an_empty_informative_set_gives_zero_with_a_gradient() -> None:
    scores = make_normal(NUM_TOKENS, NUM_EXPERTS).requires_grad_()

    loss = expert_loss(scores, make_logprobs(NUM_TOKENS, NUM_EXPERTS), every(False))
    loss.backward()

    assert loss.item() == 0
    assert scores.grad is not None
    assert torch.count_nonzero(scores.grad) == 0


@pytest.mark.parametrize("garbage", [math.nan, -math.inf])
def test_labels_outside_the_informative_set_cannot_spoil_loss_or_gradient(garbage: float) -> None:
    scores = make_normal(NUM_TOKENS, NUM_EXPERTS).requires_grad_()
    gold_logprobs = make_logprobs(NUM_TOKENS, NUM_EXPERTS)
    informative = every(True)
    informative[2] = False
    gold_logprobs[2] = garbage

    loss = expert_loss(scores, gold_logprobs, informative)
    loss.backward()

    assert scores.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def test_the_mixture_is_the_negative_log_of_the_experts_weighted_mean() -> None:
    scores = make_normal(NUM_TOKENS, NUM_EXPERTS).requires_grad_()
    gold_logprobs = make_logprobs(NUM_TOKENS, NUM_EXPERTS)
    informative = torch.tensor([True, False, True, True, False, True, True])

    loss = expert_loss(scores, gold_logprobs, informative, aggregate="mixture")
    loss.backward()

    weighted = torch.softmax(scores.detach(), dim=1) * gold_logprobs.exp()
    torch.testing.assert_close(loss, -weighted.sum(1)[informative].log().mean())
    gradient = torch.softmax(scores.detach(), dim=1) - weighted / weighted.sum(1, keepdim=True)
    gradient[~informative] = 0
    torch.testing.assert_close(scores.grad, gradient / informative.sum())


@pytest.mark.parametrize("aggregate", ["linear", "mixture"])
def test_an_empty_set_gives_zero_under_either_aggregate(aggregate) -> None:
    scores = make_normal(NUM_TOKENS, NUM_EXPERTS).requires_grad_()
    garbage = torch.full((NUM_TOKENS, NUM_EXPERTS), -math.inf)
    loss = expert_loss(scores, garbage, every(False), aggregate=aggregate)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert torch.count_nonzero(scores.grad) == 0


@pytest.mark.parametrize("aggregate", ["linear", "mixture"])
def test_with_one_expert_the_routing_head_has_nothing_to_learn(aggregate) -> None:
    scores = make_normal(NUM_TOKENS, 1).requires_grad_()
    gold_logprobs = make_logprobs(NUM_TOKENS, 1)
    loss = expert_loss(scores, gold_logprobs, every(True), aggregate=aggregate)
    loss.backward()
    torch.testing.assert_close(loss, -gold_logprobs.mean())
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores))


def test_no_rows_at_all_give_zero_losses_that_still_touch_the_graph() -> None:
    scores, logprobs = torch.zeros(0, NUM_EXPERTS), torch.zeros(0)
    for leaf, loss in (
        (scores.requires_grad_(), expert_loss(scores, torch.zeros(0, NUM_EXPERTS), torch.zeros(0).bool())),
        (logprobs.requires_grad_(), gold_loss(logprobs)),
    ):
        loss.backward()
        assert loss.item() == 0
        assert leaf.grad is not None


def test_the_expert_loss_looks_at_disagreement_or_at_all_targets() -> None:
    argmax_ids, supervised = torch.tensor([[1, 1], [1, 2], [3, 4]]), torch.tensor([True, True, False])
    assert expert_loss_tokens(argmax_ids, supervised, "informative").tolist() == [False, True, False]
    assert expert_loss_tokens(argmax_ids, supervised, "all").tolist() == [True, True, False]


def test_the_language_loss_of_gold_log_probs_is_that_of_the_rows() -> None:
    logits, gold = make_normal(NUM_TOKENS, WIDTH), torch.arange(NUM_TOKENS)
    logprobs = torch.log_softmax(logits, 1)[gold, gold]
    torch.testing.assert_close(gold_loss(logprobs), lm_loss(logits, gold, every(True)))
    torch.testing.assert_close(gold_loss(logprobs, 1), lm_loss(logits, gold, every(True), denominator=1))


def test_equal_experts_leave_the_informative_set_empty() -> None:
    argmax_ids = torch.arange(NUM_TOKENS)[:, None].expand(-1, NUM_EXPERTS)
    assert not informative_tokens(argmax_ids, every(True)).any()


def test_one_expert_leaves_the_informative_set_empty() -> None:
    assert not informative_tokens(torch.arange(NUM_TOKENS)[:, None], every(True)).any()


def test_only_supervised_tokens_with_disagreement_are_informative() -> None:
    argmax_ids = torch.tensor([[1, 1, 2], [1, 1, 1], [2, 1, 1], [3, 2, 1]])
    supervised = torch.tensor([True, True, True, False])
    assert informative_tokens(argmax_ids, supervised).tolist() == [True, False, True, False]


def test_the_language_loss_is_the_mean_over_supervised_tokens() -> None:
    logits = make_normal(NUM_TOKENS, WIDTH)
    gold = torch.arange(NUM_TOKENS)
    supervised = torch.tensor([True, False, True, False, False, False, True])
    expected = -torch.log_softmax(logits, 1)[supervised, gold[supervised]].mean()
    torch.testing.assert_close(lm_loss(logits, gold, supervised), expected)


def test_an_empty_response_gives_a_language_loss_of_zero() -> None:
    logits = make_normal(NUM_TOKENS, WIDTH).requires_grad_()
    loss = lm_loss(logits, torch.arange(NUM_TOKENS), every(False))
    loss.backward()
    assert loss.item() == 0


def test_micro_batches_divided_by_the_global_count_add_up_to_the_whole() -> None:
    logits, gold = make_normal(NUM_TOKENS, WIDTH), torch.arange(NUM_TOKENS)
    scores, gold_logprobs = make_normal(NUM_TOKENS, NUM_EXPERTS), make_logprobs(NUM_TOKENS, NUM_EXPERTS)
    mask = torch.tensor([True, True, True, True, True, False, False])
    cuts = [slice(0, 2), slice(2, NUM_TOKENS)]

    language = sum(lm_loss(logits[cut], gold[cut], mask[cut], denominator=5) for cut in cuts)
    expert = sum(expert_loss(scores[cut], gold_logprobs[cut], mask[cut], denominator=5) for cut in cuts)

    torch.testing.assert_close(language, lm_loss(logits, gold, mask))
    torch.testing.assert_close(expert, expert_loss(scores, gold_logprobs, mask))


def test_micro_batches_of_the_gates_divided_by_the_global_count_add_up_to_the_whole() -> None:
    gates, gold_logprobs = make_normal(NUM_TOKENS, NUM_EXPERTS + 1), make_logprobs(NUM_TOKENS, NUM_EXPERTS)
    router, gold = make_logprobs(NUM_TOKENS, seed=3), torch.arange(NUM_TOKENS)
    rows, others = make_normal(NUM_TOKENS, WIDTH), make_normal(NUM_TOKENS, WIDTH, seed=2)
    mask, u = torch.tensor([True, False, True, True, True, False, True]), gates[:, 0]
    cuts = [slice(0, 2), slice(2, NUM_TOKENS)]

    gate = sum(gate_loss(gates[cut], gold_logprobs[cut], router[cut], mask[cut], 5) for cut in cuts)
    factor = sum(sum_gate_loss(u[cut], rows[cut], others[cut], gold[cut], mask[cut], 5) for cut in cuts)

    torch.testing.assert_close(gate, gate_loss(gates, gold_logprobs, router, mask))
    torch.testing.assert_close(factor, sum_gate_loss(u, rows, others, gold, mask))


def test_the_sft_loss_is_the_language_loss_plus_a_third_of_the_expert_loss() -> None:
    logits, scores = make_normal(NUM_TOKENS, WIDTH), make_normal(NUM_TOKENS, NUM_EXPERTS)
    gold, gold_logprobs = torch.arange(NUM_TOKENS), make_logprobs(NUM_TOKENS, NUM_EXPERTS)
    argmax_ids = torch.arange(NUM_TOKENS * NUM_EXPERTS).view(NUM_TOKENS, NUM_EXPERTS)

    loss, language, expert = sft_loss(logits, scores, gold, gold_logprobs, argmax_ids, every(True))

    torch.testing.assert_close(language, lm_loss(logits, gold, every(True)))
    torch.testing.assert_close(expert, expert_loss(scores, gold_logprobs, every(True)))
    torch.testing.assert_close(loss, language + expert / 3)


def test_the_gate_loss_is_the_negative_log_of_the_mixture() -> None:
    gate_scores = make_normal(NUM_TOKENS, NUM_EXPERTS + 1)
    gold_logprobs, router = make_logprobs(NUM_TOKENS, NUM_EXPERTS), make_logprobs(NUM_TOKENS, seed=3)

    loss = gate_loss(gate_scores, gold_logprobs, router, every(True))

    weights = torch.softmax(gate_scores, dim=1)
    mixture = (weights[:, :-1] * gold_logprobs.exp()).sum(1) + weights[:, -1] * router.exp()
    torch.testing.assert_close(loss, -mixture.log().mean())


def test_the_gate_loss_sends_no_gradient_into_the_router() -> None:
    gate_scores = make_normal(NUM_TOKENS, NUM_EXPERTS + 1).requires_grad_()
    router = make_logprobs(NUM_TOKENS).requires_grad_()
    gate_loss(gate_scores, make_logprobs(NUM_TOKENS, NUM_EXPERTS), router, every(True)).backward()
    assert gate_scores.grad is not None
    assert router.grad is None


def test_the_gate_learns_to_trust_the_router_where_only_the_router_is_right() -> None:
    gate_scores = torch.zeros(NUM_TOKENS, NUM_EXPERTS + 1, requires_grad=True)
    wrong_experts, right_router = (
        torch.full((NUM_TOKENS, NUM_EXPERTS), -9.0),
        torch.full((NUM_TOKENS,), -0.01),
    )
    gate_loss(gate_scores, wrong_experts, right_router, every(True)).backward()
    assert gate_scores.grad is not None
    assert (gate_scores.grad[:, -1] < 0).all()
    assert (gate_scores.grad[:, :-1] > 0).all()


def test_a_fresh_sum_gate_is_the_papers_sum() -> None:
    zeros = torch.zeros(NUM_TOKENS, dtype=torch.float64)
    expert_rows, router_rows = make_normal(NUM_TOKENS, WIDTH), make_normal(NUM_TOKENS, WIDTH, seed=2)
    gold = torch.arange(NUM_TOKENS)
    torch.testing.assert_close(sum_gate_factor(zeros), torch.ones_like(zeros))
    torch.testing.assert_close(
        sum_gate_loss(zeros, expert_rows, router_rows, gold, every(True)),
        lm_loss(expert_rows + router_rows, gold, every(True)),
    )


def test_the_sum_gate_opens_where_the_router_is_right_and_closes_where_it_is_wrong() -> None:
    gate_scores = torch.zeros(2, requires_grad=True)
    router_rows = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    gold, supervised = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    sum_gate_loss(gate_scores, torch.zeros(2, 2), router_rows, gold, supervised).backward()
    assert gate_scores.grad is not None
    assert gate_scores.grad[0] < 0 < gate_scores.grad[1]
