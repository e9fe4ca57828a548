"""A turn as TGI tells it: every token whole and at once, the last one together with the text.

The contract's pieces of text stop before a stop string and hold back what may become one; TGI's do not. So the text is
made from the ids here, by the same code.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fusionroute.errors import FusionRouteError, InternalFault, Reason, Unavailable
from fusionroute.v1 import router_pb2
from router_service.http.errors import http_status
from router_service.live_turn import LiveTurn
from router_service.serving import Serving

FINISH_REASONS = {
    router_pb2.FINISH_REASON_EOS: "eos_token",
    router_pb2.FINISH_REASON_STOP: "stop_sequence",
    router_pb2.FINISH_REASON_LENGTH: "length",
    router_pb2.FINISH_REASON_CONTEXT: "length",
}


@dataclass(frozen=True, slots=True)
class TgiEnding:
    """How an answer ended.

    Attributes:
        seed: None where nothing was drawn.
    """

    generated_text: str
    finish_reason: str
    num_generated: int
    num_input: int
    seed: int | None

    def details(self) -> dict[str, Any]:
        """As `details` of a stream's last event."""
        return {
            "finish_reason": self.finish_reason,
            "generated_tokens": self.num_generated,
            "seed": self.seed,
            "input_length": self.num_input,
        }


@dataclass(frozen=True, slots=True)
class TgiToken:
    """A token of an answer; the last one has the ending."""

    index: int
    id: int
    text: str
    logprob: float | None
    special: bool
    top: Sequence[dict[str, Any]] = ()
    ending: TgiEnding | None = None

    def to_json(self) -> dict[str, Any]:
        """As TGI writes it."""
        return {"id": self.id, "text": self.text, "logprob": self.logprob, "special": self.special}


class TokenReader:
    """Makes TGI's tokens of a turn's events.

    Args:
        live: the turn.
        serving: the checkpoint that writes it.
        has_constraint: whether it may end at any token, so that each one waits for the next.
    """

    def __init__(self, live: LiveTurn, serving: Serving, *, has_constraint: bool = False) -> None:
        self._live = live
        self._serving = serving
        self._special_ids = frozenset(serving.tokenizer.all_special_ids)
        self._has_constraint = has_constraint
        self._text = serving.answer_text((), live.context)
        self._until_stop = serving.answer_text(live.turn.stops, live.context)
        self._pieces: list[str] = []
        self._pieces_until_stop: list[str] = []

    async def read(self, events: AsyncIterable[router_pb2.GenerationEvent]) -> AsyncGenerator[TgiToken, None]:
        """The tokens as they come; the last one, with the ending, when the turn has ended.

        Raises:
            FusionRouteError: why the turn broke off.
        """
        held: TgiToken | None = None
        async for event in events:
            match event.WhichOneof("event"):
                case "token":
                    if held is not None:
                        yield held
                        held = None
                    token = self._token(event.token)
                    if self._may_be_last(token):
                        held = token
                    else:
                        yield token
                case "finished":
                    yield self._last(held, event.finished)

    def _token(self, token: router_pb2.Token) -> TgiToken:
        is_special = token.id in self._special_ids
        piece = self._text.push(token.id)
        self._pieces.append(piece)
        if self._until_stop.stop is None:
            self._pieces_until_stop.append(self._until_stop.push(token.id))
        top = [
            {"id": c.id, "text": c.text, "logprob": c.logprob, "special": c.id in self._special_ids}
            for c in token.top.fused
        ]
        return TgiToken(
            index=token.index + 1,
            id=token.id,
            text=self._serving.tokenizer.decode([token.id]) if is_special else piece,
            logprob=token.logprob if token.HasField("logprob") else None,
            special=is_special,
            top=top,
        )

    def _may_be_last(self, token: TgiToken) -> bool:
        turn, serving = self._live.turn, self._serving
        return (
            self._has_constraint
            or self._until_stop.stop is not None
            or token.index >= turn.max_tokens
            or self._live.answer_position + token.index >= serving.ensemble.max_context_tokens
            or (token.id in serving.ensemble.end_ids and not turn.ignore_eos)
        )

    def _last(self, held: TgiToken | None, finished: router_pb2.Finished) -> TgiToken:
        reason = FINISH_REASONS.get(finished.reason)
        if reason is None:
            raise Unavailable(Reason.LEFT_ALONE, "the answer was cancelled")
        if held is None:
            raise InternalFault(Reason.INTERNAL, "an answer ended after a token that was not its last")
        if self._until_stop.stop is None:
            text = "".join(self._pieces) + self._text.finish()
        else:
            text = "".join(self._pieces_until_stop) + self._until_stop.stop
        turn = self._live.turn
        ending = TgiEnding(
            generated_text=text,
            finish_reason=reason,
            num_generated=finished.num_generated_tokens,
            num_input=finished.num_prompt_tokens,
            seed=turn.sampling.seed if turn.sampling.temperature else None,
        )
        num_out = sum(map(len, self._pieces[:-1]))
        shown = held.text if held.special else text[num_out:]
        return TgiToken(held.index, held.id, shown, held.logprob, held.special, held.top, ending)


@dataclass(slots=True)
class TgiAnswer:
    """A whole answer."""

    tokens: list[TgiToken] = field(default_factory=list)

    @property
    def ending(self) -> TgiEnding:
        """How it ended; only of one that was read to its end."""
        ending = self.tokens[-1].ending
        assert ending is not None, "read to its end"
        return ending

    @property
    def mean_logprob(self) -> float:
        """By which the best of several answers is found."""
        return sum(token.logprob or 0.0 for token in self.tokens) / len(self.tokens)

    @classmethod
    async def read(cls, tokens: AsyncGenerator[TgiToken, None]) -> TgiAnswer:
        """All tokens of a stream. Raises FusionRouteError: why the turn broke off."""
        answer = cls()
        async with aclosing(tokens):
            async for token in tokens:
                answer.tokens.append(token)
        return answer

    def details(self, prefill: list[dict[str, Any]], *, with_top: bool) -> dict[str, Any]:
        """`details` of a response, or of one of its `best_of_sequences`."""
        ending = self.ending
        found: dict[str, Any] = {
            "finish_reason": ending.finish_reason,
            "generated_tokens": ending.num_generated,
            "seed": ending.seed,
            "prefill": prefill,
            "tokens": [token.to_json() for token in self.tokens],
        }
        if with_top:
            found["top_tokens"] = [list(token.top) for token in self.tokens]
        return found


@dataclass(frozen=True, slots=True)
class TgiError:
    """An error as TGI tells it."""

    status: int
    kind: str
    message: str

    @classmethod
    def of(cls, error: FusionRouteError) -> TgiError:
        """422 for what the caller can mend, 429 for no room, 401 for no key, else 424."""
        match http_status(error):
            case 400:
                return cls(422, "validation", f"Input validation error: {error.message}")
            case 429:
                return cls(429, "overloaded", f"Model is overloaded: {error.message}")
            case 401:
                return cls(401, "unauthenticated", error.message)
        return cls(424, "generation", f"Request failed during generation: {error.message}")

    def to_json(self) -> dict[str, str]:
        """The body."""
        return {"error": self.message, "error_type": self.kind}
