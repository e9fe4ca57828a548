"""When an answer counts as right."""

from __future__ import annotations

from fractions import Fraction
from typing import get_args

import pytest

from fusionroute.answer_forms import first_number, last_choice, last_number
from trainer.config import PairsJob
from trainer.verifiers import VERIFIERS, same_choice, same_number, same_text


def test_every_verifier_that_can_be_configured_exists():
    names = get_args(PairsJob.model_fields["verifier"].annotation)
    assert set(names) == set(VERIFIERS)


def test_exact_forgives_white_space_around_and_nothing_else():
    assert same_text(" 8; febj\n", "8; febj")
    assert not same_text("8;febj", "8; febj")
    assert not same_text("EHAJ", "ehaj")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so she has 1,250.00 dollars.", Fraction(1250)),
        ("#### 1250", Fraction(1250)),
        ("7-3=4", Fraction(4)),
        ("it is 10-4", Fraction(4)),
        ("x = -12", Fraction(-12)),
        ("minus one: - 1", Fraction(-1)),
        ("costs -$5", Fraction(-5)),
        ("we pick 1,2", Fraction(2)),
        ("half is 1/2", Fraction(1, 2)),
        (r"$\frac{1}{2}$", Fraction(1, 2)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (".5 of it", Fraction(1, 2)),
        ("12.", Fraction(12)),
        ("9 and 1/0", Fraction(9)),
        ("12345,678", Fraction(678)),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text: str, number: Fraction):
    assert last_number(text) == number


def test_the_first_number_is_read_like_the_last():
    assert first_number("-1,250.5 of 7") == Fraction(-2501, 2)
    assert first_number("none") is None


def test_digits_without_end_are_no_number():
    assert last_number("it is " + "7" * 5000) is None


def test_a_fraction_is_not_its_denominator():
    assert not same_number("3/2", "1/2")
    assert same_number("2/4", "0.5")


def test_without_a_number_no_answer_is_right():
    assert last_number("none at all") is None
    assert not same_number("none", "none")
    assert not same_number("4", "four")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("**Answer:** **D**", "D"),
        ("C", "C"),
        ("C. A dog", "C"),
        ("I think it is B", "B"),
        ("B, I think", "B"),
        (r"First (A), then \boxed{D}", "D"),
        (r"\boxed{\text{B}}", "B"),
        ("(A) is wrong, so (B)", "B"),
        ("The answer is a dog", None),
        ("no letter", None),
    ],
)
def test_the_letter_chosen_is_found(text: str, letter: str | None):
    assert last_choice(text) == letter


def test_choices_are_compared_by_letter():
    assert same_choice("I would say (B)", "B")
    assert not same_choice("I would say (B)", "C")
    assert not same_choice("no idea", "no idea")
