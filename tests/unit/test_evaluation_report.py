"""The report of an evaluation: nothing in it but the findings, and all of them; the same findings, the same bytes."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from evaluation.findings import (
    ALL,
    Cell,
    Comparison,
    Findings,
    Overruling,
    SystemNote,
    TracedAnswer,
    TracedToken,
)
from evaluation.report import print_main_table, read_findings, write_report
from evaluation.report.encoding import FORMAT, to_text
from evaluation.report.markdown import to_markdown
from evaluation.report.paper import (
    DOTS_PER_INCH,
    WIDTH_INCHES,
    drawable,
    fixed_style,
    text_inches,
    visible,
    wrapped,
)
from evaluation.report.pictures import sheets
from evaluation.report.signs import slot_signs
from evaluation.report.tables import comparisons_table, escaped, main_table, null_sentence
from evaluation.report.view import View, turned_round
from evaluation.statistics.intervals import Estimate
from fusionroute.errors import InvalidRequest
from tests.made_findings import SLOTS, large_findings, long_example, made_example, tiny_findings

LINK = re.compile(r"!\[((?:\\.|[^\]\\])*)\]\(([^)]*)\)")


def compared(*, p_adjusted: float, value: float = 0.2, over: Estimate | None = None) -> Comparison:
    return Comparison(
        first="a", second="b", stratum=ALL, num_questions=100, num_clusters=50,
        difference=Estimate(value, value - 0.1, value + 0.1), over_seeds=over, mixed=None, only_first=25,
        only_second=5, p_value=p_adjusted / 2, p_adjusted=p_adjusted, detectable=0.137, per_seed={0: value},
    )  # fmt: skip


def hand_made(*comparisons: Comparison, kind: str = "served") -> Findings:
    return Findings(
        name="by hand",
        summary=("A is ahead.",),
        limits=("Nothing is known of C.",),
        systems=(SystemNote("a", "system A", kind), SystemNote("b", "system B", "expert", "forgets")),
        divisions={},
        cells=(
            Cell("a", ALL, 100, Estimate(0.8, 0.711, 0.867), {0: 0.8}),
            Cell("b", ALL, 100, Estimate(0.6, 0.502, 0.691), {0: 0.6}),
        ),
        comparisons=comparisons,
    )


@pytest.fixture(scope="module")
def findings() -> Findings:
    made = large_findings(num_systems=3, tasks=5)
    divisions = {name: made.divisions[name] for name in ("coverage", "task")}
    return replace(made, divisions=divisions, examples=(made_example(),))


@pytest.fixture(scope="module")
def files(findings: Findings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_report(findings, tmp_path_factory.mktemp("report"))


def backwards(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    return dict(reversed(list(mapping.items())))


def texts_of(sheet: Any) -> Iterator[Text]:
    for text in sheet.figure.findobj(Text):
        if text.get_visible() and text.get_text().strip():
            yield text


# -- the same findings


@pytest.mark.parametrize(
    "made", [large_findings(4, 5), tiny_findings(), hand_made(compared(p_adjusted=0.01))]
)
def test_what_is_read_equals_what_was_written(made: Findings, tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(to_text(made), encoding="utf-8")
    assert read_findings(path) == made


def test_numbers_that_json_does_not_have_come_back(tmp_path: Path):
    made = hand_made(replace(compared(p_adjusted=1.0), detectable=math.inf))
    path = tmp_path / "report.json"
    path.write_text(to_text(made), encoding="utf-8")
    assert read_findings(path).comparisons[0].detectable == math.inf
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_report_of_what_was_read_has_the_same_bytes_whatever_other_pictures_look_like(
    findings: Findings, files: list[Path], tmp_path: Path
):
    turned = replace(
        read_findings(files[-1]),
        cells=tuple(replace(each, per_seed=backwards(each.per_seed)) for each in findings.cells),
        routing=tuple(replace(each, shares=backwards(each.shares)) for each in findings.routing),
    )
    with mpl.rc_context({"font.size": 20.0, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        again = write_report(turned, tmp_path)
    assert [path.name for path in again] == [path.name for path in files]
    assert [
        path.name for path, old in zip(again, files, strict=True) if path.read_bytes() != old.read_bytes()
    ] == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "other"}, "format = 'other'"),
        ({"systems": None}, "systems = None"),
        ({"systems": [{"name": "a", "label": 3, "kind": "served"}]}, "systems[0].label = 3"),
        ({"systems": [{"name": "a", "label": "A"}]}, "systems[0].kind = None"),
        ({"cells": [{"surplus": 1}]}, "cells[0].surplus = 1"),
        ({"divisions": {"task": "add"}}, "divisions['task'] = 'add'"),
        ({"slots": "math"}, "slots = 'math'"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_and_field(change: dict[str, Any], named: str, tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(json.loads(to_text(tiny_findings())) | change))
    with pytest.raises(InvalidRequest, match=re.escape(f"{path}: {named}")):
        read_findings(path)


def test_a_seed_that_is_no_number_and_a_file_that_is_no_json_are_refused(tmp_path: Path):
    path = tmp_path / "report.json"
    document = json.loads(to_text(tiny_findings()))
    document["cells"][0]["per_seed"] = {"first": 0.5}
    path.write_text(json.dumps(document))
    with pytest.raises(InvalidRequest, match=re.escape("cells[0].per_seed = 'first'")):
        read_findings(path)
    path.write_text("{")
    with pytest.raises(InvalidRequest, match=re.escape(str(path))):
        read_findings(path)
    with pytest.raises(InvalidRequest, match=re.escape(str(tmp_path / "none.json"))):
        read_findings(tmp_path / "none.json")


def test_a_key_that_is_left_out_has_its_default(tmp_path: Path):
    document = json.loads(to_text(tiny_findings()))
    assert document["format"] == FORMAT
    for name in ("routing", "examples", "entropies", "overrulings", "baseline", "facts"):
        del document[name]
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document))
    assert read_findings(path) == tiny_findings()


# -- the text


def test_the_main_table_says_every_mean_with_its_interval():
    view = View(hand_made())
    assert main_table(view, view.narrow[0]).to_markdown() == (
        "| system | all (n = 100) |\n"
        "|---|---:|\n"
        "| system A | 0.800 [0.711, 0.867] |\n"
        "| system B | 0.600 [0.502, 0.691] |\n"
    )


@pytest.mark.parametrize(
    ("comparisons", "kind", "is_bold"),
    [
        ([compared(p_adjusted=0.049)], "served", True),
        ([turned_round(compared(p_adjusted=0.049))], "served", True),
        ([compared(p_adjusted=0.05)], "served", False),
        ([], "served", False),
        ([compared(p_adjusted=0.049)], "forced", False),
    ],
)
def test_the_best_is_bold_only_where_its_lead_is_significant(
    comparisons: list[Comparison], kind: str, is_bold: bool
):
    view = View(hand_made(*comparisons, kind=kind))
    assert ("**0.800 [0.711, 0.867]**" in main_table(view, view.narrow[0]).to_markdown()) == is_bold


def test_beside_a_null_result_alone_stands_what_would_have_been_detected():
    null, shown = compared(p_adjusted=0.4), compared(p_adjusted=0.0001)
    rows = comparisons_table(View(hand_made()), [null, shown]).rows
    assert [row[-2:] for row in rows] == [("0.400", "±0.137"), ("< 0.001", "–")]
    assert rows[0][:3] == ("system A − system B", "all, 100", "+0.200 [+0.100, +0.300]")


def test_a_null_result_is_a_sentence_that_claims_no_more_than_it_knows():
    null = compared(p_adjusted=0.4, value=-0.01)
    sentence = null_sentence(View(hand_made()), null)
    assert sentence == (
        "system A against system B on all questions: no difference shown (−0.010 [−0.110, +0.090], p = 0.400 after "
        "Holm); these 100 questions would show one of 0.137 with 80 % power."
    )
    assert escaped(sentence) in to_markdown(View(hand_made(null)), [])
    assert "no difference shown" not in to_markdown(View(hand_made(compared(p_adjusted=0.01))), [])


def test_a_difference_that_seeds_do_not_bear_out_is_marked():
    unsure = compared(p_adjusted=0.01, over=Estimate(0.2, -0.1, 0.5))
    sure = compared(p_adjusted=0.01, over=Estimate(0.2, 0.1, 0.3))
    assert "+0.300] ‡" in to_markdown(View(hand_made(unsure)), [])
    assert "‡" not in to_markdown(View(hand_made(sure)), [])


def test_turned_round_a_comparison_is_its_negative_and_twice_itself():
    once = compared(p_adjusted=0.01, over=Estimate(0.2, 0.1, 0.3))
    turned = turned_round(once)
    assert (turned.first, turned.only_first, turned.difference) == (
        "b",
        5,
        Estimate(-0.2, -0.30000000000000004, -0.1),
    )
    assert turned_round(turned) == once
    assert View(hand_made(once)).comparison("b", "a", ALL) == turned


def test_the_summary_stands_first_and_limits_notes_facts_and_command_are_told():
    made = replace(hand_made(), facts={"seeds": [1], "command": "fusionroute eval run --suite lab"})
    text = to_markdown(View(made), [])
    assert text.startswith("# by hand\n\n- A is ahead.\n")
    assert "- Nothing is known of C.\n" in text
    assert "- system B: forgets\n" in text
    assert "- seeds: [1]\n" in text
    assert "```text\nfusionroute eval run --suite lab\n```" in text


def test_markdown_in_names_is_shown_as_it_is():
    assert escaped("a|b *c* [d](e)\n<f>") == r"a\|b \*c\* [d]\(e) \<f\>"


def test_the_terminal_shows_the_main_table_and_the_summary():
    console = Console(width=80, record=True, file=io.StringIO())
    print_main_table(hand_made(), console)
    shown = console.export_text()
    assert "system A  0.800 [0.711, 0.867]" in shown
    assert "A is ahead." in shown
    narrow = Console(width=40, record=True, file=io.StringIO())
    print_main_table(hand_made(), narrow)
    assert re.search(r"system A +0\.800\n +\[0\.711, 0\.867\]", narrow.export_text())


# -- the pictures


def test_every_picture_is_of_the_promised_width_and_not_blank(files: list[Path]):
    pictures = [path for path in files if path.suffix == ".png"]
    assert len(pictures) == 10
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.width == WIDTH_INCHES * DOTS_PER_INCH == 1800
            counts = picture.convert("L").histogram()
        assert sum(counts[:230]) > 0.005 * sum(counts), f"{path.name} is blank"


def test_every_link_has_its_picture_with_words_for_it_and_every_picture_its_link(files: list[Path]):
    links = LINK.findall(next(path for path in files if path.name == "report.md").read_text())
    assert sorted(file for _, file in links) == sorted(path.name for path in files if path.suffix == ".png")
    assert all(len(words) > 20 for words, _ in links)


def test_what_is_not_there_is_neither_drawn_nor_linked(tmp_path: Path):
    written = write_report(tiny_findings(), tmp_path)
    assert [path.name for path in written] == ["report-forest.png", "report.md", "report.json"]
    assert [file for _, file in LINK.findall(written[1].read_text())] == ["report-forest.png"]
    for heading in ("Differences", "Who wrote", "token by token", "do not show", "make it again"):
        assert heading not in written[1].read_text()


def test_a_new_report_replaces_the_old_one_and_leaves_other_files_alone(tmp_path: Path):
    (tmp_path / "journal.jsonl").write_text("mine")
    (tmp_path / "report-old.png").write_bytes(b"old")
    written = write_report(tiny_findings(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["journal.jsonl", *(path.name for path in written)]
    )
    before = {path: path.read_bytes() for path in written}
    with pytest.raises(InvalidRequest, match="facts"):
        write_report(replace(tiny_findings(), facts={"folder": tmp_path}), tmp_path)
    assert {path: path.read_bytes() for path in written} == before


def side_by_side() -> Findings:
    """As many parts as still stand side by side, with differences of few digits."""
    parts = tuple(f"part{n} of a long name" for n in range(4))
    small = replace(
        compared(p_adjusted=0.5), difference=Estimate(0.0004, -0.0001, 0.0009), per_seed={0: 0.0004}
    )
    made = hand_made(small)
    strata = [ALL, *(f"group={part}" for part in parts)]
    return replace(
        made,
        divisions={"group": parts},
        cells=tuple(replace(each, stratum=stratum) for each in made.cells for stratum in strata),
        comparisons=tuple(replace(each, stratum=stratum) for each in made.comparisons for stratum in strata),
    )


def as_in_the_lab() -> Findings:
    made = large_findings(num_systems=8, tasks=6)
    return replace(made, divisions={name: made.divisions[name] for name in ("coverage", "task")})


@pytest.mark.parametrize("made", [side_by_side(), as_in_the_lab()], ids=["side by side", "lab"])
def test_no_text_stands_on_another_or_beyond_the_edge(made: Findings):
    with fixed_style():
        for picture, sheet in sheets(View(made)):
            renderer = FigureCanvasAgg(sheet.figure).get_renderer()
            sheet.figure.draw_without_rendering()  # puts the ticks in their places
            shown = list(texts_of(sheet))
            assert len(shown) > 5
            boxes = np.array([text.get_window_extent(renderer).extents for text in shown])
            low, high = boxes[:, None, :2], boxes[:, None, 2:]
            lapping = np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1)) > 2
            pairs = np.argwhere(np.triu(lapping.all(axis=-1), k=1))
            assert [
                (shown[one].get_text(), shown[other].get_text(), picture.file) for one, other in pairs
            ] == []
            outside = (boxes[:, :2] < 0).any(axis=1) | (boxes[:, 2:] > sheet.figure.bbox.size).any(axis=1)
            assert [(shown[each].get_text(), picture.file) for each in np.flatnonzero(outside)] == []


def test_slots_of_one_colour_differ_in_hatch_and_letter():
    signs = slot_signs([f"slot{n}" for n in range(16)])
    assert len({(sign.edge, sign.hatch) for sign in signs.values()}) == 16
    assert len({sign.letter for sign in signs.values()}) > 8


def test_a_strip_shows_every_token_who_wrote_it_and_what_was_overruled():
    made = replace(tiny_findings(), slots=SLOTS, examples=(made_example(),))
    with fixed_style():
        (sheet,) = [sheet for picture, sheet in sheets(View(made)) if "example" in picture.file]
        shown = [text.get_text() for text in texts_of(sheet)]
    for token in made_example().tokens:
        assert visible(token.text) in shown
    assert shown.count("]") == 2  # written at the end, and overruled before the unit
    assert "+" in shown and "router alone" in shown


def test_tokens_of_any_kind_can_be_drawn():
    odd = tuple(
        TracedToken(text, "new") for text in ("", "\n", "\0", "中", "$", "\u202e", "x" * 3000, "\ud800")
    )
    made = replace(tiny_findings(), examples=(TracedAnswer("gone", "t", "", "", True, odd), long_example()))
    with fixed_style():
        drawn = []
        for picture, sheet in sheets(View(made)):
            sheet.figure.canvas.draw()
            drawn.append(picture.file)
    assert drawn == ["report-forest.png", "report-example-01.png", "report-example-02.png"]


def test_overruled_tokens_that_nobody_judged_are_unknown_and_only_that_is_in_the_legend():
    made = replace(tiny_findings(), overrulings=(Overruling("only", ALL, 100, 10),))
    assert made.overrulings[0].num_unknown == 10
    with fixed_style():
        (sheet,) = [sheet for picture, sheet in sheets(View(made)) if "overruled" in picture.file]
        shown = [text.get_text() for text in texts_of(sheet)]
    assert "10.0 %" in shown and "not known what was right" in shown
    assert "neither was right" not in shown


def test_long_names_keep_their_ends_within_the_width():
    names = [
        f"a single model fine-tuned from expert format on 7,000 gold answers, variant {n}" for n in range(2)
    ]
    shown = [wrapped(name, 2.0, 8.5, 2) for name in names]
    assert shown[0] != shown[1]
    assert all(text_inches(line, 8.5) <= 2.0 for lines in shown for line in lines)
    assert all(len(lines) == 2 for lines in shown)
    assert wrapped("short", 2.0, 8.5, 2) == ["short"]


def test_what_nobody_sees_is_shown():
    assert [visible(text) for text in ("", " a b ", "\n", "  ", "\t")] == ["∅", "␣a b␣", "↵", "␣␣", "→"]
    assert drawable("é中\0") == "é<4E2D><0>"
