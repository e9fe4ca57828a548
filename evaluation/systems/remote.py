"""Answers of somebody else's server, as a baseline."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from evaluation.questions import Answer, Question
from evaluation.systems.answering import Verify, to_json
from fusionroute.remote_models import RemoteEnding, RemoteModel, RemoteSampling


@dataclass(frozen=True, slots=True)
class RemoteWriter:
    """Answers of one model behind TGI's or OpenAI's API.

    Attributes:
        verify: judges an answer; called in a thread.
    """

    model: RemoteModel
    verify: Verify
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    async def ask(self, question: Question) -> dict[str, Any]:
        """The answer and what the verifier says of it, as JSON has it. Raises FusionRouteError."""
        sampling = RemoteSampling(question.max_tokens, self.temperature, self.top_p, self.seed, question.stop)
        written = await self.model.generate(question.prompt, sampling)
        answer = Answer(written.text, is_complete=written.ending is RemoteEnding.ENDED)
        verdict = await asyncio.to_thread(self.verify, question, answer)
        return to_json(answer, verdict)
