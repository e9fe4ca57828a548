"""An expert is swapped while answers are written: nobody notices, or every token says who wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.stack import StackSettings
from tests.chaos.swap_report import summary
from tests.chaos.swaps import SwapOptions, run_swaps
from tests.served_stack import SLOTS


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("new_weights", [False, True], ids=["equal weights", "new weights"])
async def test_swaps_under_load_break_no_answer(tmp_path: Path, new_weights: bool) -> None:
    options = SwapOptions(
        num_swaps=2,
        num_generations=8,
        new_weights=new_weights,
        num_concurrent=4,
        num_cases=6,
        num_checked=4,
        idle_seconds=0.5,
        slot="strings",  # which these cases use from their beginning to their end
        stack=StackSettings(  # answers must last longer than it takes to flip
            replicas=dict.fromkeys(SLOTS, 1),
            base_delay_seconds=0.03,
            forks=True,
            router_options={"drafting": "off", "early-asks": "off"},
        ),
    )
    report = await run_swaps(options, tmp_path)
    print("\n".join(summary(report)))
    assert report.passed, "the reasons are above"


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("new_weights", [False, True], ids=["equal weights", "new weights"])
async def test_twenty_swaps_during_two_hundred_generations(tmp_path: Path, new_weights: bool) -> None:
    report = await run_swaps(SwapOptions(new_weights=new_weights), tmp_path)
    print("\n".join(summary(report)))
    assert report.passed, "the reasons are above"
