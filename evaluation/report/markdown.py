"""The text of a report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from evaluation.findings import SCORE, Comparison, TracedAnswer
from evaluation.report.pictures import Chapter, Picture
from evaluation.report.tables import (
    comparisons_table,
    escaped,
    is_mcnemar_another,
    is_unsure_over_seeds,
    main_table,
    null_sentence,
    parts_table,
    seeds_table,
    widest_interval,
)
from evaluation.report.view import NOT_IN_COMPETITION, View

MOST_OPEN_ROWS = 40
COMMAND = "command"
"""The fact that says how to make the report again."""


def to_markdown(view: View, pictures: Sequence[Picture]) -> str:
    """The whole of ``report.md``: what was found first, then tables and pictures, then how it was measured."""
    parts = [f"# {escaped(view.findings.name)}\n"]
    parts += _list(view.findings.summary)
    for measured in view.by_measure:
        own = [picture for picture in pictures if picture.measure == measured.look.measure]
        parts += _results(measured, own)
        parts += _differences(measured, own)
        parts += _parts(measured, own)
    parts += _routing(pictures)
    parts += _examples(view, pictures)
    if view.findings.limits:
        parts += ["## What these numbers do not show\n", *_list(view.findings.limits)]
    parts += _facts(view)
    return "\n".join(parts)


def _results(view: View, pictures: Sequence[Picture]) -> Iterator[str]:
    if not view.narrow:
        return
    yield f"## {view.look.heading}\n"
    yield _reading(view)
    for columns in view.narrow:
        if len(view.narrow) > 1:
            yield f"### By {escaped(columns.name)}\n"
        yield main_table(view, columns).to_markdown()
        yield from _shown(pictures, Chapter.RESULTS, columns.name)
        if table := seeds_table(view, columns):
            yield from _folded("Every training seed", table.to_markdown())
    notes = [f"{note.label}: {note.note}" for note in view.systems if note.note]
    yield from _list(notes)


def _reading(view: View) -> str:
    sentences = [f"{view.look.told}, with its 95 % interval."]
    if view.look.measure != SCORE:
        sentences.append(
            f"{view.look.better.capitalize()}; every token weighs the same, and intervals take whole texts for draws."
        )
    if len(view.seeds) > 1:
        sentences.append(f"All {len(view.seeds)} training seeds together; n is of each seed.")
    sentences.append(
        "Bold: ahead of the runner-up, where the two were compared and differ significantly at 5 % after Holm."
    )
    if any(note.kind == NOT_IN_COMPETITION for note in view.systems):
        sentences.append("† is given gold prefixes, and therefore not comparable with the others.")
    return " ".join(sentences) + "\n"


def _differences(view: View, pictures: Sequence[Picture]) -> Iterator[str]:
    found = view.findings.comparisons
    if not found:
        return
    near = {stratum for columns in view.narrow for stratum in columns.strata}
    main = [each for each in found if each.stratum in near]
    rest = [each for each in found if each.stratum not in near]
    yield f"## {view.look.differences}\n"
    yield _reading_differences(view)
    for columns in view.narrow:
        yield from _shown(pictures, Chapter.DIFFERENCES, columns.name)
    if main:
        table = comparisons_table(view, _ordered(view, main)).to_markdown()
        yield from (
            [table] if len(main) <= MOST_OPEN_ROWS else _folded(f"All {len(main):,} comparisons", table)
        )
    if any(is_unsure_over_seeds(each) for each in found):
        yield (
            "‡ significant on these questions with these seeds, but the interval over the seeds' differences "
            "(Student's) holds zero: other seeds may show none.\n"
        )
    if nulls := [each for each in _ordered(view, main) if not each.is_significant]:
        yield "### What is not shown\n"
        yield from _list([null_sentence(view, each) for each in nulls])
    if rest:
        table = comparisons_table(view, _ordered(view, rest)).to_markdown()
        yield from _folded(f"{len(rest):,} comparisons on single parts", table)


def _reading_differences(view: View) -> str:
    look, found = view.look, view.findings.comparisons
    sentences = [
        f"On the same {look.things}: difference with the interval of the paired, clustered bootstrap."
    ]
    if look.measure != SCORE:
        sentences.append(f"{'Below' if look.is_less_better else 'Above'} zero the first is better.")
    is_plain = look.measure == SCORE and not any(is_mcnemar_another(each) for each in found)
    sentences.append(
        "p by McNemar's exact test, after Holm over these comparisons."
        if is_plain
        else "p by the sign-flip test over clusters, after Holm over these comparisons."
    )
    if look.measure == SCORE and not is_plain:
        sentences.append("McNemar's p takes all answers for independent and is not adjusted.")
    sentences.append(
        f"Beside a null result stands the smallest true difference that these {look.things} would show with "
        "80 % power."
    )
    return " ".join(sentences) + "\n"


def _ordered(view: View, comparisons: Sequence[Comparison]) -> list[Comparison]:
    places = {
        stratum: place
        for place, stratum in enumerate(view.sorted_strata(each.stratum for each in comparisons))
    }
    return sorted(comparisons, key=lambda each: places[each.stratum])


def _parts(view: View, pictures: Sequence[Picture]) -> Iterator[str]:
    for columns in view.wide:
        table = parts_table(view, columns)
        if not table.rows:
            continue
        by = "By" if view.look.measure == SCORE else f"{view.look.parts}, by"
        yield f"## {by} {escaped(columns.name)}\n"
        yield from _shown(pictures, Chapter.PARTS, columns.name)
        names = ", ".join(
            f"{number} {escaped(note.label)}" for number, note in enumerate(view.systems, start=1)
        )
        widest = widest_interval(view, columns)
        yield f"Columns: {names}. No interval is wider than ±{widest:.3f}; each is in `report.json`.\n"
        yield from (
            _folded("The numbers", table.to_markdown()) if len(view.systems) > 8 else [table.to_markdown()]
        )


def _routing(pictures: Sequence[Picture]) -> Iterator[str]:
    if any(picture.chapter is Chapter.ROUTING for picture in pictures):
        yield "## Who wrote, and who was overruled\n"
        yield from _shown(pictures, Chapter.ROUTING)


def _examples(view: View, pictures: Sequence[Picture]) -> Iterator[str]:
    if not view.findings.examples:
        return
    yield "## Answers, token by token\n"
    for number, example in enumerate(view.findings.examples, start=1):
        yield f"### {number}. {escaped(view.label(example.system))} on {escaped(example.task)}\n"
        yield from _shown(pictures, Chapter.EXAMPLES, str(number))
        yield from _folded("As text", _as_text(example))


def _as_text(example: TracedAnswer) -> str:
    answer = "".join(token.text for token in example.tokens)
    texts = (("Asked", example.prompt), ("Gold", example.reference), ("Answered", answer))
    return "\n".join(f"{name}:\n\n{_block(text)}" for name, text in texts if text)


def _facts(view: View) -> Iterator[str]:
    facts: dict[str, Any] = dict(view.findings.facts)
    command = facts.pop(COMMAND, "")
    if facts:
        yield "## How it was measured\n"
        yield from _list(
            [f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
             for name, value in facts.items()]
        )  # fmt: skip
    if command:
        yield "## To make it again\n"
        yield _block(str(command))


def _list(sentences: Sequence[str]) -> Iterator[str]:
    if sentences:
        yield "".join(f"- {escaped(sentence)}\n" for sentence in sentences)


def _shown(pictures: Sequence[Picture], chapter: Chapter, about: str | None = None) -> Iterator[str]:
    for picture in pictures:
        if picture.chapter is chapter and about in (None, picture.about):
            told = escaped(picture.told).replace("[", "\\[").replace("]", "\\]")
            yield f"![{told}]({picture.file})\n"


def _folded(title: str, content: str) -> Iterator[str]:
    yield f"<details><summary>{title}</summary>\n\n{content}\n</details>\n"


def _block(text: str) -> str:
    """Text as it is, whatever it holds."""
    longest = max(
        (len(run) for run in "".join(each if each == "`" else " " for each in text).split()), default=0
    )
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}\n"
