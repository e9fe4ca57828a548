"""The studies: what the paper leaves open, each as levels of one knob and the panels that show them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from benchmarks.studies.experts import LIAR, NOISE, UNTRAINED
from benchmarks.studies.plan import Cdpo, Extended, Level, Panel, Router, Sft, Study
from benchmarks.studies.workshop import NEEDS_MATH
from evaluation.questions import Question
from fusionroute.sampling import Sampling
from trainer.lab_family.recipe import EXPERT_SLOTS

COVERED, GAP = "coverage=covered", "coverage=gap"
_STRING_TASK = re.compile(r"\b(rev|sort|up) ")
NO_GATES = {"gates": {"enabled": False}}


def _both(title: str, levels: tuple[str, ...], axis: str) -> tuple[Panel, ...]:
    """Covered tasks and gap tasks beside each other."""
    start = f"{title}: " if title else ""
    return (
        Panel(f"{start}covered tasks", COVERED, levels, axis),
        Panel(f"{start}gap tasks", GAP, levels, axis),
    )


def needs(question: Question) -> Mapping[str, str]:
    """Which expert's knowledge a covered question needs beside formats; "" for gap tasks, so they stay apart."""
    if question.strata["coverage"] == "gap":
        return {"needs": "nobody"}
    prompt = str(question.prompt)
    math, strings = bool(NEEDS_MATH.search(prompt)), bool(_STRING_TASK.search(prompt))
    names = {(True, False): "math", (False, True): "strings", (True, True): "both", (False, False): "format"}
    return {"needs": names[math, strings], "math": "yes" if math else "no"}


EXPERT_SETS: Mapping[str, tuple[str, ...]] = {"1": ("format",), "2": ("strings", "format"), "3": EXPERT_SLOTS}
HALVED_SETS: Mapping[str, tuple[str, ...]] = {
    "3": EXPERT_SLOTS,
    "4": ("add_sub", "mul", "strings", "format"),
    "6": ("add_sub", "mul", "rev_up", "sort", "box_ans", "two"),
}


def _with(experts: tuple[str, ...]) -> Mapping[str, Sft | Cdpo]:
    return {"sft": Sft(experts), "cdpo": Cdpo(Sft(experts))}


EXPERTS = Study(
    name="experts",
    title="From one expert to three",
    question="The same router data with 1, 2 and 3 experts: format alone, then strings beside it, then math. What they "
    "do not know becomes a gap.",
    levels=tuple(
        Level(name, name, {"sft": Sft(experts)} if name == "1" else _with(experts))
        for name, experts in EXPERT_SETS.items()
    ),
    lines=("sft/sum", "cdpo/sum", "sft/route", "sft/select", "sft/router"),
    panels=(
        Panel("tasks that strings and format cover", "math=no", tuple(EXPERT_SETS), "experts"),
        Panel("covered tasks with number facts", "math=yes", tuple(EXPERT_SETS), "experts"),
        Panel("gap tasks", GAP, tuple(EXPERT_SETS), "experts"),
    ),
    baseline="3",
    rivals=(("cdpo/sum", "sft/select"),),
    divide=needs,
)

HALVES = Study(
    name="halves",
    title="From three experts to six that know the same",
    question="The three domains split into halves: the same knowledge in 3, 4 and 6 experts.",
    levels=tuple(Level(name, name, _with(experts)) for name, experts in HALVED_SETS.items()),
    lines=("sft/sum", "cdpo/sum", "sft/route", "sft/select", "sft/router"),
    panels=_both("", tuple(HALVED_SETS), "experts"),
    baseline="3",
)

NOISES = ("0", "0.1", "0.2", "0.4", "0.8")


def _corrupted(expert: str) -> tuple[Level, ...]:
    routers: Mapping[str, Router] = {"sft": Sft(), "cdpo": Cdpo()}
    return tuple(
        Level(
            f"{expert}~{sigma}", sigma, routers, {} if sigma == "0" else {expert: f"{expert}{NOISE}{sigma}"}
        )
        for sigma in NOISES
    )


_NOISE_AXIS = "noise on the expert's weights, in their standard deviations"
CORRUPTED = Study(
    name="corrupted",
    title="Does the complement guard against a corrupted expert?",
    question="After training, one expert's matrices get normal noise; router and heads stay as they are. Number facts "
    "of the test are known to the math expert alone; string operations the router has learnt too.",
    levels=(*_corrupted("math"), *_corrupted("strings")),
    lines=("sft/sum", "cdpo/sum", "sft/route", "sft/select", "sft/mixture", "sft/router"),
    panels=(
        Panel(
            "math corrupted: tasks that need it",
            "needs=math",
            tuple(f"math~{s}" for s in NOISES),
            _NOISE_AXIS,
        ),
        Panel("math corrupted: gap tasks", GAP, tuple(f"math~{s}" for s in NOISES), _NOISE_AXIS),
        Panel(
            "strings corrupted: tasks that need it",
            "needs=strings",
            tuple(f"strings~{s}" for s in NOISES),
            _NOISE_AXIS,
        ),
        Panel("strings corrupted: gap tasks", GAP, tuple(f"strings~{s}" for s in NOISES), _NOISE_AXIS),
    ),
    baseline="",
    rivals=(("sft/sum", "sft/route"), ("sft/select", "sft/route"), ("cdpo/sum", "sft/select")),
    divide=needs,
)

_LAMBDAS = {"0": 0.0, "0.1": 0.1, "1/3": 1 / 3, "1": 1.0, "3": 3.0}
LAMBDA = Study(
    name="lambda",
    title="The weight of the routing loss, lambda",
    question="L_SFT = L_LM + lambda L_expert with lambda from 0 to 3 in phase I; the paper has 1/3.",
    levels=tuple(
        Level(
            name,
            name,
            {"sft": Sft() if name == "1/3" else Sft(switches={"sft": {"expert_weight": value}, **NO_GATES})},
        )
        for name, value in _LAMBDAS.items()
    ),
    lines=("sft/sum", "sft/route", "sft/router"),
    panels=_both("", tuple(_LAMBDAS), "lambda"),
    baseline="1/3",
)

_BETAS = ("0.03", "0.1", "0.3", "1")
BETA = Study(
    name="beta",
    title="The scale of the margin, beta",
    question="Phase II with beta from 0.03 to 1, on the same pairs from the same router of phase I; the paper has 0.1.",
    levels=tuple(
        Level(
            name,
            name,
            {"cdpo": Cdpo() if name == "0.1" else Cdpo(switches={"cdpo": {"beta": float(name)}, **NO_GATES})},
        )
        for name in _BETAS
    ),
    lines=("cdpo/sum", "cdpo/route", "cdpo/router"),
    panels=_both("", _BETAS, "beta"),
    baseline="0.1",
)

_ALL_TOKENS = Sft(switches={"sft": {"tokens": "all"}})
TOKENS = Study(
    name="tokens",
    title="Informative tokens or all of them",
    question="L_expert over the targets where the experts' first choices differ (the paper's set S), or over all.",
    levels=(
        Level("informative", "informative", {"sft": Sft(), "cdpo": Cdpo()}),
        Level("all", "all", {"sft": _ALL_TOKENS, "cdpo": Cdpo(_ALL_TOKENS)}),
    ),
    lines=("sft/sum", "cdpo/sum", "sft/route", "sft/select", "sft/router"),
    panels=_both("", ("informative", "all"), "targets of L_expert"),
    baseline="informative",
)

_TEMPERATURES, _TOP_PS = ("0", "0.3", "0.7", "1", "1.5"), ("0.5", "0.8", "0.95", "1")


def _drawn(name: str, label: str, drawing: Sampling) -> Level:
    return Level(name, label, {"sft": Sft(), "cdpo": Cdpo()}, drawing=drawing)


SAMPLING = Study(
    name="sampling",
    title="Drawing instead of the best token",
    question="The exact chance of the right answer when tokens are drawn from the fused scores, by temperature and, at "
    "temperature 1, by top-p. The paper decodes greedily.",
    levels=(
        *(_drawn(f"T{t}", t, Sampling(temperature=float(t))) for t in _TEMPERATURES),
        *(_drawn(f"p{p}", p, Sampling(temperature=1.0, top_p=float(p))) for p in _TOP_PS),
    ),
    lines=("sft/sum", "cdpo/sum", "sft/route", "sft/select", "sft/mixture", "sft/router"),
    panels=(
        *_both("temperature", tuple(f"T{t}" for t in _TEMPERATURES), "temperature (0 = the best token)"),
        *_both("top-p", tuple(f"p{p}" for p in _TOP_PS), "top-p at temperature 1"),
    ),
    baseline="",
    rivals=(("cdpo/sum", "sft/select"),),
)

_TWO = Sft(("strings", "format"))
ADDED = Study(
    name="added",
    title="An expert added later",
    question="A router trained for strings and format gets the math expert by `train extend` (one new row of the "
    "heads), from the gold answers of tasks with number facts, with and without the other gold answers beside them.",
    levels=(
        Level("two", "before", {"sft": _TWO, "cdpo": Cdpo(_TWO)}),
        Level(
            "new",
            "added, new\ntexts alone",
            {"sft": Extended(_TWO, replays=False), "cdpo": Extended(Cdpo(_TWO), replays=False)},
        ),
        Level("replayed", "added, old\ntexts too", {"sft": Extended(_TWO), "cdpo": Extended(Cdpo(_TWO))}),
        Level("anew", "trained\nwith all three", {"sft": Sft(), "cdpo": Cdpo()}),
    ),
    lines=("sft/sum", "cdpo/sum", "sft/route", "sft/select", "sft/router"),
    panels=(
        Panel(
            "covered tasks with number facts",
            "math=yes",
            ("two", "new", "replayed", "anew"),
            "the math expert",
        ),
        Panel("other covered tasks", "math=no", ("two", "new", "replayed", "anew"), "the math expert"),
        Panel("gap tasks", GAP, ("two", "new", "replayed", "anew"), "the math expert"),
    ),
    baseline="replayed",
    divide=needs,
)

BAD = Study(
    name="bad",
    title="A bad expert among good ones",
    question="A fourth expert is there from the beginning of the router's training: one that was never trained, or one "
    "that answers every domain task wrongly and surely.",
    levels=(
        Level("none", "none", {"sft": Sft()}),
        *(Level(bad, bad, {"sft": Sft((*EXPERT_SLOTS, bad))}) for bad in (UNTRAINED, LIAR)),
    ),
    lines=("sft/sum", "sft/route", "sft/select", "sft/router"),
    panels=_both("", ("none", UNTRAINED, LIAR), "the fourth expert"),
    baseline="none",
)

_SHARES = {"0": 0.0, "0.05": 0.05, "0.26": None, "0.6": 0.6}
_COUNTS = {"750": 750, "1500": 1500, "3000": None, "6000": 6000}
DATA = Study(
    name="data",
    title="What the router learns from",
    question="Phase I with another share of gap tasks among 3000 gold answers, and with another number of gold "
    "answers; the number of steps stays.",
    levels=(
        *(Level(f"share {name}", name, {"sft": Sft(gap_share=value)}) for name, value in _SHARES.items()),
        *(Level(f"count {name}", name, {"sft": Sft(num_items=value)}) for name, value in _COUNTS.items()),
    ),
    lines=("sft/sum", "sft/route", "sft/select", "sft/router"),
    panels=(
        *_both("composition", tuple(f"share {name}" for name in _SHARES), "share of gap tasks"),
        *_both("amount", tuple(f"count {name}" for name in _COUNTS), "gold answers"),
    ),
    baseline="",
)

STUDIES = {
    study.name: study
    for study in (EXPERTS, CORRUPTED, LAMBDA, BETA, TOKENS, ADDED, BAD, SAMPLING, HALVES, DATA)
}
"""By name, in the order in which `all` runs them."""
