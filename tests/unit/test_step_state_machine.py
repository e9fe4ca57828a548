"""The truth table of Step, explored: any interleaving of feeding, rollback, catch-up, eviction and nonsense.

Half of the time sessions share what they have in common, which no answer may show but by what it did not compute.

The machine keeps what a caller would know of each session (its tokens and fence) and predicts every answer from the
table; rows are compared with eager forwards of the whole text.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import dataclass, field

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fusionroute.engine import Draft, Engine, EngineLimits, StepCall, StepOutcome, digest, prepare_model
from fusionroute.errors import FusionRouteError, Reason
from tests.tiny_models import WIDTH, eager_rows, tiny_model, word_tokenizer

SESSIONS = st.sampled_from(["a", "b", "c", "d"])
TOKENS = st.lists(st.integers(2, WIDTH - 1), min_size=1, max_size=12)
KV_TOKENS = 160  # room for two or three sessions of the longest, so others are evicted
FAMILIES = ["llama", "gemma2", "qwen2"]
MODELS = {family: tiny_model(family) for family in FAMILIES}


@dataclass
class Known:
    """What the caller believes of a session."""

    tokens: list[int] = field(default_factory=list)
    fence: int = 0


class StepMachine(RuleBasedStateMachine):
    """One engine and four sessions."""

    @initialize(
        family=st.sampled_from(FAMILIES),
        chunk=st.sampled_from([1, 3, 512]),
        shortest=st.sampled_from([0, 2, 5]),
    )
    def start(self, family: str, chunk: int, shortest: int) -> None:
        self.is_sharing = shortest > 0
        self.reference = MODELS[family]
        loaded = prepare_model(copy.deepcopy(self.reference), word_tokenizer(), name=family, epoch=3)
        self.runner = asyncio.Runner()
        limits = EngineLimits(
            kv_tokens=KV_TOKENS, prefill_chunk_tokens=chunk, shortest_shared_tokens=shortest
        )
        self.engine = self.runner.run(Engine(loaded, limits).__aenter__())
        self.known: dict[str, Known] = {}

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.engine.__aexit__(None, None, None))
            self.runner.close()

    def forget_the_evicted(self) -> None:
        views, _ = self.runner.run(self.engine.list_sessions(100))
        cached = {view.session_id: view for view in views}
        for name in list(self.known):
            if name not in cached:
                del self.known[name]

    def draw_known(self, data: st.DataObject) -> tuple[str, Known]:
        name = data.draw(st.sampled_from(sorted(self.known)))
        return name, self.known[name]

    def call(self, call: StepCall) -> StepOutcome | Reason:
        try:
            return self.runner.run(self.engine.step(call))
        except FusionRouteError as error:
            self.error = error
            return error.reason

    def expect_rows(self, name: str, call: StepCall, fence: int) -> None:
        known = self.known.setdefault(name, Known())
        tokens = known.tokens[: call.from_position] + list(call.token_ids)
        outcome = self.call(call)
        assert isinstance(outcome, StepOutcome), outcome
        assert outcome.position == len(tokens)
        assert outcome.rows.shape == (call.num_rows, WIDTH)
        if call.num_rows:
            wanted = eager_rows(self.reference, tokens)[-call.num_rows :]
            torch.testing.assert_close(outcome.rows, wanted, atol=2e-5, rtol=2e-5)
        self.known[name] = Known(tokens, fence)
        self.forget_the_evicted()
        assert name in self.known

    @rule(name=SESSIONS, tokens=TOKENS, data=st.data())
    def feed_from_anywhere_within_the_cache(self, name: str, tokens: list[int], data: st.DataObject) -> None:
        """from = L feeds, from < L rolls back, from = 0 creates."""
        known = self.known.get(name, Known())
        start = data.draw(st.integers(0, len(known.tokens)))
        tokens = tokens[: max(0, 64 - start)]
        if not tokens:
            return
        num_rows = data.draw(st.integers(0, len(tokens)))
        prefix = digest(known.tokens[:start]) if data.draw(st.booleans()) else None
        fence = max(1, known.fence) + data.draw(st.integers(0, 1))
        self.expect_rows(name, StepCall(name, start, tokens, num_rows, 3, fence, prefix), fence)

    @precondition(lambda self: self.known)
    @rule(name=SESSIONS, tokens=TOKENS, data=st.data())
    def begin_like_another(self, name: str, tokens: list[int], data: st.DataObject) -> None:
        """A session that is new, or begun anew, with the first tokens of one that is cached."""
        _, other = self.draw_known(data)
        count = data.draw(st.integers(0, len(other.tokens)))
        fence = max(1, self.known.get(name, Known()).fence)
        self.expect_rows(name, StepCall(name, 0, [*other.tokens[:count], *tokens][:64], 1, 3, fence), fence)

    @precondition(lambda self: self.known)
    @rule(num_tokens=st.integers(1, 5), data=st.data())
    def let_the_model_go_on(self, num_tokens: int, data: st.DataObject) -> None:
        name, known = self.draw_known(data)
        start = len(known.tokens) - 1
        call = StepCall(name, start, known.tokens[start:], 1, 3, known.fence, draft=Draft(num_tokens))
        outcome = self.call(call)
        assert isinstance(outcome, StepOutcome), outcome
        tokens = [*known.tokens, *outcome.drafted_ids]
        assert outcome.position == len(tokens)
        wanted = eager_rows(self.reference, tokens)[start:]
        torch.testing.assert_close(outcome.rows, wanted, atol=2e-5, rtol=2e-5)
        self.known[name] = Known(tokens, known.fence)
        self.forget_the_evicted()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def repeat_tokens_that_are_cached(self, data: st.DataObject) -> None:
        name, known = self.draw_known(data)
        start = data.draw(st.integers(0, len(known.tokens) - 1))
        call = StepCall(name, start, known.tokens[start:], 1, fence=known.fence)
        before = self.engine.load().num_forwards
        self.expect_rows(name, call, known.fence)
        assert self.engine.load().num_forwards == before + 1

    @rule(name=SESSIONS, tokens=TOKENS, ahead=st.integers(1, 5))
    def ask_ahead_of_the_cache(self, name: str, tokens: list[int], ahead: int) -> None:
        known = self.known.get(name)
        length = len(known.tokens) if known else 0
        reason = self.call(StepCall(name, length + ahead, tokens, 1, fence=known.fence if known else 0))
        if known is None:
            assert reason is Reason.SESSION_UNKNOWN
        else:
            assert reason is Reason.POSITION_AHEAD
            assert self.error.cached_length == length

    @precondition(lambda self: self.known)
    @rule(tokens=TOKENS, data=st.data())
    def ask_with_a_stale_fence(self, tokens: list[int], data: st.DataObject) -> None:
        name, known = self.draw_known(data)
        call = StepCall(name, len(known.tokens), tokens, 1, fence=known.fence - 1)
        assert self.call(call) is Reason.STALE_FENCE

    @precondition(lambda self: self.known)
    @rule(tokens=TOKENS, data=st.data())
    def ask_with_the_digest_of_other_tokens(self, tokens: list[int], data: st.DataObject) -> None:
        name, known = self.draw_known(data)
        wrong = digest([*known.tokens, 5])
        call = StepCall(name, len(known.tokens), tokens, 1, fence=known.fence, prefix_digest=wrong)
        assert self.call(call) is Reason.DIGEST_MISMATCH

    @rule(name=SESSIONS, bad=st.sampled_from(["epoch", "token", "rows", "empty", "long"]))
    def ask_for_the_impossible(self, name: str, bad: str) -> None:
        known = self.known.get(name, Known())
        length, fence = len(known.tokens), known.fence
        call, reason = {
            "epoch": (StepCall(name, length, [2], 1, 99, fence), Reason.EPOCH_MISMATCH),
            "token": (StepCall(name, length, [2, WIDTH], 1, 3, fence), Reason.TOKEN_OUT_OF_RANGE),
            "rows": (StepCall(name, length, [2], 2, 3, fence), Reason.INVALID_FIELD),
            "empty": (StepCall(name, length, [], 0, 3, fence), Reason.INVALID_FIELD),
            "long": (StepCall(name, length, [2] * 97, 1, 3, fence), Reason.CONTEXT_FULL),
        }[bad]
        assert self.call(call) is reason

    @rule(name=SESSIONS)
    def close(self, name: str) -> None:
        known = self.known.pop(name, None)
        existed = self.runner.run(self.engine.close_session(name, known.fence if known else 0))
        assert existed == (known is not None)

    @invariant()
    def the_engine_holds_what_the_caller_believes(self) -> None:
        if not hasattr(self, "runner"):
            return
        views, count = self.runner.run(self.engine.list_sessions(100))
        assert count == len(views) == len(self.known)
        for view in views:
            known = self.known[view.session_id]
            assert (view.cached_length, view.fence, view.busy) == (len(known.tokens), known.fence, False)
        load = self.engine.load()
        own = sum(view.kv_tokens_reserved for view in views)
        assert own <= load.kv_tokens_used <= KV_TOKENS
        if not self.is_sharing or not views:
            assert own == load.kv_tokens_used
        assert load.queue_depth == 0


StepMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)  # shrinking would take minutes, and the printed steps are few enough to read
TestStep = StepMachine.TestCase
