"""Vocabulary work by chunks equals the plain computation, in value and in every gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainer.vocabulary_head import VocabularyHead, fused_log_partition

NUM_TOKENS, HIDDEN, PADDED, CHUNK = 13, 8, 40, 5


@dataclass(frozen=True)
class Case:
    """One form of head, and the ids that its vocabulary has."""

    softcap: float | None = None
    scale: float = 1.0
    has_bias: bool = False
    width: int = PADDED


CASES = {
    "plain": Case(),
    "padded": Case(width=37),
    "bias": Case(has_bias=True, width=37),
    "scale": Case(scale=0.3),
    "softcap": Case(softcap=3.0),
    "all": Case(softcap=3.0, scale=0.7, has_bias=True, width=37),
}


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request) -> Case:
    return request.param


@pytest.fixture(params=[1, 3, CHUNK], ids=["one-row-blocks", "small-blocks", "whole-chunks"])
def block_numbers(request) -> int:
    """Chunks of rows are read in blocks."""
    return request.param * PADDED


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_gold(width: int, num_tokens: int = NUM_TOKENS) -> Tensor:
    return torch.randint(width, (num_tokens,), generator=torch.Generator().manual_seed(5))


def make_head(
    case: Case, seed: int = 1, dtype: torch.dtype = torch.float64, block_numbers: int = 1 << 22
) -> VocabularyHead:
    weight = normal(PADDED, HIDDEN, seed=seed, dtype=dtype).requires_grad_()
    bias = normal(PADDED, seed=seed + 1, dtype=dtype).requires_grad_() if case.has_bias else None
    return VocabularyHead(
        weight, bias, case.softcap, case.scale, width=case.width, block_numbers=block_numbers
    )


def naive_rows(head: VocabularyHead, hidden: Tensor) -> Tensor:
    """The definition, all rows at once."""
    rows = hidden @ head.weight.T
    if head.bias is not None:
        rows = rows + head.bias
    rows = rows * head.scale
    if head.softcap is not None:
        rows = head.softcap * torch.tanh(rows / head.softcap)
    return rows[:, : head.width]


def naive_logprobs(head: VocabularyHead, hidden: Tensor, gold: Tensor) -> Tensor:
    return torch.log_softmax(naive_rows(head, hidden), dim=1)[torch.arange(len(gold)), gold]


def gradients(head: VocabularyHead, hidden: Tensor, result: Tensor) -> list[Tensor]:
    """Of a weighted sum, with respect to hidden states and whatever the head is made of."""
    inputs = [hidden, head.weight] + ([] if head.bias is None else [head.bias])
    return list(torch.autograd.grad((result * normal(len(result), seed=9).to(result)).sum(), inputs))


@pytest.mark.parametrize("num_tokens", [0, 1, CHUNK, NUM_TOKENS])
def test_chunked_log_probs_equal_the_naive_ones_in_value_and_gradient(
    case: Case, num_tokens: int, block_numbers: int
) -> None:
    head, gold = make_head(case, block_numbers=block_numbers), make_gold(case.width, num_tokens)
    hidden = normal(num_tokens, HIDDEN, seed=3).requires_grad_()

    chunked, naive = head.gold_logprobs(hidden, gold, CHUNK), naive_logprobs(head, hidden, gold)

    torch.testing.assert_close(chunked, naive)
    torch.testing.assert_close(gradients(head, hidden, chunked), gradients(head, hidden, naive))


def test_rows_choices_and_statistics_equal_the_naive_ones(case: Case, block_numbers: int) -> None:
    head, gold = make_head(case, block_numbers=block_numbers), make_gold(case.width)
    hidden = normal(NUM_TOKENS, HIDDEN, seed=3)
    naive = naive_rows(head, hidden)

    statistics = head.statistics(hidden, gold, CHUNK)

    torch.testing.assert_close(head.rows(hidden), naive)
    assert torch.equal(head.choices(hidden, CHUNK), naive.argmax(dim=1))
    assert torch.equal(statistics.choices, naive.argmax(dim=1))
    torch.testing.assert_close(statistics.gold_logprobs, naive_logprobs(head, hidden, gold).detach())


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_statistics_of_hardly_any_tokens_have_their_shape(num_tokens: int) -> None:
    head = make_head(CASES["plain"])
    statistics = head.statistics(normal(num_tokens, HIDDEN, seed=3), make_gold(PADDED, num_tokens))
    assert [len(part) for part in statistics] == [num_tokens, num_tokens]
    assert statistics.choices.dtype == torch.int64


def test_padding_of_the_vocabulary_gets_no_gradient_and_no_probability() -> None:
    head, hidden = make_head(CASES["padded"]), normal(NUM_TOKENS, HIDDEN, seed=3)
    with torch.no_grad():
        head.weight[head.width :] *= 1e3  # would be every row's maximum

    head.gold_logprobs(hidden, make_gold(head.width), CHUNK).sum().backward()

    assert head.choices(hidden).max() < head.width
    assert head.weight.grad is not None
    assert torch.count_nonzero(head.weight.grad[head.width :]) == 0


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_the_same(case: Case) -> None:
    head, gold = make_head(case), make_gold(case.width)
    frozen = VocabularyHead(
        head.weight.detach(),
        None if head.bias is None else head.bias.detach(),
        case.softcap,
        case.scale,
        width=case.width,
    )
    first, second = (normal(NUM_TOKENS, HIDDEN, seed=3).requires_grad_() for _ in range(2))

    head.gold_logprobs(first, gold, CHUNK).sum().backward()
    frozen.gold_logprobs(second, gold, CHUNK).sum().backward()

    assert frozen.weight.grad is None
    assert second.grad is not None
    torch.testing.assert_close(second.grad, first.grad)


def test_hidden_states_without_gradient_still_train_the_head() -> None:
    head, gold = make_head(CASES["plain"]), make_gold(PADDED)
    hidden = normal(NUM_TOKENS, HIDDEN, seed=3)
    head.gold_logprobs(hidden, gold, CHUNK).sum().backward()
    expected = torch.autograd.grad(naive_logprobs(head, hidden, gold).sum(), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, expected)


def test_under_bf16_autocast_chunked_equals_autocasts_own_computation(case: Case) -> None:
    head = make_head(case, dtype=torch.float32)
    hidden = normal(NUM_TOKENS, HIDDEN, seed=3, dtype=torch.float32).requires_grad_()
    gold = make_gold(case.width)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = head.gold_logprobs(hidden, gold, CHUNK)
        products = nn.functional.linear(hidden, head.weight, head.bias)[:, : head.width]
    assert products.dtype == torch.bfloat16
    rows = products.float() * head.scale
    rows = rows if head.softcap is None else head.softcap * torch.tanh(rows / head.softcap)
    naive = torch.log_softmax(rows, dim=1)[torch.arange(len(gold)), gold]

    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, naive, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(gradients(head, hidden, chunked), gradients(head, hidden, naive), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got, wanted, rtol=2**-7, atol=2**-6
        )  # sums of bf16 products in another order


def test_many_chunks_lose_no_digits_of_a_bf16_weights_gradient() -> None:
    head = make_head(CASES["plain"], dtype=torch.bfloat16)
    hidden = normal(512, HIDDEN, seed=3, dtype=torch.bfloat16)
    gold = make_gold(PADDED, 512)

    gradient = torch.autograd.grad(head.gold_logprobs(hidden, gold, 2).sum(), head.weight)[0]

    exact = VocabularyHead(head.weight.detach().double().requires_grad_())
    wanted = torch.autograd.grad(exact.gold_logprobs(hidden.double(), gold).sum(), exact.weight)[0]
    assert gradient.dtype == torch.bfloat16
    difference = (gradient.double() - wanted).abs().max() / wanted.abs().max()
    assert difference < 2**-8


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_more_than_one_chunk_of_rows_is_alive_in_forward_or_backward(
    softcap: float | None, tmp_path: Path
) -> None:
    width, chunk = 20_000, 64
    block_numbers = 4 * width
    weight = normal(width, HIDDEN, seed=1, dtype=torch.float32)
    head = VocabularyHead(weight, softcap=softcap, block_numbers=block_numbers)
    hidden = normal(4 * chunk, HIDDEN, seed=3, dtype=torch.float32).requires_grad_()

    def train() -> None:
        head.gold_logprobs(hidden, make_gold(width, 4 * chunk), chunk).sum().backward()

    train()  # what torch allocates once
    assert peak_bytes(train, tmp_path / "trace.json") < 1.1 * chunk * width * 4 + 4 * block_numbers


def peak_bytes(work: Callable[[], None], trace: Path) -> int:
    """The most that torch had allocated on the CPU during some work, over what it had at the start."""
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as profiler:
        work()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


@pytest.mark.parametrize("num_tokens", [0, 1, NUM_TOKENS])
@pytest.mark.parametrize("num_experts", [1, 3])
def test_the_fused_log_partition_equals_the_naive_one(
    case: Case, num_experts: int, num_tokens: int, block_numbers: int
) -> None:
    head = make_head(case, block_numbers=block_numbers)
    hidden = normal(num_tokens, HIDDEN, seed=3).requires_grad_()
    form = replace(case, softcap=None)
    experts = [make_head(form, 20 + index, block_numbers=block_numbers) for index in range(num_experts)]
    states = [normal(num_tokens, HIDDEN, seed=30 + index) for index in range(num_experts)]
    routes = make_gold(num_experts, num_tokens)

    chunked = fused_log_partition(head, hidden, experts, states, routes, CHUNK)

    expert_rows = torch.stack([naive_rows(e, h) for e, h in zip(experts, states, strict=True)], dim=1)
    chosen = expert_rows[torch.arange(num_tokens), routes].detach().log_softmax(1)
    naive = (chosen + naive_rows(head, hidden).log_softmax(1)).logsumexp(1)
    torch.testing.assert_close(chunked, naive)
    torch.testing.assert_close(gradients(head, hidden, chunked), gradients(head, hidden, naive))
    assert all(expert.weight.grad is None for expert in experts)


def test_the_normalised_policy_is_the_log_softmax_of_the_summed_logits() -> None:
    head, expert = make_head(CASES["all"]), make_head(CASES["softcap"], seed=20)
    expert = VocabularyHead(expert.weight[:37], softcap=3.0)
    hidden, states = normal(NUM_TOKENS, HIDDEN, seed=3), normal(NUM_TOKENS, HIDDEN, seed=30)
    gold, routes = make_gold(37), torch.zeros(NUM_TOKENS, dtype=torch.int64)

    fused = (
        head.gold_logprobs(hidden, gold)
        + expert.gold_logprobs(states, gold)
        - fused_log_partition(head, hidden, [expert], [states], routes)
    )

    summed = naive_rows(head, hidden) + naive_rows(expert, states)
    torch.testing.assert_close(fused, summed.log_softmax(1)[torch.arange(NUM_TOKENS), gold])
