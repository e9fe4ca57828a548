"""Findings that nobody measured, for what shows findings: one as large as the lab's, one as small as there can be."""

from __future__ import annotations

import math

import numpy as np

from evaluation.findings import (
    ALL,
    Cell,
    Comparison,
    Findings,
    Overruling,
    RoutingEntropy,
    RoutingShare,
    SystemNote,
    TracedAnswer,
    TracedToken,
)
from evaluation.statistics.intervals import Estimate, wilson_interval

SLOTS = ("math", "strings", "format")
SEEDS = (1, 2, 3)
TASKS = (
    *("add", "sub", "mul", "rev", "sort", "up", "fbox", "fans", "ftwo"),
    *("box_m", "box_s", "ans_m", "ans_s", "two_m", "two_s", "ms", "box_ms"),
    *("unit", "box_unit", "pls_m", "pls_s", "fact", "ans_fact"),
)
KINDS = ("served", "served", "expert", "selection", "model", "forced", "remote")
LABELS = (
    "FusionRoute after SFT and CDPO, sum",
    "single model fine-tuned from expert format on 7,000 gold answers of all 23 tasks",
    "expert math",
    "one expert for each answer, by the router's first choice",
    "weight average",
    "oracle top-1 on gold prefixes",
    "proxy tuning (r + e − base)",
)
DIVISIONS = {"coverage": ("covered", "gap"), "payload": ("seen", "held-out"), "task": tuple(TASKS)}


def strata_of(divisions: dict[str, tuple[str, ...]]) -> list[str]:
    return [*(f"{name}={part}" for name, parts in divisions.items() for part in parts), ALL]


def large_findings(num_systems: int = 30, tasks: int = 23) -> Findings:
    """As many systems, tasks, seeds, routings and examples as the lab has, with some differences null."""
    draw = np.random.default_rng(0)
    divisions = DIVISIONS | {"task": DIVISIONS["task"][:tasks]}
    systems = tuple(
        SystemNote(
            f"system{n}", LABELS[n % 7] + (f", variant {n}" if n >= 7 else ""), KINDS[n % 7],
            "reads gold prefixes, so it does not compete" if KINDS[n % 7] == "forced" else "",
        )
        for n in range(num_systems)
    )  # fmt: skip
    quality = [0.93 - 0.028 * n for n in range(num_systems)]
    cells, comparisons = [], []
    for stratum in strata_of(divisions):
        size = 300 if stratum.startswith("task") else 1800
        shares = [
            float(np.clip(mean - (0.3 if "gap" in stratum else 0.0) + draw.normal(0, 0.03), 0, 1))
            for mean in quality
        ]
        for note, share in zip(systems, shares, strict=True):
            cells.append(made_cell(note.name, stratum, size, share, draw))
        for note, share in zip(systems[1:], shares[1:], strict=True):
            comparisons.append(made_comparison("system0", note.name, stratum, size, shares[0] - share, draw))
        if num_systems > 2:
            comparisons.append(
                made_comparison("system1", "system2", stratum, size, shares[1] - shares[2], draw)
            )
    routed = [note.name for note in systems if note.kind == "served"]
    return Findings(
        name="lab",
        summary=(
            "FusionRoute is ahead of every expert on covered and gap tasks.",
            "On covered tasks routing only is not worse than fusion.",
        ),
        limits=("These are models of 0.3 million parameters; larger ones may differ.",),
        systems=systems,
        divisions=divisions,
        cells=tuple(cells),
        comparisons=tuple(comparisons),
        routing=tuple(made_share(name, stratum, draw) for name in routed for stratum in strata_of(divisions)),
        examples=(made_example(), long_example()),
        slots=SLOTS,
        facts={"seeds": list(SEEDS), "items_per_task": 300, "decoding": {"temperature": 0.0},
               "command": "fusionroute eval run --suite lab"},
        entropies=tuple(made_entropy(name, draw) for name in routed),
        overrulings=tuple(
            Overruling(name, stratum, 9000, int(share * 9000), int(share * 5000), int(share * 2000), int(share * 500))
            for name in routed
            for stratum in strata_of(divisions)
            for share in [float(draw.uniform(0.01, 0.2))]
        ),
    )  # fmt: skip


def made_cell(system: str, stratum: str, size: int, share: float, draw: np.random.Generator) -> Cell:
    per_seed = {seed: float(np.clip(share + draw.normal(0, 0.015), 0, 1)) for seed in SEEDS}
    mean = sum(per_seed.values()) / len(per_seed)
    return Cell(system, stratum, size, wilson_interval(round(mean * size), size), per_seed)


def made_comparison(
    first: str, second: str, stratum: str, size: int, value: float, draw: np.random.Generator
) -> Comparison:
    half = 1.5 / math.sqrt(size)
    is_null = abs(value) < half
    return Comparison(
        first, second, stratum, size, size // 3, Estimate(value, value - half, value + half),
        Estimate(value, value - 2 * half, value + 2 * half), Estimate(value, value - half, value + half),
        40, 30, 0.2 if is_null else 1e-9, 0.6 if is_null else 1e-7, 1.4 * half,
        {seed: value + float(draw.normal(0, 0.01)) for seed in SEEDS},
    )  # fmt: skip


def made_share(system: str, stratum: str, draw: np.random.Generator) -> RoutingShare:
    shares = draw.dirichlet([3.0, 2.0, 2.0, 0.4])
    return RoutingShare(system, stratum, 9000, dict(zip((*SLOTS, ""), map(float, shares), strict=True)))


def made_entropy(system: str, draw: np.random.Generator) -> RoutingEntropy:
    most = math.log(3)
    values = draw.beta(0.5, 3, 9000) * most
    counts, _ = np.histogram(values, bins=20, range=(0, most))
    return RoutingEntropy(system, ALL, most, tuple(int(each) for each in counts), float(values.mean()))


def made_example() -> TracedAnswer:
    """`box: 11-3 kg=[8 kg]`, the unit by the router against the expert that would have ended."""
    spec = (
        ("[", "format"),
        ("8", "math"),
        (" ", "math"),
        ("k", "strings"),
        ("g", "strings"),
        ("]", "format"),
    )
    tokens = [
        TracedToken(text, slot, {each: 0.94 if each == slot else 0.03 for each in SLOTS}, fused=text,
                    by_expert="]" if text == " " else text, by_router=text, logprob=-0.1)
        for text, slot in spec
    ]  # fmt: skip
    tokens.append(TracedToken("<eos>", "", dict.fromkeys(SLOTS, 1 / 3), "<eos>", "", "<eos>"))
    return TracedAnswer("system0", "box_unit", "box: 11-3 kg=", "[8 kg]", True, tuple(tokens))


def long_example() -> TracedAnswer:
    """Several lines of an answer, with tokens that are not letters."""
    draw = np.random.default_rng(3)
    words = (
        "The",
        " answer",
        " is",
        "\n",
        "\n\n",
        " 42",
        " naïve",
        "中文",
        "😀",
        "\t",
        "  ",
        "$x^2$",
        ".",
        " certainly",
    )
    tokens = []
    for n in range(70):
        text = words[n % len(words)]
        weights = draw.dirichlet([0.6, 0.6, 0.6])
        slot = SLOTS[int(weights.argmax())]
        other = words[(n + 5) % len(words)] if n % 6 == 0 else text
        tokens.append(
            TracedToken(text, slot, dict(zip(SLOTS, map(float, weights), strict=True)), text, other, text)
        )
    return TracedAnswer(
        "system7", "gsm8k", "What is 6 times 7?\nSay it in a few words.", "42", False, tuple(tokens)
    )


def tiny_findings() -> Findings:
    """One system, no divisions, no comparisons, no routing."""
    return Findings(
        name="tiny",
        summary=(),
        limits=(),
        systems=(SystemNote("only", "the only system", "remote"),),
        divisions={},
        cells=(Cell("only", ALL, 20, wilson_interval(13, 20), {0: 0.65}),),
        comparisons=(),
    )
