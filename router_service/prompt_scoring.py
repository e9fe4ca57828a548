"""What a prompt's tokens would have been worth: the log-probability of each under the fused scores before it.

The prompt is checked as a draft is: a chunk of its tokens at a time, for which the router and every expert that it
picks within the chunk give all their rows in one forward each. So a prompt costs as many forwards as it has chunks,
in however many ways it is judged, and rows are never kept.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from fusionroute.errors import Reason, Unavailable, invalid
from fusionroute.sampling import logprob
from fusionroute.v1 import router_pb2
from router_service.chunk_memory import ChunkMemory
from router_service.costs import Costs
from router_service.drafting import Drafter, Plan
from router_service.rounds import RoundAsker
from router_service.scores import Candidates, Scores
from router_service.scoring_ways import Judgement, ask_rows, judge, num_rows
from router_service.serving import ServedCheckpoints, Serving
from router_service.session_closing import SessionCloser
from router_service.session_text import Text
from router_service.text import AnswerText
from router_service.turn_admission import TurnAdmission
from router_service.turn_events import top_message
from router_service.turn_request import Offer, Turn, read_prompt, read_turn, read_wishes

CHUNK_BYTES = 16 * 2**20
"""Rows of router and experts for one chunk, as float32."""
FLOAT_BYTES = 4
MAX_CHUNK_TOKENS = 256
MAX_WAYS = 32
ALL_CHUNKS_BYTES = 4 * CHUNK_BYTES
"""Rows that are in memory at a time, of all prompts together."""
QUICK_NUMBERS = 65536
"""Scores of more numbers than these take milliseconds, which the event loop is spared."""


@dataclass(frozen=True, slots=True)
class _Judged:
    """A token's log-probability, who took part, the best candidates where they are wanted, what other ways say."""

    logprob: float
    expert: int | None
    top: Candidates | None
    judgements: Sequence[Judgement] = ()


@dataclass(frozen=True, slots=True)
class _ChunkSize:
    """Tokens of one chunk at most, and what the rows of one token take."""

    num_tokens: int
    token_bytes: int


@dataclass(slots=True, eq=False)
class PromptScorer:
    """Scores prompts.

    Attributes:
        closer: gives the models' memory back.
        is_draining: whether the router is about to stop.
        max_chunk_tokens: at most so many tokens at a time, fewer where rows are long.
    """

    served: ServedCheckpoints
    admission: TurnAdmission
    closer: SessionCloser
    is_draining: Callable[[], bool]
    max_chunk_tokens: int = MAX_CHUNK_TOKENS
    _memory: ChunkMemory = field(default_factory=lambda: ChunkMemory(ALL_CHUNKS_BYTES))

    async def score(
        self, request: router_pb2.ScorePromptRequest
    ) -> AsyncGenerator[router_pb2.ScorePromptResponse, None]:
        """The tokens from `from_position` on, some at a time; to be closed by whoever stops reading.

        Raises:
            FusionRouteError: the request cannot be served, as of a turn; EXPERT_UNAVAILABLE when an expert that is
                picked does not come back in time.
        """
        if self.is_draining():
            raise Unavailable(Reason.DRAINING, "the router is about to stop", retry_after_seconds=1.0)
        self.admission.check()
        with self.served.current.in_use() as serving:
            alike = as_turn(request)
            turn = read_turn(alike, serving.offer)
            ways = read_ways(request, serving.offer)
            num_candidates = read_wishes(alike, serving.offer).num_top_candidates
            ids = await read_prompt(alike, serving.tokenizer, serving.offer, first_turn=True)
            if request.from_position >= len(ids):
                raise invalid(
                    "from_position", request.from_position, f"below {len(ids)}, the prompt's length"
                )
            text = Text(f"score:{uuid4().hex}", 0, ids[: max(1, request.from_position)])
            with self.admission.reserve(min(len(ids) + 1, serving.offer.max_context_tokens)):
                try:
                    # for each token a row of the router and one of each expert that may be picked
                    rows = num_rows([turn, *ways], len(serving.offer.slots))
                    token_bytes = rows * FLOAT_BYTES * serving.offer.logits_width
                    size = _ChunkSize(
                        min(self.max_chunk_tokens, max(1, CHUNK_BYTES // token_bytes)), token_bytes
                    )
                    scoring = _Scoring(serving, turn, ways, num_candidates, ids, text, size, self._memory)
                    async for tokens in scoring.run(request.from_position):
                        yield router_pb2.ScorePromptResponse(tokens=tokens)
                finally:
                    self.closer.give_back(serving, text)


class _Scoring:
    """One prompt being scored; `text` holds what was scored already."""

    def __init__(
        self,
        serving: Serving,
        turn: Turn,
        ways: Sequence[Turn],
        num_candidates: int,
        ids: Sequence[int],
        text: Text,
        size: _ChunkSize,
        memory: ChunkMemory,
    ) -> None:
        self._serving, self._turn, self._ways, self._num_candidates = serving, turn, ways, num_candidates
        self._ids, self._text, self._size, self._memory = ids, text, size, memory
        self._asker = RoundAsker(serving.ensemble, turn, text, Costs(), unsure_seconds=math.inf)

    async def run(self, from_position: int) -> AsyncGenerator[list[router_pb2.PromptToken], None]:
        ids, text = self._ids, self._text
        pieces = self._serving.answer_text((), ids[:from_position])
        if from_position == 0:
            yield [self._message(0, None, pieces)]
        while (start := len(text.tokens)) < len(ids):
            chunk = ids[start : start + self._size.num_tokens]
            async with self._memory.held(len(chunk) * self._size.token_bytes):
                judged = await self._judge(chunk)
            text.tokens.extend(chunk[: len(judged)])
            yield [self._message(start + index, each, pieces) for index, each in enumerate(judged)]

    async def _judge(self, chunk: Sequence[int]) -> list[_Judged]:
        """The tokens that follow the text, as many of them as rows could be had for; at least one."""
        if self._ways:
            return await self._judge_in_ways(chunk)
        draft = tuple(chunk[:-1])
        plan = Plan(Drafter.LOOKUP, len(draft), ids=draft) if draft else Plan()
        scores = (await self._asker.ask(plan)).scores
        if len(scores) * self._serving.offer.logits_width > QUICK_NUMBERS:
            return await asyncio.to_thread(self._judge_rows, scores, chunk)
        return self._judge_rows(scores, chunk)

    def _judge_rows(self, scores: Sequence[Scores], chunk: Sequence[int]) -> list[_Judged]:
        judged = []
        for each, token in zip(scores, chunk, strict=False):
            fused = each.fused(self._turn.rule)
            top = each.candidates(fused, self._num_candidates) if self._num_candidates else None
            judged.append(_Judged(logprob(fused, token), each.taken.expert, top))
        return judged

    async def _judge_in_ways(self, chunk: Sequence[int]) -> list[_Judged]:
        ways = (self._turn, *self._ways)
        rows = await ask_rows(self._serving.ensemble, ways, self._text, chunk)

        def judged() -> list[_Judged]:
            tokens = []
            for place, (own, *others) in enumerate(judge(rows, ways, chunk)):
                top = None
                if self._num_candidates:
                    seen = rows.seen_by(0, place)
                    fused = seen.fused(self._turn.rule)
                    top = seen.candidates(fused, self._num_candidates)
                tokens.append(_Judged(own.logprob, own.expert, top, others))
            return tokens

        if len(chunk) * len(ways) * self._serving.offer.logits_width > QUICK_NUMBERS:
            return await asyncio.to_thread(judged)
        return judged()

    def _message(self, position: int, judged: _Judged | None, pieces: AnswerText) -> router_pb2.PromptToken:
        piece = pieces.push(self._ids[position])
        if position == len(self._ids) - 1:
            piece += pieces.finish()
        message = router_pb2.PromptToken(position=position, id=self._ids[position], text=piece)
        if judged is not None:
            message.logprob = judged.logprob
            if judged.expert is not None:
                message.expert = self._turn.slots[judged.expert]
            if judged.top is not None:
                message.top.CopyFrom(top_message(judged.top, self._serving.tokenizer))
            message.judgements.extend(
                router_pb2.Judgement(
                    logprob=each.logprob,
                    best_id=each.best_id,
                    expert="" if each.expert is None else self._turn.slots[each.expert],
                )
                for each in judged.judgements
            )
        return message


def as_turn(request: router_pb2.ScorePromptRequest) -> router_pb2.GenerateRequest:
    """The greedy turn with the same prompt; an expert that is not there is waited for, since scores must not change."""
    turn = router_pb2.GenerateRequest(
        combine=request.combine,
        fixed_expert=request.fixed_expert,
        expert_choice=request.expert_choice,
        sampling=router_pb2.SamplingParameters(seed=request.seed),
        num_top_candidates=request.num_top_candidates,
        exact=request.exact,
        on_expert_unavailable=router_pb2.ON_EXPERT_UNAVAILABLE_WAIT,
    )
    kind = request.WhichOneof("prompt")
    if kind == "token_ids":
        turn.token_ids.CopyFrom(request.token_ids)
    elif kind == "messages":
        turn.messages.CopyFrom(request.messages)
    else:
        turn.text = request.text
    return turn


def read_ways(request: router_pb2.ScorePromptRequest, offer: Offer) -> list[Turn]:
    """The further ways to judge in. Raises FusionRouteError: too many, or one that cannot be served."""
    if len(request.ways) > MAX_WAYS:
        raise invalid("ways", f"{len(request.ways)} ways", f"at most {MAX_WAYS}")
    alike = (
        router_pb2.GenerateRequest(
            combine=way.combine,
            fixed_expert=way.fixed_expert,
            expert_choice=way.expert_choice,
            sampling=router_pb2.SamplingParameters(seed=request.seed),
            exact=request.exact,
        )
        for way in request.ways
    )
    return [read_turn(each, offer) for each in alike]
