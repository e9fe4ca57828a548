"""Telling how far a long piece of work is: not at all when it is short, then about once a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from trainer.run_context import RunContext, RunProgress

FIRST_REPORT_SECONDS = 2.0
REPORT_SECONDS = 1.0


class Pace:
    """Counts done steps, checks the stop, reports now and then.

    Args:
        context: is told, and asked whether to stop; None = nobody is told.
        stage: what is being done.
        num_steps: of the whole; 0 = not known.
        done: steps that an earlier attempt has done; they do not count for the speed.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        context: RunContext | None,
        stage: str,
        num_steps: int = 0,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._stage = stage
        self._num_steps = num_steps
        self._done = self._done_before = done
        self._clock = clock
        self._began = clock()
        self._next_report = self._began + FIRST_REPORT_SECONDS

    def advance(self, num_steps: int = 1, metrics: Mapping[str, float] | None = None) -> None:
        """So many more steps are done. Raises Stopped if someone has asked to stop."""
        self._done += num_steps
        if self._context is None:
            return
        self._context.stop.check()
        now = self._clock()
        if now >= self._next_report:
            self._next_report = now + REPORT_SECONDS
            self._context.report(
                RunProgress(
                    stage=self._stage,
                    step=self._done,
                    num_steps=self._num_steps,
                    metrics=dict(metrics or {}),
                    remaining_seconds=self._remaining_seconds(now),
                )
            )

    def _remaining_seconds(self, now: float) -> float | None:
        newly_done = self._done - self._done_before
        if not self._num_steps or newly_done <= 0:
            return None
        return max(0.0, (now - self._began) * (self._num_steps - self._done) / newly_done)
