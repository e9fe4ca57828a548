"""What goes into the next forward: tokens that somebody watches first, then a fair share of the long prompts.

    short steps (decoding)   all of them, oldest first
    long steps (prefills)    one after another, a chunk each; those served go to the end of the line

Exact steps and others never share a forward; where both wait, they take turns.

While others decode, the prefills of one forward share a budget that follows the measured speed, so that a forward,
and with it everybody's next token, takes about as long as wanted however long the prompts are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fusionroute.engine.steps import Chunk, EngineLimits, Job

SHORT_TOKENS = 16
"""A step of up to so many tokens is one that somebody waits for between two tokens of an answer."""
FEWEST_PREFILL_TOKENS = 32
"""Prefills always get on: with less per forward they would mostly pay for the forward itself."""
DECODING_SECONDS = 0.5
"""Sessions count as decoding for so long after their last step: the next one is on its way."""
SMOOTHING = 0.3


@dataclass(slots=True)
class Schedule:
    """Composes forwards; learns how long they take."""

    limits: EngineLimits
    seconds_per_token: float | None = None
    _last_decode: float = field(default=float("-inf"))
    _was_exact: bool = field(default=False)

    def arrived(self, job: Job, now: float) -> None:
        """Hears of a step that was admitted."""
        if job.call.from_position > 0 and job.num_left <= SHORT_TOKENS:
            self._last_decode = now

    def compose(self, running: Iterable[Job], now: float, most_decoding: int | None = None) -> list[Chunk]:
        """The next forward, at most `max_batch_tokens`.

        Args:
            running: steps with tokens left to feed, in the order in which they should be served.
            most_decoding: short steps of sessions that have begun, at most so many; None = all.
        """
        short: list[Job] = []
        long: list[Job] = []
        num_decoding = 0
        for job in self._of_one_kind(list(running)):
            if job.num_left > SHORT_TOKENS:
                long.append(job)
                continue
            num_decoding += job.call.from_position > 0
            if most_decoding is None or num_decoding <= most_decoding or job.call.from_position == 0:
                short.append(job)
        budget = self.prefill_tokens(now)
        room = self.limits.max_batch_tokens
        kept_for_long = min(budget, FEWEST_PREFILL_TOKENS, max(1, room // 4)) if long else 0
        chunks = _take(short, room - kept_for_long, room)
        room -= sum(chunk.num_tokens for chunk in chunks)
        return chunks + _take(long, min(room, budget), self.limits.prefill_chunk_tokens)

    def _of_one_kind(self, running: list[Job]) -> list[Job]:
        exact = [job for job in running if job.call.exact]
        if exact and len(exact) < len(running):
            self._was_exact = not self._was_exact
            return exact if self._was_exact else [job for job in running if not job.call.exact]
        self._was_exact = bool(exact)
        return running

    def prefill_tokens(self, now: float) -> int:
        """Tokens of long steps in one forward."""
        if now - self._last_decode > DECODING_SECONDS:
            return self.limits.max_batch_tokens
        if self.seconds_per_token is None:
            return FEWEST_PREFILL_TOKENS
        fitting = int(self.limits.mixed_forward_seconds / self.seconds_per_token)
        return max(FEWEST_PREFILL_TOKENS, min(fitting, self.limits.prefill_chunk_tokens))

    def took(self, num_tokens: int, seconds: float) -> None:
        """Hears how long a forward took. Those of few tokens say nothing about the speed of prefills."""
        if num_tokens < FEWEST_PREFILL_TOKENS:
            return
        measured = seconds / num_tokens
        before = measured if self.seconds_per_token is None else self.seconds_per_token
        self.seconds_per_token = before + SMOOTHING * (measured - before)


def _take(jobs: Iterable[Job], room: int, chunk_tokens: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    for job in jobs:
        count = min(job.num_left, chunk_tokens, room)
        if count <= 0:
            break
        room -= count
        chunks.append(Chunk(job, job.num_fed, job.num_fed + count))
    return chunks
