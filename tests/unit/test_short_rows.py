"""A choice from the highest logits only is the choice from the whole row, or none at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionroute.errors import InvalidRequest
from fusionroute.fusion import Sampling, SeenTokens, choose
from fusionroute.short_rows import ShortRow, can_choose, pick_if_certain
from fusionroute.top_logits import short_rows, top_logits_to_message, top_of_rows

WIDTH = 24


def shortened(row: np.ndarray, count: int, dtype: torch.dtype = torch.float32) -> ShortRow:
    """As it comes over the wire."""
    rows = torch.from_numpy(row[None]).to(dtype)
    return short_rows(top_logits_to_message(*top_of_rows(rows, count)), len(row), count)[0]


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Rows with many equal logits."""
    spread = draw(st.sampled_from([2, 5, 1000]))
    values = draw(st.lists(st.integers(-spread, spread), min_size=WIDTH, max_size=WIDTH))
    return (np.array(values, np.float32) / 4).astype(np.float32)


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.7, 2.0])),
        top_k=draw(st.sampled_from([1, 2, 5, WIDTH, 0])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])),
        logit_bias=draw(
            st.dictionaries(st.integers(0, WIDTH - 1), st.sampled_from([-9.0, 0.5, 3.0]), max_size=2)
        ),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=150, deadline=None)
@given(
    rows(), st.none() | rows(), samplings(), st.integers(1, WIDTH), st.sampled_from([1.0, 0.5, 1.7]),
    st.lists(st.integers(0, WIDTH - 1), max_size=6),
)  # fmt: skip
def test_what_is_certain_is_what_the_whole_row_gives(
    expert: np.ndarray,
    router: np.ndarray | None,
    sampling: Sampling,
    count: int,
    factor: float,
    seen_ids: list[int],
) -> None:
    seen = SeenTokens(seen_ids)
    for token in seen_ids[:2]:
        seen.add(token)
    whole = expert
    if router is not None:
        whole = expert + router if factor == 1.0 else expert + np.float32(factor) * router
    wanted = choose(whole, sampling, 7, seen).token_id
    picked = pick_if_certain(shortened(expert, count), router, sampling, 7, seen, complement=factor)
    assert picked in (None, wanted)
    if count == WIDTH and can_choose(sampling) and not (sampling.temperature > 0 and sampling.top_k >= WIDTH):
        assert picked == wanted, "with all logits known nothing is open"


def test_with_rows_as_models_give_them_few_logits_are_enough() -> None:
    random = np.random.default_rng(1)
    greedy, sampled = Sampling(), Sampling(temperature=0.8, top_k=20, seed=3)
    for sampling, most in ((greedy, 64), (sampled, 256)):
        certain = 0
        for position in range(50):
            expert, router = random.standard_normal((2, 20_000)).astype(np.float32) * 3
            router = 0.3 * router + 0.7 * expert  # two models of one text agree mostly
            picked = pick_if_certain(shortened(expert, most), router, sampling, position)
            if picked is not None:
                certain += 1
                assert picked == choose(expert + router, sampling, position).token_id
        assert certain >= 45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 8, WIDTH])
def test_the_highest_logits_are_in_the_same_order_whatever_equals_what(
    dtype: torch.dtype, count: int
) -> None:
    random = np.random.default_rng(2)
    for _ in range(50):
        row = random.integers(-3, 3, WIDTH).astype(np.float32)
        short = shortened(row, count, dtype)
        order = np.lexsort((np.arange(WIDTH), -row))[:count]
        np.testing.assert_array_equal(short.ids, order)
        np.testing.assert_array_equal(short.logits, row[order])


def test_short_rows_that_are_not_what_was_asked_for_are_refused() -> None:
    rows = torch.zeros(2, WIDTH)
    right = top_logits_to_message(*top_of_rows(rows, 4))
    assert len(short_rows(right, WIDTH, 4)) == 2
    for field, value in (
        ("num_logits", 5),
        ("num_rows", 3),
        ("ids", bytes(3)),
        ("logits", b""),
        ("dtype", 9),
    ):
        wrong = type(right).FromString(right.SerializeToString())
        setattr(wrong, field, value)
        with pytest.raises(InvalidRequest):
            short_rows(wrong, WIDTH, 4)
    high = type(right).FromString(right.SerializeToString())
    high.ids = np.full(8, WIDTH, "<u4").tobytes()
    with pytest.raises(InvalidRequest, match=r"top\.ids"):
        short_rows(high, WIDTH, 4)
