"""A swap step by step: whatever fails before the flip leaves the old expert alone; no slot is left empty after it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fusionroute.cli import expert_changes
from fusionroute.errors import InvalidRequest, Reason, SessionStateError, Unavailable
from fusionroute.launching import Launch, LaunchFailed
from fusionroute.swapping import canary
from fusionroute.swapping.canary import Canary, Comparison, Sample, compare, read_samples
from fusionroute.swapping.flip import FlipUnknown
from fusionroute.swapping.parts import Step, SwapFailed, SwapRefused
from fusionroute.swapping.reloading import reload_instances
from fusionroute.swapping.swap import Outcome, Swap, SwapReport
from fusionroute.v1.registry_pb2 import DRAIN_POLICY_MIGRATE
from tests.swap_fakes import DRAINING, READY, STANDBY, FakeExpert, Stage, a_model, until_told

LAUNCH = Launch("math", "models/new", "router:1")


@pytest.fixture
def stage() -> Stage:
    return Stage()


def a_swap(stage: Stage, *, keep: bool = False, canary: Canary | None = None) -> Swap:
    return Swap(stage.parts(), LAUNCH, DRAIN_POLICY_MIGRATE, canary or Canary(), keep=keep)


async def failure_of(swap: Swap) -> SwapFailed:
    with pytest.raises(SwapFailed) as caught:
        await swap.run()
    return caught.value


async def test_a_swap_tells_its_steps_and_stops_the_old_one_last(stage: Stage) -> None:
    report = await a_swap(stage).run()
    assert report == SwapReport(
        Outcome.SWAPPED,
        "math",
        "new",
        stage.registry.revision,
        ("old",),
        ("old",),
        Comparison(-1, -1, 0.5, 192),
    )
    assert list(dict.fromkeys(step for step, _ in stage.told)) == list(Step)
    assert stage.registry.states() == {"new": READY}
    assert stage.running == {"new"}


async def test_the_first_expert_of_a_slot_needs_nobody_to_be_compared_with(stage: Stage) -> None:
    stage.registry.entries.clear()
    stage.experts["new"].nats = -99.0
    report = await a_swap(stage).run()
    assert (report.retired, report.comparison) == ((), None)
    assert stage.registry.states() == {"new": READY}


def start_fails(stage: Stage) -> None:
    stage.start_error = LaunchFailed("no such program", ["oops"])


def dies(stage: Stage) -> None:
    stage.dies = True


def never_serves(stage: Stage) -> None:
    stage.serves = False


def never_registers(stage: Stage) -> None:
    stage.enters = False


def speaks_another_vocabulary(stage: Stage) -> None:
    stage.experts["new"].model.CopyFrom(a_model("b", tokenizer_fingerprint="letters"))


def has_a_shorter_context(stage: Stage) -> None:
    stage.experts["new"].model.CopyFrom(a_model("b", max_context_tokens=95))


def gives_no_finite_logits(stage: Stage) -> None:
    stage.experts["new"].is_finite = False


def writes_worse(stage: Stage) -> None:
    stage.experts["new"].nats = -1.51


def scores_not_a_number(stage: Stage) -> None:
    stage.experts["new"].nats = float("nan")


def is_refused_at_the_flip(stage: Stage) -> None:
    stage.registry.failures = [SessionStateError(Reason.LEASE_EXPIRED, "gone")]


def meets_a_third_one(stage: Stage) -> None:
    """Somebody else swaps while the canary is scored."""
    score = stage.experts["new"].answer_log_probs

    async def scored(sequences: object) -> list[float]:
        stage.registry.enter("third", READY, a_model("c"))
        stage.registry.revision += 1
        return await score(sequences)  # type: ignore[arg-type]

    stage.experts["new"].answer_log_probs = scored  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("trouble", "step", "words"),
    [
        (start_fails, Step.START, "no such program"),
        (dies, Step.SERVE, "new ended"),
        (never_serves, Step.SERVE, "gave up after 0.3 s"),
        (never_registers, Step.REGISTER, "gave up after 0.2 s"),
        (speaks_another_vocabulary, Step.COMPARE, "tokenizer_fingerprint letters"),
        (has_a_shorter_context, Step.COMPARE, "context of 95"),
        (gives_no_finite_logits, Step.WARM_UP, "NON_FINITE_LOGITS"),
        (writes_worse, Step.CANARY, "-1.510 nats per token, -1.000 of the old one, margin 0.5"),
        (scores_not_a_number, Step.CANARY, "nan"),
        (meets_a_third_one, Step.FLIP, "old, third"),
    ],
)
async def test_what_fails_before_the_flip_stops_the_new_one_and_leaves_the_old(
    stage: Stage, trouble: Callable[[Stage], None], step: Step, words: str
) -> None:
    before = stage.registry.entries["old"].SerializeToString()
    trouble(stage)
    error = await failure_of(a_swap(stage))
    assert error.step is step
    assert words in str(error)
    assert stage.registry.entries["old"].SerializeToString() == before
    assert "new" not in stage.registry.entries
    assert stage.running == {"old"}


async def test_a_new_expert_that_ends_or_is_late_shows_its_last_words(stage: Stage) -> None:
    dies(stage)
    assert (await failure_of(a_swap(stage))).log_tail == ["last words"]
    late = Stage(serves=False)
    assert (await failure_of(a_swap(late))).log_tail == ["so far"]


async def test_what_the_registry_refuses_at_the_flip_leaves_the_old_one(stage: Stage) -> None:
    is_refused_at_the_flip(stage)
    with pytest.raises(SessionStateError):
        await a_swap(stage).run()
    assert (stage.registry.states(), stage.running) == ({"old": READY}, {"old"})


@pytest.mark.parametrize("step", [Step.START, Step.SERVE, Step.REGISTER, Step.WARM_UP])
async def test_an_interruption_before_the_flip_stops_the_new_one(stage: Stage, step: Step) -> None:
    stage.start_seconds = 0.05  # interrupted at START while the thread is at it
    swapping = asyncio.create_task(a_swap(stage).run())

    def interrupt(told: Step) -> None:
        if told is step:
            swapping.cancel()

    stage.on_tell = interrupt
    with pytest.raises(asyncio.CancelledError):
        await swapping
    assert stage.stopped == ["new"]
    assert stage.registry.states() == {"old": READY}


async def test_a_conflict_over_something_else_is_tried_again(stage: Stage) -> None:
    stage.registry.failures = [SessionStateError(Reason.REVISION_CONFLICT, "old") for _ in range(3)]
    assert (await a_swap(stage).run()).outcome is Outcome.SWAPPED


async def test_a_lost_answer_to_the_flip_is_found_out(stage: Stage) -> None:
    stage.registry.failures = [Unavailable(Reason.STORE_UNAVAILABLE, "lost")]
    stage.registry.is_lossy = True
    report = await a_swap(stage).run()
    assert (report.outcome, report.retired, report.stopped) == (Outcome.SWAPPED, ("old",), ("old",))


async def test_an_unknown_flip_stops_nobody(stage: Stage) -> None:
    stage.registry.failures = [Unavailable(Reason.STORE_UNAVAILABLE, "lost")]
    stage.registry.is_lossy = True
    goes_away = iter([False] * 3 + [True] * 1000)  # before, at the registration, at the flip; then no more
    stage.registry.on_list = lambda: setattr(stage.registry, "is_away", next(goes_away))
    assert isinstance(await failure_of(a_swap(stage)), FlipUnknown)
    assert stage.running == {"old", "new"}


async def test_the_old_one_is_stopped_only_when_its_sessions_have_left(stage: Stage) -> None:
    stage.experts["old"].busy_until = time.monotonic() + 0.25
    await a_swap(stage).run()
    assert time.monotonic() >= stage.experts["old"].busy_until
    assert stage.stopped == ["old"]


async def test_sessions_that_stay_are_not_waited_for_beyond_the_deadline(stage: Stage) -> None:
    stage.experts["old"].busy_until = time.monotonic() + 1000
    assert (await a_swap(stage).run()).stopped == ("old",)


async def test_a_rollback_by_somebody_else_stops_the_new_one_instead(stage: Stage) -> None:
    stage.experts["old"].busy_until = time.monotonic() + 1000
    swapping = asyncio.create_task(a_swap(stage).run())
    await until_told(stage, Step.DRAIN)
    await stage.registry.roll_back("math", 0, DRAIN_POLICY_MIGRATE)
    report = await swapping
    assert (report.outcome, report.stopped) == (Outcome.ROLLED_BACK, ("new",))
    assert (stage.registry.states(), stage.running) == ({"old": READY}, {"old"})


async def test_a_new_one_that_dies_while_the_old_drains_gives_the_slot_back(stage: Stage) -> None:
    stage.experts["old"].busy_until = time.monotonic() + 1000
    swapping = asyncio.create_task(a_swap(stage).run())
    await until_told(stage, Step.DRAIN)
    stage.dies = True
    with pytest.raises(SwapFailed, match="old serves again") as caught:
        await swapping
    assert caught.value.log_tail == ["last words"]
    assert stage.registry.states() == {"old": READY}
    assert "old" not in stage.stopped


async def test_the_old_one_is_kept_while_nobody_else_serves(stage: Stage) -> None:
    stage.experts["old"].busy_until = time.monotonic() + 0.1
    swapping = asyncio.create_task(a_swap(stage).run())
    await until_told(stage, Step.DRAIN)
    stage.registry.entries.pop("new")  # its lease has ended, its process lives
    with pytest.raises(SwapFailed, match="nobody else serves slot math"):
        await swapping
    assert stage.running == {"old", "new"}


async def test_an_interruption_after_the_flip_leaves_both(stage: Stage) -> None:
    stage.experts["old"].busy_until = time.monotonic() + 1000
    swapping = asyncio.create_task(a_swap(stage).run())
    await until_told(stage, Step.DRAIN)
    swapping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await swapping
    assert stage.registry.states() == {"old": DRAINING, "new": READY}
    assert stage.stopped == []


async def test_an_old_one_that_was_started_elsewhere_is_left_draining(stage: Stage) -> None:
    stage.running.discard("old")
    assert (await a_swap(stage).run()).stopped == ()
    assert stage.registry.states() == {"old": DRAINING, "new": READY}
    assert "stop it where it was" in stage.told[-1][1]


async def test_an_added_expert_serves_beside_the_others(stage: Stage) -> None:
    stage.experts["new"].model.weights_fingerprint = "a"
    report = await a_swap(stage, keep=True).run()
    assert (report.outcome, report.retired) == (Outcome.ADDED, ())
    assert stage.registry.states() == {"old": READY, "new": READY}
    assert stage.stopped == []


async def test_other_weights_are_not_added(stage: Stage) -> None:
    error = await failure_of(a_swap(stage, keep=True))
    assert isinstance(error, SwapRefused)
    assert "use swap" in str(error)
    assert stage.registry.states() == {"old": READY}


async def test_reloaded_experts_all_serve_again(stage: Stage) -> None:
    stage.registry.enter("new", READY, stage.experts["new"].model)
    entries = list(stage.registry.entries.values())
    for expert, name in ((stage.experts["old"], "old"), (stage.experts["new"], "new")):
        stage.registry.entries[name].model.epoch = expert.model.epoch + 1
    entries = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
    stage.registry.entries["old"].state = DRAINING  # the first one took the slot over
    await reload_instances(stage.parts(), entries, 5)
    assert stage.registry.states() == {"old": READY, "new": READY}


async def test_the_canary_scores_given_answers_by_both() -> None:
    canary = Canary((Sample((1, 2), (3,)), Sample((4,), (5, 6))), margin_nats=0.1)
    found = await compare(canary, FakeExpert(a_model(), -1.0), FakeExpert(a_model(), -1.05), 61)
    assert (found.num_tokens, found.is_worse) == (3, False)
    found = await compare(canary, FakeExpert(a_model(), -1.0), FakeExpert(a_model(), -1.2), 61)
    assert found.is_worse


def test_samples_come_from_a_file_whose_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"prompt": "ab", "answer": "c"}\n\n{"prompt": "d", "answer": "ef"}\n')
    assert read_samples(path, lambda text: [ord(letter) for letter in text]) == (
        Sample((97, 98), (99,)),
        Sample((100,), (101, 102)),
    )
    for bad in ("no json", '{"prompt": "x"}', '{"prompt": "x", "answer": ""}', "[]"):
        path.write_text('{"prompt": "a", "answer": "b"}\n' + bad)
        with pytest.raises(InvalidRequest, match="line 2"):
            read_samples(path, lambda text: [ord(letter) for letter in text])
    path.write_text("")
    with pytest.raises(InvalidRequest, match="0 lines"):
        read_samples(path, lambda text: [1])


async def test_a_new_one_that_does_not_stand_by_is_not_flipped_to(stage: Stage) -> None:
    def serve_at_once() -> None:
        if "new" in stage.registry.entries:
            stage.registry.entries["new"].state = READY

    stage.registry.on_list = serve_at_once
    error = await failure_of(a_swap(stage))
    assert error.step is Step.REGISTER
    assert STANDBY not in stage.registry.states().values()


def test_the_command_has_the_margin_of_the_canary() -> None:
    assert expert_changes.DEFAULT_MARGIN_NATS == canary.DEFAULT_MARGIN_NATS
