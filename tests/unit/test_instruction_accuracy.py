"""Accuracy over prompts and over instructions, strictly and loosely."""

from __future__ import annotations

import pytest

from evaluation.questions import Answer, Question
from evaluation.verifiers.instructions.accuracy import Share, accuracy
from evaluation.verifiers.instructions.judging import Strictness

TITLE, QUOTED, NO_COMMA = "detectable_format:title", "startend:quotation", "punctuation:no_comma"


def asked(number, *names):
    facts = {"instructions": [{"name": name, "arguments": {}} for name in names]}
    return Question(id=f"ifeval/{number}", task="ifeval", prompt="p", facts=facts)


ANSWERED = [
    (asked(1, NO_COMMA), Answer("a", is_complete=True)),
    (asked(2, NO_COMMA, TITLE, QUOTED), Answer('*"<<a>>, b"*', is_complete=True)),
    (asked(3, TITLE, QUOTED), Answer('Here it is:\n"<<a>>"', is_complete=True)),
    (asked(4, NO_COMMA), Answer("", is_complete=True)),
]


def test_prompts_need_all_their_instructions_and_instructions_count_one_by_one():
    strict = accuracy(ANSWERED, Strictness.STRICT)
    assert strict.prompts.value == 1 / 4
    assert strict.instructions.value == pytest.approx(3 / 7)
    assert strict.by_kind == {TITLE: Share(2, 2), QUOTED: Share(0, 2), NO_COMMA: Share(1, 3)}
    assert strict.by_group == {
        "detectable_format": Share(2, 2),
        "startend": Share(0, 2),
        "punctuation": Share(1, 3),
    }


def test_loosely_emphasis_and_an_introduction_do_no_harm():
    loose = accuracy(ANSWERED, Strictness.LOOSE)
    assert loose.prompts.value == 2 / 4
    assert loose.instructions.value == pytest.approx(5 / 7)
    assert loose.by_kind[QUOTED] == Share(2, 2)


def test_shares_lie_within_their_intervals():
    strict = accuracy(ANSWERED, Strictness.STRICT)
    for estimate in (strict.prompts, strict.instructions):
        assert 0.0 <= estimate.low < estimate.value < estimate.high <= 1.0


def test_no_answers_have_no_accuracy():
    with pytest.raises(ValueError, match="0 right of 0 items"):
        accuracy([], Strictness.STRICT)
