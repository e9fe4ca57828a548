"""The kill matrix: every part is hurt in every way while answers are written, and their readers notice a pause."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from tests.chaos.faults import MATRIX, Component, Fault
from tests.chaos.matrix import MatrixOptions, MatrixReport, run_matrix
from tests.chaos.report import print_report
from tests.chaos.stack import StackSettings

SHORT_COMPONENTS = (Component.ROUTER, Component.EXPERT, Component.REDIS)
SHORT_FAULTS = (Fault.KILL, Fault.STOP, Fault.RESTART, Fault.SLOW, Fault.PARTITION)


def judge(report: MatrixReport) -> None:
    """Shows the table, and fails unless every cell has passed."""
    print_report(Console(width=180), report, with_logs=True)
    failed = [judgement.cell for judgement in report.judgements if not judgement.passed]
    assert report.passed, f"failed: {failed or report.left_behind}; the table and the reasons are above"


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_every_fault_once_on_router_expert_and_redis_changes_no_token(tmp_path: Path) -> None:
    cells = [cell for cell in MATRIX if cell.component in SHORT_COMPONENTS and cell.fault in SHORT_FAULTS]
    assert len(cells) == 15
    stack = StackSettings(
        session_lease_seconds=1.0, expert_lease_seconds=1.5, base_delay_seconds=0.015, forks=True
    )
    options = MatrixOptions(
        cells, num_generations=4 * len(cells), pause_seconds=1.5, num_concurrent=4, max_tokens=40, stack=stack
    )
    judge(await run_matrix(options, tmp_path))


@pytest.mark.chaos
@pytest.mark.timeout(1800)
async def test_the_whole_kill_matrix(tmp_path: Path) -> None:
    judge(await run_matrix(MatrixOptions(), tmp_path))
