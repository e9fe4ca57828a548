"""Answers in LaTeX are compared as values."""

from __future__ import annotations

from fractions import Fraction

import pytest

from evaluation.questions import Answer, Question
from evaluation.verifiers.numbers import (
    GoldKind,
    final_formula,
    final_number,
    kind_of,
    same_formula,
    verify_math,
    verify_number,
)

SAME = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac 59", r"\frac{5}{9}"),
    (r"\frac9{19}", "9/19"),
    (r"1\frac{4}{5}", "1.8"),
    (r"137 \frac{1}{2}", "275/2"),
    (r"-\frac{35}{9}", r"\frac{-35}{9}"),
    (".35625", r"\frac{57}{160}"),
    (r"10,\!080", "10080"),
    (r"11,\! 111,\! 100", "11,111,100"),
    ("10{,}080", "10080"),
    ("58,500", r"\$58500"),
    (r"\$18.90", "18.9"),
    (r"50\%", "50"),
    (r"90^\circ", "90"),
    (r"15\mbox{ cm}^2", "15"),
    ("5.4 cents", r"5.4 \text{ cents}"),
    (r"\frac{270}7\text{ degrees}", "270/7"),
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\frac{1}{1+\sqrt2}", r"\sqrt{2} - 1"),
    (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"),
    (r"\sqrt{\frac{3}{4}}", r"\frac{\sqrt3}{2}"),
    (r"\frac{\pi}{6}", r"\pi/6"),
    (r"8 \pi", r"8\cdot\pi"),
    (r"\frac{20000}{\pi}", r"20000\pi^{-1}"),
    (r"\sqrt{-4}", "2i"),
    ("6 - 5i", "-5i+6"),
    ("(1+2i)(3-i)", "5+5i"),
    (r"\frac{1}{1+i}", r"\frac{1-i}{2}"),
    ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
    (r"\frac{11+9a}{20}", r"\frac{9}{20}a + 0.55"),
    (r"\frac{1}{x-1}", r"\frac{-2}{2-2x}"),
    ("x=5", "5"),
    ("y = 2x + 3", "3+2x"),
    ("5x - 7y + 11z + 4 = 0", "-4 = 5x+11z-7y"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", r"\{7,5,3\}"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"x \in [-2,7]", r"\left[-2, 7\right]"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix}-\frac13\\ \frac23\end{pmatrix}"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    ("52_8", "52_{8}"),
    (r"\cot x", r"\cot(x)"),
    ("2^{10}", "1024"),
    (r"2 \text{ and } 3", "2,3"),
]
DIFFERENT = [
    ("1/2", "1/3"),
    ("0.33", r"\frac13"),
    (r"\sqrt2", "1.414"),
    ("(1,2)", "(2,1)"),
    ("(3,4]", "(3,4)"),
    ("(3,4]", "[3,4]"),
    ("1,2", "1,2,3"),
    ("52_8", "52"),
    ("52_8", "52_9"),
    (r"\text{even}", r"\text{odd}"),
    (r"\text{(B)}", r"\text{(C)}"),
    ("x^2", "x^3"),
    (r"\pi", "3.14"),
    ("5x+1=0", "5x-1=0"),
    (r"\cot x", r"\tan x"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    ("2i", "2"),
    ("", "0"),
    ("1/0", "2/0"),
]


@pytest.mark.parametrize(("left", "right"), SAME)
def test_the_same_value_in_other_words_is_the_same(left: str, right: str):
    assert same_formula(left, right)
    assert same_formula(right, left)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
def test_another_value_is_another(left: str, right: str):
    assert not same_formula(left, right)


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        (r"so \boxed{4}, no: \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        ("Final Answer: The final answer is $12\\pi$. I hope it is correct.", r"12\pi"),
        ("The answer is **3.5**.\nBye.", "3.5"),
        ("First $a=1$, then $b = 7$.", "b = 7"),
        ("we get\n\n42\n", "42"),
        (r"\boxed{unclosed", r"\boxed{unclosed"),
        ("", ""),
    ],
)
def test_the_formula_that_a_text_ends_in(text: str, formula: str):
    assert final_formula(text) == formula


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = 18 a day.\n#### 18", 18),
        ("#### 18 eggs for 3 days", 18),
        ("#### $1,250.50", Fraction(2501, 2)),
        ("#### 3+4 = 7", 7),
        (r"so \boxed{18} of 20", 18),
        ("The answer is 18 because 3 of 21 are gone.", 18),
        ("The answer is 4. No, the answer is: 5", 5),
        ("she has 3, then 7", 7),
        ("none", None),
        ("####", None),
        ("7" * 5000, None),
    ],
)
def test_the_number_that_a_text_ends_in(text: str, number: Fraction | None):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("12", GoldKind.NUMBER),
        (r"\frac{17}{50}", GoldKind.NUMBER),
        (r"\$32,\!348", GoldKind.NUMBER),
        (r"36^\circ", GoldKind.NUMBER),
        (r"2\sqrt{5}", GoldKind.CONSTANT),
        (r"18+2\pi", GoldKind.CONSTANT),
        ("6 - 5i", GoldKind.OTHER),
        ("(3,4]", GoldKind.OTHER),
        ("2k+2", GoldKind.OTHER),
        (r"\text{east}", GoldKind.OTHER),
        ("204_5", GoldKind.OTHER),
    ],
)
def test_the_gold_answer_alone_decides_what_is_numeric(gold: str, kind: GoldKind):
    assert kind_of(gold) is kind


def test_verdicts_say_what_was_found():
    question = Question(id="t/1", task="t", prompt="p", reference="#### 18")
    assert verify_number(question, Answer("it is 18", True)).is_right
    assert verify_number(question, Answer("it is 19", True)).note == "19 instead of 18"
    assert verify_number(question, Answer("", True)).note == "no number"
    half = Question(id="t/1", task="t", prompt="p", reference=r"\frac12")
    assert verify_math(half, Answer(r"\boxed{0.5}", True)).is_right
    assert verify_math(half, Answer(r"\boxed{2}", True)).note == r"2 instead of \frac12"
    assert verify_math(half, Answer("", True)).note == "no answer"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 2000,
        "9^{9^{9^{9}}}",
        "(a+b+c+d+e+f+g)^{64}" * 3,
        r"\sqrt{99999999999999999999999999999999977}",
        r"\sqrt{99999989}" * 120,
        "x" * 100_000,
        "1," * 900,
        r"\frac" * 300,
        r"\boxed{" * 300,
        "$" * 1999,
        "a " * 5000 + "!",
        "2^{64}^{64}^{64}",
    ],
)
@pytest.mark.timeout(30)
def test_no_answer_hangs(text: str):
    assert not same_formula(final_formula(text), "77/3")
    final_number(text)
