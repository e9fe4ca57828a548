"""What follows from what many systems would have written at each token of a gold answer."""

from __future__ import annotations

import pytest

from evaluation.judged import JudgedText, Opinion, best_expert_each_token, first_choice, some_expert
from evaluation.questions import RIGHT
from evaluation.systems.ways import ROUTING_ONLY, SUM, available_ways, expert_ways

GOLD = (7, 8, 9)
MATH, STRINGS = expert_ways(["math", "strings"])


def opinion(best: tuple[int, ...], logprobs: tuple[float, ...], *experts: str) -> Opinion:
    return Opinion(best, logprobs, experts or ("",) * len(best))


def judged(**opinions: Opinion) -> JudgedText:
    return JudgedText(GOLD, {name.replace("__", "/"): each for name, each in opinions.items()})


def test_an_answer_is_right_exactly_when_every_first_choice_is() -> None:
    text = judged(
        sum=opinion(GOLD, (-0.1, -0.2, -0.3), "math", "math", ""), route=opinion((7, 8, 1), (0, 0, -4.0))
    )
    assert text.verdict("sum") == RIGHT
    assert text.answer("sum", "gold").text == "gold"
    assert text.answer("sum", "gold").logprob == pytest.approx(-0.6)
    assert not text.verdict("route").is_right and "place 2" in text.verdict("route").note
    assert text.answer("route", "gold").text == "" and not text.answer("route", "gold").is_complete


def test_oracle_routing_takes_at_each_token_the_expert_that_finds_gold_most_probable() -> None:
    each_knows_some = judged(
        expert__math=opinion((7, 8, 0), (-0.1, -0.1, -5.0)),
        expert__strings=opinion((0, 0, 9), (-6.0, -6.0, -0.1)),
    )
    assert best_expert_each_token(each_knows_some, [MATH, STRINGS]) == RIGHT
    assert not some_expert(each_knows_some, [MATH, STRINGS]).is_right
    # more probable to one that would write something else: that one is taken, and wrong
    misled = judged(
        expert__math=opinion((7, 8, 0), (-0.1, -0.1, -0.8)),
        expert__strings=opinion((7, 8, 9), (-0.2, -0.2, -0.9)),
    )
    assert not best_expert_each_token(misled, [MATH, STRINGS]).is_right
    assert some_expert(misled, [MATH, STRINGS]).is_right


@pytest.mark.parametrize(("first", "is_right"), [("strings", False), ("math", True)])
def test_the_first_choice_writes_the_whole_answer(first: str, is_right: bool) -> None:
    text = judged(
        route=opinion(GOLD, (0, 0, 0), first, "math", "strings"),
        expert__math=opinion(GOLD, (0, 0, 0)),
        expert__strings=opinion((7, 0, 0), (0, 0, 0)),
    )
    assert first_choice(text, ROUTING_ONLY, {"math": MATH, "strings": STRINGS}).is_right is is_right


def test_overruled_tokens_are_mended_spoiled_or_neither() -> None:
    text = judged(
        sum=opinion((7, 1, 2), (0, 0, 0), "math", "math", "strings"),
        expert__math=opinion((0, 8, 9), (0, 0, 0)),
        expert__strings=opinion((7, 8, 3), (0, 0, 0)),
    )
    alone = {"math": "expert/math", "strings": "expert/strings"}
    assert [each.kinds for each in text.overruled("sum", alone)] == [
        ["overruled", "mended"],
        ["overruled", "spoiled"],
        ["overruled", "neither"],
    ]
    text_alone = judged(sum=opinion(GOLD, (0, 0, 0), "", "math", ""), expert__math=opinion(GOLD, (0, 0, 0)))
    assert [each.kinds for each in text_alone.overruled("sum", alone)] == [[]], (
        "only where an expert took part"
    )


def test_what_was_written_down_is_read_back() -> None:
    text = judged(sum=opinion(GOLD, (-0.123456789, -2.0, 0.0), "math", "", "math"))
    again = JudgedText.from_json(text.to_json())
    assert again.ids == GOLD and again.opinions["sum"].experts == ("math", "", "math")
    assert again.opinions["sum"].logprobs == (-0.12346, -2.0, 0.0)


def test_a_router_is_asked_only_for_what_it_can_serve() -> None:
    names = [way.name for way in available_ways(["a", "b"], ["sum", "route", "router"])]
    assert names == ["expert/a", "expert/b", "router", "route", "sum", "random", "fixed/a", "fixed/b"]
    assert SUM.of("cdpo", "after CDPO").name == "cdpo/sum"
