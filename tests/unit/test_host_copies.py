"""Rows on their way from the device to the host."""

from __future__ import annotations

import pytest
import torch

from fusionroute.engine.host_copies import HostCopies


def test_what_is_on_the_host_is_not_copied() -> None:
    rows = torch.randn(2, 3)
    assert HostCopies(torch.device("cpu")).take(rows)[0] is rows


@pytest.mark.gpu
def test_copies_are_pinned_and_complete_while_the_device_goes_on() -> None:
    device = torch.device("cuda")
    copies = HostCopies(device)
    big = torch.randn(4096, 4096, device=device)
    for number in range(20):
        rows, scores = torch.full((4, 128_256), float(number), device=device), torch.arange(8, device=device)
        taken = copies.take(rows, scores)
        rows.fill_(-1.0)  # queued behind; must not reach what was taken
        big = big @ big.t() / 4096
        assert taken[0].is_pinned() and torch.equal(taken[0], torch.full((4, 128_256), float(number)))
        assert torch.equal(taken[1], torch.arange(8))
