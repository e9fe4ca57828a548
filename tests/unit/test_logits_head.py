"""Which layout of the head is taken, by what was measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from fusionroute.engine import logits_head, row_products
from fusionroute.engine.logits_head import LogitsHead
from fusionroute.engine.row_products import RowProducts

ROWS = (1, 16, 64)
WEIGHT_BYTES = 8 * 4 * 4


class Clock:
    """Layouts that take as long as they are told, by a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0

    def layout(self, *seconds: float) -> Callable[..., Tensor]:
        """One that takes so long the first times, and then the last of them."""
        left = list(seconds)

        def run(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return linear(hidden, weight, bias)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(logits_head, "measuring_clock", lambda: lambda: clock.now)
    monkeypatch.setattr(logits_head, "FEWEST_BYTES", 0)
    monkeypatch.setattr(row_products, "FEWEST_SHARED_BYTES", WEIGHT_BYTES)
    for each in ("by_columns", "by_two_columns"):
        monkeypatch.setattr(logits_head, each, clock.layout(9.0))
    return clock


def head_with(monkeypatch: pytest.MonkeyPatch, torchs: Callable[..., Tensor], kernel: object) -> LogitsHead:
    monkeypatch.setattr(logits_head, "linear", torchs)
    products = RowProducts()
    products._kernel = lambda *_: None
    monkeypatch.setattr(products, "by_kernel", kernel)
    head = LogitsHead(torch.ones(8, 4), products=products)
    head.choose_layouts()
    return head


@pytest.mark.parametrize(
    ("torch_seconds", "kernel_seconds", "is_kernel"),
    [(2.0, 1.0, (True, True, True)), (1.0, 1.2, (True, True, False)), (1.0, 1.5, (False, False, False))],
)
def test_for_few_rows_torch_has_to_be_clearly_faster_than_the_kernel(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    torch_seconds: float,
    kernel_seconds: float,
    is_kernel: tuple[bool, ...],
) -> None:
    kernel = clock.layout(kernel_seconds)
    head = head_with(monkeypatch, clock.layout(torch_seconds), kernel)
    assert tuple(head.layouts[count] is kernel for count in ROWS) == is_kernel


def test_for_small_weights_the_kernel_has_to_be_faster(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_products, "FEWEST_SHARED_BYTES", WEIGHT_BYTES + 1)
    torchs = clock.layout(1.0)
    head = head_with(monkeypatch, torchs, clock.layout(0.95))
    assert head.layouts[1] is torchs
    kernel = clock.layout(0.8)
    assert head_with(monkeypatch, clock.layout(1.0), kernel).layouts[1] is kernel


def test_one_disturbed_trial_decides_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = clock.layout(1.0, 50.0, 1.0)
    head = head_with(monkeypatch, clock.layout(2.0), kernel)
    assert head.layouts[1] is kernel


def test_without_a_kernel_columns_are_taken_where_they_are_faster(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = clock.layout(1.0)
    monkeypatch.setattr(logits_head, "by_columns", columns)
    monkeypatch.setattr(logits_head, "linear", clock.layout(2.0))
    head = LogitsHead(torch.ones(8, 4))
    head.choose_layouts()
    assert head.layouts[1] is columns
