"""CDPO against its definition (method, section 3), and where it must become plain DPO."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trainer.losses import PairMargins, cdpo_loss, logprobs_at, pair_margins, routed_logprobs, routes_of
from trainer.vocabulary_head import VocabularyHead, fused_log_partition

BETA = 0.1
LENGTHS = torch.tensor([4, 2, 1, 6, 3, 3])  # chosen, rejected, chosen, ...
ROWS = torch.repeat_interleave(torch.arange(len(LENGTHS)), LENGTHS)
NUM_TARGETS, NUM_EXPERTS, WIDTH, HIDDEN = len(ROWS), 3, 23, 5


def logprobs(*shape: int, seed: int) -> Tensor:
    return -torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_row(values: Tensor) -> list[Tensor]:
    return list(values.split(LENGTHS.tolist()))


POLICY, EXPERT = logprobs(NUM_TARGETS, seed=0), logprobs(NUM_TARGETS, seed=1)
REFERENCE = torch.stack([row.sum() for row in by_row(logprobs(NUM_TARGETS, seed=2))])


def test_the_margin_is_that_of_the_definition() -> None:
    margins = pair_margins(POLICY, REFERENCE, EXPERT, ROWS, beta=BETA)
    policy, expert = by_row(POLICY), by_row(EXPERT)
    for pair in range(3):
        c, r = 2 * pair, 2 * pair + 1
        ratio = (policy[c].sum() - REFERENCE[c]) - (policy[r].sum() - REFERENCE[r])
        bias = BETA * (expert[c].sum() - expert[r].sum())
        torch.testing.assert_close(margins.bias[pair], bias)
        torch.testing.assert_close(margins.margin[pair], BETA * ratio + bias)
        torch.testing.assert_close(margins.chosen_logratio[pair], policy[c].sum() - REFERENCE[c])
        torch.testing.assert_close(margins.rejected_logratio[pair], policy[r].sum() - REFERENCE[r])
    torch.testing.assert_close(margins.chosen_reward - margins.rejected_reward, margins.margin)
    torch.testing.assert_close(cdpo_loss(margins), -torch.sigmoid(margins.margin).log().mean())


def test_the_mean_bias_takes_each_rows_own_length() -> None:
    margins = pair_margins(POLICY, REFERENCE, EXPERT, ROWS, beta=BETA, bias_reduction="mean")
    means = torch.stack([row.mean() for row in by_row(EXPERT)])
    torch.testing.assert_close(margins.bias, BETA * (means[0::2] - means[1::2]))


def test_the_scale_multiplies_the_bias_alone() -> None:
    whole = pair_margins(POLICY, REFERENCE, EXPERT, ROWS, beta=BETA)
    half = pair_margins(POLICY, REFERENCE, EXPERT, ROWS, beta=BETA, bias_scale=0.5)
    torch.testing.assert_close(half.bias, whole.bias / 2)
    torch.testing.assert_close(half.margin, whole.margin - whole.bias / 2)


@pytest.mark.parametrize("bias_scale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias_reduction", ["sum", "mean"])
def test_at_step_zero_the_loss_is_minus_log_sigmoid_of_the_bias(bias_scale: float, bias_reduction) -> None:
    reference = torch.stack([row.sum() for row in by_row(POLICY)])
    margins = pair_margins(
        POLICY, reference, EXPERT, ROWS, beta=BETA, bias_scale=bias_scale, bias_reduction=bias_reduction
    )
    torch.testing.assert_close(cdpo_loss(margins), -torch.nn.functional.logsigmoid(margins.bias).mean())
    is_ln_2 = math.isclose(cdpo_loss(margins).item(), math.log(2), rel_tol=1e-3)
    assert is_ln_2 == (bias_scale == 0)


def plain_dpo(policy: Tensor) -> PairMargins:
    ratios = torch.stack([row.sum() for row in by_row(policy)]) - REFERENCE
    nothing = torch.zeros(3, dtype=torch.float64)
    return PairMargins(BETA * (ratios[0::2] - ratios[1::2]), nothing, *[nothing] * 4)


def loss_and_gradient(make_margins) -> tuple[Tensor, Tensor]:
    policy = POLICY.clone().requires_grad_()
    loss = cdpo_loss(make_margins(policy))
    return loss.detach(), torch.autograd.grad(loss, policy)[0]


def test_an_expert_that_says_nothing_leaves_plain_dpo() -> None:
    silent = torch.zeros(NUM_TARGETS, dtype=torch.float64)
    torch.testing.assert_close(
        loss_and_gradient(lambda policy: pair_margins(policy, REFERENCE, silent, ROWS, beta=BETA)),
        loss_and_gradient(plain_dpo),
    )


@pytest.mark.parametrize("garbage", [1.0, math.nan, -math.inf])
def test_a_bias_scale_of_zero_is_plain_dpo_whatever_the_experts_say(garbage: float) -> None:
    spoilt = EXPERT * garbage
    torch.testing.assert_close(
        loss_and_gradient(
            lambda policy: pair_margins(policy, REFERENCE, spoilt, ROWS, beta=BETA, bias_scale=0)
        ),
        loss_and_gradient(plain_dpo),
    )


def test_with_a_fused_reference_and_the_same_experts_the_bias_cancels() -> None:
    fused_reference = REFERENCE + torch.stack([row.sum() for row in by_row(EXPERT)])
    torch.testing.assert_close(
        loss_and_gradient(lambda policy: pair_margins(policy, fused_reference, EXPERT, ROWS, beta=BETA)),
        loss_and_gradient(plain_dpo),
    )


def test_the_gradient_is_beta_times_sigmoid_of_minus_the_margin() -> None:
    _, gradient = loss_and_gradient(lambda policy: pair_margins(policy, REFERENCE, EXPERT, ROWS, beta=BETA))
    margins = pair_margins(POLICY, REFERENCE, EXPERT, ROWS, beta=BETA)
    strength = BETA * torch.sigmoid(-margins.margin) / 3
    signs = 1.0 - 2.0 * (ROWS % 2)
    torch.testing.assert_close(gradient, -signs * strength[ROWS // 2])


def test_pairs_give_neither_routing_scores_nor_experts_nor_reference_a_gradient() -> None:
    scores = normal(NUM_TARGETS, NUM_EXPERTS, seed=4).requires_grad_()
    labels = logprobs(NUM_TARGETS, NUM_EXPERTS, seed=5).requires_grad_()
    policy, reference = POLICY.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    expert = EXPERT.clone().requires_grad_()

    assert not routed_logprobs(labels, scores).requires_grad
    cdpo_loss(pair_margins(policy, reference, expert, ROWS)).backward()
    cdpo_loss(pair_margins(policy, reference, routed_logprobs(labels, scores), ROWS)).backward()

    assert policy.grad is not None
    assert expert.grad is None
    assert scores.grad is None
    assert labels.grad is None
    assert reference.grad is None


def test_routes_are_the_highest_scores_and_the_first_of_equal_ones() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
    labels = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    assert routes_of(scores).tolist() == [1, 0]
    assert routed_logprobs(labels, scores).tolist() == [-2.0, -4.0]
    assert logprobs_at(labels, torch.tensor([2, 1], dtype=torch.int32)).tolist() == [-3.0, -5.0]


def test_one_expert_is_routed_to_everywhere() -> None:
    labels = logprobs(NUM_TARGETS, 1, seed=5)
    assert torch.equal(routed_logprobs(labels, normal(NUM_TARGETS, 1, seed=4)), labels[:, 0])


def test_no_pairs_give_a_loss_of_zero_that_still_touches_the_graph() -> None:
    policy = torch.zeros(0, requires_grad=True)
    loss = cdpo_loss(pair_margins(policy, torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long)))
    loss.backward()
    assert loss.item() == 0
    assert policy.grad is not None


def test_micro_batches_of_pairs_divided_by_the_global_count_add_up_to_the_whole() -> None:
    first = ROWS < 2
    parts = (
        cdpo_loss(
            pair_margins(POLICY[mask], REFERENCE[rows], EXPERT[mask], ROWS[mask] - start), denominator=3
        )
        for mask, rows, start in ((first, slice(0, 2), 0), (~first, slice(2, 6), 2))
    )
    torch.testing.assert_close(sum(parts), cdpo_loss(pair_margins(POLICY, REFERENCE, EXPERT, ROWS)))


class Normalised:
    """A router and experts over a small vocabulary, with rows that can be looked at."""

    def __init__(self, num_experts: int) -> None:
        self.router = VocabularyHead(normal(WIDTH, HIDDEN, seed=10).requires_grad_(), softcap=4.0)
        self.hidden = normal(NUM_TARGETS, HIDDEN, seed=11).requires_grad_()
        self.experts = [VocabularyHead(normal(WIDTH, 4, seed=12 + index)) for index in range(num_experts)]
        self.states = [normal(NUM_TARGETS, 4, seed=20 + index) for index in range(num_experts)]
        generator = torch.Generator().manual_seed(30)
        self.gold = torch.randint(WIDTH, (NUM_TARGETS,), generator=generator)
        self.routes = torch.randint(num_experts, (NUM_TARGETS,), generator=generator)

    def margins(self) -> PairMargins:
        labels = [e.gold_logprobs(h, self.gold, 4) for e, h in zip(self.experts, self.states, strict=True)]
        partition = fused_log_partition(
            self.router, self.hidden, self.experts, self.states, self.routes, chunk_tokens=4
        )
        return pair_margins(
            self.router.gold_logprobs(self.hidden, self.gold, 4),
            REFERENCE,
            logprobs_at(torch.stack(labels, dim=1), self.routes),
            ROWS,
            beta=BETA,
            log_partition=partition,
        )

    def naive_loss(self) -> Tensor:
        """The log-softmax of the summed logits, all at once."""
        rows = torch.stack([e.rows(h) for e, h in zip(self.experts, self.states, strict=True)], dim=1)
        chosen = rows[torch.arange(NUM_TARGETS), self.routes].detach()
        fused = (chosen + self.router.rows(self.hidden)).log_softmax(1)[torch.arange(NUM_TARGETS), self.gold]
        ratios = torch.stack([row.sum() for row in by_row(fused)]) - REFERENCE
        return -torch.sigmoid(BETA * (ratios[0::2] - ratios[1::2])).log().mean()

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [self.hidden, self.router.weight])


@pytest.mark.parametrize("num_experts", [1, 3])
def test_the_normalised_policy_equals_the_naive_one_in_value_and_gradient(num_experts: int) -> None:
    setting = Normalised(num_experts)
    loss, naive = cdpo_loss(setting.margins()), setting.naive_loss()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(setting.gradients(loss), setting.gradients(naive))


def test_under_the_normalised_policy_an_expert_of_zero_logits_is_plain_dpo() -> None:
    setting = Normalised(1)
    setting.states[0].zero_()
    policy = setting.router.gold_logprobs(setting.hidden, setting.gold)
    loss, plain = cdpo_loss(setting.margins()), cdpo_loss(plain_dpo(policy))
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(setting.gradients(loss), setting.gradients(plain))


def test_equal_experts_give_the_same_margins_whatever_the_routes() -> None:
    labels = logprobs(NUM_TARGETS, 1, seed=5).expand(-1, NUM_EXPERTS)
    losses = [
        cdpo_loss(pair_margins(POLICY, REFERENCE, routed_logprobs(labels, scores), ROWS))
        for scores in (normal(NUM_TARGETS, NUM_EXPERTS, seed=4), normal(NUM_TARGETS, NUM_EXPERTS, seed=6))
    ]
    assert losses[0] == losses[1]
