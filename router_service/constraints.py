"""What an answer must look like: which tokens may come next, as a pure function of the answer's tokens.

A constraint is compiled once for a vocabulary; each turn that is written advances a copy of its own, token by token as
they are written. Who goes on with a turn later rebuilds it from the tokens that stand. Nothing is ever forced: a token
is allowed if its text can be the next part of such an answer, however it would usually be cut into tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusionroute.errors import InvalidRequest, Reason, SessionStateError, invalid
from router_service.constraint_vocabulary import vocabulary_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MAX_COMPILED = 64
"""Compiled constraints that are kept for the next turn that wants them."""
MAX_LEXER_STATES = 50_000
"""Of one answer, about 2 KB each."""
MAX_MESSAGE_CHARACTERS = 400
JSON_LAYOUT = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}
"""A schema may ask for another one under `x-guidance`. Free white space lets a model write nothing else for ever."""
_NOT_FORCED = '\n%llguidance {"no_forcing": true}\n'

Allowed = NDArray[np.bool_]
"""For each token id [V] whether it may come next."""


class Language(Enum):
    """How a constraint is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


@dataclass(frozen=True, slots=True)
class Constraint:
    """A language of answers, as it was asked for."""

    language: Language
    text: str

    @property
    def field(self) -> str:
        """Of the request."""
        return f"constraint.{self.language.value}"


class ConstrainedAnswer:
    """Which tokens may come next in one answer.

    Attributes:
        is_complete: the answer is whole, and nothing may follow.
    """

    def __init__(self, matcher: LLMatcher, field: str, width: int, end_ids: frozenset[int]) -> None:
        self._matcher, self._field, self._width, self._end_ids = matcher, field, width, end_ids
        self._allowed: Allowed | None = None
        self.is_complete = False

    @property
    def allowed(self) -> Allowed:
        """For each token whether it may come next; at least one may.

        Raises:
            SessionStateError: CONSTRAINT_FAILED, no token of the vocabulary can go on with the answer.
        """
        if self._allowed is None:
            raise SessionStateError(Reason.CONSTRAINT_FAILED, f"{self._field}: {self._why_not()}")
        return self._allowed

    async def advance(self, token_id: int) -> None:
        """A token was written."""
        await asyncio.to_thread(self.consume, (token_id,))

    def consume(self, token_ids: Sequence[int]) -> None:
        """Tokens were written; takes up to milliseconds. Those that end an answer are no part of it."""
        matcher = self._matcher
        for token_id in token_ids:
            if token_id not in self._end_ids and not matcher.consume_token(token_id):
                break
        self._allowed = None
        if matcher.is_error():
            return
        if matcher.is_stopped():
            self.is_complete = matcher.is_accepting()
            return
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.is_error():
            return
        allowed: Allowed = bits[: self._width].view(np.bool_)
        num_allowed = int(np.count_nonzero(allowed))
        num_ends = sum(bool(allowed[end]) for end in self._end_ids)
        if num_ends == num_allowed:
            self.is_complete = matcher.is_accepting()
        else:
            self._allowed = allowed

    def _why_not(self) -> str:
        stopped = self._matcher.stop_reason()
        if stopped in ("ParserTooComplex", "LexerTooComplex"):
            return "it takes too much work to tell which tokens may come next"
        return "no token of the vocabulary can go on with the answer"


class Constraints:
    """Compiles constraints for one vocabulary and keeps them.

    Args:
        tokenizer: of the checkpoint.
        width: token ids are below this.
        end_ids: ids that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, end_ids: frozenset[int]) -> None:
        self._tokenizer, self._width, self._end_ids = tokenizer, width, end_ids
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._turn_to_compile = asyncio.Lock()  # of many that come at once, one computes

    async def check(self, constraint: Constraint) -> None:
        """Compiles a constraint, so that a turn may begin.

        Raises:
            InvalidRequest: naming the field and what is wrong with it.
        """
        await self._matcher(constraint)

    async def begin(self, constraint: Constraint, answer_ids: Sequence[int]) -> ConstrainedAnswer:
        """What may follow the answer so far. Raises as `check`."""
        matcher = await self._matcher(constraint)
        return await asyncio.to_thread(self._begin, matcher, constraint, answer_ids)

    async def _matcher(self, constraint: Constraint) -> LLMatcher:
        if constraint not in self._compiled:
            async with self._turn_to_compile:
                if constraint not in self._compiled:
                    self._compiled[constraint] = await asyncio.to_thread(self._compile, constraint)
                    while len(self._compiled) > MAX_COMPILED:
                        self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return self._compiled[constraint]

    def _begin(
        self, matcher: LLMatcher, constraint: Constraint, answer_ids: Sequence[int]
    ) -> ConstrainedAnswer:
        answer = ConstrainedAnswer(matcher.deep_copy(), constraint.field, self._width, self._end_ids)
        answer.consume(answer_ids)
        return answer

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher

        if self._vocabulary is None:
            self._vocabulary = vocabulary_of(self._tokenizer, self._width, self._end_ids)
        grammar = _grammar_of(constraint)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=_limits())
        if matcher.is_error():
            raise _refusal(constraint, matcher.get_error())
        beginning = self._begin(matcher, constraint, ())
        if beginning.is_complete:
            raise _refusal(constraint, "only the empty answer is allowed by it")
        try:
            _ = beginning.allowed
        except SessionStateError as error:
            raise _refusal(
                constraint, f"{error.message}; the model's tokens lack what it begins with"
            ) from error
        return matcher


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)


def _grammar_of(constraint: Constraint) -> str:
    """In the Lark syntax of llguidance."""
    from llguidance import LLMatcher

    if constraint.language is Language.JSON_SCHEMA:
        return f"start: %json {json.dumps(_schema_of(constraint))}{_NOT_FORCED}"
    if constraint.language is Language.REGEX:
        escaped = json.loads(LLMatcher.grammar_from_regex(constraint.text))["grammars"][0]["lark_grammar"]
        return f"{escaped}{_NOT_FORCED}"
    return f"{constraint.text}{_NOT_FORCED}"


def _schema_of(constraint: Constraint) -> Any:
    try:
        schema = json.loads(constraint.text)
    except (ValueError, RecursionError) as error:
        raise _refusal(constraint, f"not valid JSON: {error}") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise _refusal(constraint, "a JSON Schema is an object")
    return {"x-guidance": JSON_LAYOUT, **schema}


def _refusal(constraint: Constraint, message: str) -> InvalidRequest:
    said = " ".join(message.replace(_NOT_FORCED.strip(), "").split())
    if len(said) > MAX_MESSAGE_CHARACTERS:
        said = f"{said[:MAX_MESSAGE_CHARACTERS]}..."
    return invalid(constraint.field, constraint.text, said)
