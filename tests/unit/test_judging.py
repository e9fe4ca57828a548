"""Pairs are read strictly, verdicts too; what they add up to is told without hiding what is missing."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.judging.journal import JudgingJournal
from evaluation.judging.judgements import Ask, Judgement, Order, PairVerdict, verdict_of
from evaluation.judging.pairs import AnswerPair, read_answer_pairs, read_labelled_pairs
from evaluation.judging.prompting import BUILT_IN, Choice, JudgePrompt, ReplyForm, read_choice
from evaluation.judging.scores import behaviour, tally
from fusionroute.errors import InvalidRequest, Reason

A, B, TIE, NONSENSE = Choice.SHOWN_FIRST, Choice.SHOWN_SECOND, Choice.TIE, Choice.UNPARSABLE
FACTS = {"judge": "j", "seed": 3}


def rows(file: Path, *told: Any) -> Path:
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in told)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def judged(pair: str, *choices: Choice | None, repeat: int = 0) -> list[Judgement]:
    """The final replies in both orders."""
    asks = [Ask(pair, order, repeat) for order in Order]
    return [
        Judgement(ask, int(choice is NONSENSE), 0, 0.0, choice, "")
        for ask, choice in zip(asks, choices, strict=True)
    ]


def pairs(number: int, prompt: Callable[[int], str] = str) -> list[AnswerPair]:
    return [AnswerPair(str(each), prompt(each), "x", "y") for each in range(number)]


# --- reading ---


def test_two_files_of_answers_meet_by_id_and_what_stands_alone_is_counted(tmp_path):
    ours = rows(
        tmp_path / "a.jsonl.gz",
        {"id": "2", "prompt": [{"role": "user", "content": "Why?"}], "answer": ""},
        {"id": "1", "prompt": "p", "answer": "left"},
        {"id": "3", "prompt": "p", "answer": "alone"},
    )
    theirs = rows(
        tmp_path / "b.jsonl",
        {"id": "1", "prompt": "p", "answer": "right"},
        "",
        {"id": "2", "prompt": "user: Why?", "answer": "so"},
    )
    read = read_answer_pairs(ours, theirs)
    assert read.pairs == (AnswerPair("2", "user: Why?", "", "so"), AnswerPair("1", "p", "left", "right"))
    assert (read.num_only_first, read.num_only_second) == (1, 0)


GOOD = {"id": "1", "prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "'[1]' is not a JSON object"),
        ({"id": 7, "prompt": "p", "answer": "a"}, "id = 7 is not allowed: a text"),
        ({"id": "2", "prompt": " ", "answer": "a"}, "prompt = ' ' is not allowed: a text that is not empty"),
        ({"id": "2", "prompt": [{"role": "user"}], "answer": "a"}, "prompt[0] = "),
        (
            {"id": "2", "prompt": [], "answer": "a"},
            "prompt = [] is not allowed: a text, or at least one message",
        ),
        ({"id": "2", "prompt": "p"}, "answer = None is not allowed: a text"),
        ({"id": "2", "prompt": "p", "answer": "x" * 200_001}, "answer = '200001 characters'"),
        (GOOD, "id = '1' is not allowed: an id that no row before has; line 1 has it"),
    ],
)
def test_a_bad_row_is_named_by_file_line_field_value_and_limit(tmp_path, bad, says):
    file = rows(tmp_path / "bad.jsonl", GOOD, bad)
    with pytest.raises(InvalidRequest) as raised:
        read_answer_pairs(rows(tmp_path / "good.jsonl", GOOD), file)
    assert f"{file}: line 2: {says}" in raised.value.message
    assert raised.value.reason is Reason.DATA_INVALID


def test_another_prompt_under_the_same_id_no_common_id_and_no_rows_are_refused(tmp_path):
    good = rows(tmp_path / "good.jsonl", GOOD)
    with pytest.raises(InvalidRequest, match=r"line 1: prompt = 'other' .* the prompt of '1' in"):
        read_answer_pairs(good, rows(tmp_path / "b.jsonl", {**GOOD, "prompt": "other"}))
    with pytest.raises(InvalidRequest, match="at least one id"):
        read_answer_pairs(good, rows(tmp_path / "c.jsonl", {**GOOD, "id": "9"}))
    with pytest.raises(InvalidRequest, match="at least one row"):
        read_answer_pairs(good, rows(tmp_path / "d.jsonl", ""))


def test_labelled_pairs_have_the_better_answer_first_and_their_source_as_group(tmp_path):
    row = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    read = read_labelled_pairs(rows(tmp_path / "l.jsonl", row, {**row, "id": "x", "source": "hard"}))
    assert read.pairs == (AnswerPair("1", "p", "good", "bad"), AnswerPair("x", "p", "good", "bad", "hard"))
    same = {**row, "chosen": "bad"}
    assert read_labelled_pairs(rows(tmp_path / "m.jsonl", same, row)).num_unlabelled == 1
    with pytest.raises(InvalidRequest, match="two different answers"):
        read_labelled_pairs(rows(tmp_path / "n.jsonl", same))


# --- asking and reading a verdict ---


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("A", A),
        ("Because it is true.\n\n B \n", B),
        ("A is better than B.\ntie", TIE),
        ("A\nis my verdict", NONSENSE),
        ("I choose A", NONSENSE),
        ("**A**", NONSENSE),
        ("unparsable", NONSENSE),
        ("", NONSENSE),
    ],
)
def test_a_verdict_is_the_last_line_and_nothing_else(reply, choice):
    assert read_choice(reply, ReplyForm.TEXT) is choice


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ('{"reasons": "", "verdict": "B"}', B),
        ('{"verdict": "tie"}', TIE),
        ('{"verdict": ["A"]}', NONSENSE),
        ('"A"', NONSENSE),
        ("A", NONSENSE),
        ("[" * 100_000, NONSENSE),
    ],
)
def test_a_verdict_in_json_is_the_field_of_that_name(reply, choice):
    assert read_choice(reply, ReplyForm.JSON) is choice


def test_what_stands_in_prompt_or_answers_is_never_a_placeholder(tmp_path):
    filled = JudgePrompt().filled("cost: $answer_b?", "$how $$5", "B")
    assert "cost: $answer_b?" in filled and "$how $$5" in filled
    assert filled.count("last line") == 1


def test_a_template_must_have_all_placeholders_and_no_others(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text(BUILT_IN.replace("Two", "Costs $$3. Two"))
    own = JudgePrompt.from_file(file, ReplyForm.TEXT)
    assert own.filled("p", "a", "b").startswith("Costs $3. Two assistants")
    assert own.digest != JudgePrompt().digest != JudgePrompt(form=ReplyForm.JSON).digest
    for broken in (BUILT_IN.replace("$how", ""), BUILT_IN + "$winner", BUILT_IN + " $5"):
        file.write_text(broken)
        with pytest.raises(InvalidRequest, match="template"):
            JudgePrompt.from_file(file, ReplyForm.TEXT)


# --- verdicts and what they add up to ---


@pytest.mark.parametrize(
    ("choices", "verdict"),
    [
        ((A, B), PairVerdict.WIN),
        ((B, A), PairVerdict.LOSS),
        ((TIE, TIE), PairVerdict.TIE),
        ((A, A), PairVerdict.INCONSISTENT),
        ((A, TIE), PairVerdict.INCONSISTENT),
        ((A, NONSENSE), PairVerdict.UNJUDGED),
        ((None, B), PairVerdict.UNJUDGED),
    ],
)
def test_a_pair_is_won_only_where_both_orders_say_so(choices, verdict):
    known = {each.ask: each for each in judged("1", *choices)}
    pair = AnswerPair("1", "p", "x", "y")
    assert verdict_of(pair, 0, known) is verdict
    assert verdict_of(pair, 1, known) is None
    assert verdict_of(AnswerPair("1", "p", "x", "x"), 1, known) is PairVerdict.TIE


def test_a_tally_counts_ties_as_half_and_shows_what_the_missing_could_change():
    said = [
        *judged("0", A, B),
        *judged("1", B, A),
        *judged("2", A, A),
        *judged("3", A, B),
        *judged("4", None, A),
    ]
    found = tally(pairs(5), said, 1)
    assert found.win_rate is not None and found.win_rate.value == pytest.approx(2.5 / 4)
    assert (found.least, found.most) == (2.5 / 5, 3.5 / 5)
    assert (found.prompts_won, found.prompts_lost, found.p_value) == (2, 1, 1.0)
    assert found.consistent is not None and found.consistent.value == 3 / 4
    assert (found.num_verdicts, found.num_judged) == (5, 4)


def test_answers_to_one_prompt_are_no_independent_evidence():
    said = [each for pair in range(40) for each in judged(str(pair), *((A, B) if pair % 4 else (B, A)))]
    apart = tally(pairs(40), said, 1).win_rate
    together = tally(pairs(40, lambda number: str(number % 4)), said, 1)
    assert apart is not None and together.win_rate is not None
    assert apart.value == together.win_rate.value == 0.75
    assert together.win_rate.high - together.win_rate.low > 2 * (apart.high - apart.low)
    assert (together.num_prompts, together.prompts_won, together.prompts_lost) == (4, 3, 1)
    assert together.p_value == pytest.approx(2 * 5 / 2**4)


def test_a_clean_sweep_is_not_certainty():
    found = tally(pairs(5), [each for pair in range(5) for each in judged(str(pair), A, B)], 1)
    assert found.win_rate is not None and found.win_rate.value == 1.0
    assert found.win_rate.low < 0.6


def test_a_position_bias_is_seen_and_a_fair_judge_has_none():
    draw = random.Random(5)
    biased = [each for pair in range(30) for each in judged(str(pair), A, A)]
    fair = [each for pair in range(30) for each in judged(str(pair), *draw.choice([(A, B), (B, A)]))]
    seen = behaviour(biased)
    assert seen.is_biased and (seen.num_first_twice, seen.num_second_twice) == (30, 0)
    assert tally(pairs(30), biased, 1).verdicts[PairVerdict.INCONSISTENT] == 30
    seen = behaviour(fair)
    assert not seen.is_biased
    assert seen.chose_shown_first is not None and seen.chose_shown_first.value == 0.5


# --- the journal ---


def test_a_journal_whose_last_line_is_torn_goes_on_as_if_it_had_not_been_begun(tmp_path):
    path, said = tmp_path / "new" / "j.jsonl", [*judged("ä", A, NONSENSE), *judged("b", None, TIE)]
    with JudgingJournal.open(path, FACTS) as journal:
        for each in said:
            journal.add(each)
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:-20]):
        path.write_bytes(torn)
        with JudgingJournal.open(path, FACTS) as journal:
            assert journal.judgements == said[:3]
            journal.add(said[3])
        assert path.read_bytes() == whole
    path.write_bytes(whole[:9])
    with JudgingJournal.open(path, FACTS) as journal:
        assert journal.judgements == []
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


def test_a_journal_of_another_run_a_broken_one_and_one_in_use_are_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    with JudgingJournal.open(path, FACTS) as journal:
        journal.add(judged("1", A, B)[0])
        with pytest.raises(InvalidRequest, match="no other process"), JudgingJournal.open(path, FACTS):
            pass
    with (
        pytest.raises(InvalidRequest, match=r"seed = 4 is not allowed: 3, which .* was begun with"),
        JudgingJournal.open(path, {**FACTS, "seed": 4}),
    ):
        pass
    with path.open("a") as file:
        file.write('{"ask": 3}\n')
    with pytest.raises(InvalidRequest, match="line 3 is not a judgement"), JudgingJournal.open(path, FACTS):
        pass
