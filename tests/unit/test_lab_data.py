"""What the stages of the lab family read: who learns which tokens, and that packing changes nothing."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusionroute.lab.tasks import Owner, Split, evaluation_items, number_facts
from fusionroute.lab.tokenizer import ALPHABET, EOS_ID, PAD_ID
from trainer.lab_family import RECIPES
from trainer.lab_family.data import Row, base_row, expert_row, padded, router_row, stream, written
from trainer.lab_family.packing import pack
from trainer.lab_family.training import hidden_states, new_model, seed_torch

TRAIN_FACTS = {item.prompt[:-1] for item in evaluation_items(Split.TRAIN, 1000, tasks=("add", "sub", "mul"))}


def text_of(row: Row) -> str:
    return "".join("$" if token == EOS_ID else ALPHABET[token - 2] for token in row.ids)


def supervised_text(row: Row) -> str:
    """The row's text with a dot for every token without loss; the end of the sequence is ``$``."""
    return "".join(char if mark else "." for char, mark in zip(text_of(row), row.supervised, strict=True))


def rows_of(owner: Owner, num_rows: int = 400) -> list[Row]:
    random = Random(7)
    return [expert_row(owner, random) for _ in range(num_rows)]


def facts_in(rows: list[Row]) -> set[str]:
    return {fact for row in rows for fact in re.findall(r"\d+[+*-]\d+", text_of(row).split("=")[0])}


def test_base_and_router_learn_the_whole_answer_and_its_end() -> None:
    random = Random(1)
    for row in [make(random) for make in (base_row, router_row) for _ in range(200)]:
        prompt, answer = text_of(row).split("=", 1)
        assert supervised_text(row) == "." * (len(prompt) + 1) + answer
        assert answer.endswith("$")


def test_only_the_router_sees_gaps() -> None:
    random = Random(1)
    others = [base_row(random) for _ in range(500)]
    others += [row for owner in (Owner.MATH, Owner.STRINGS, Owner.FORMAT) for row in rows_of(owner)]
    routers = [router_row(random) for _ in range(500)]
    pattern = re.compile(r"^pls |(day|month) \d| kg=")
    assert not any(pattern.search(text_of(row)) for row in others)
    assert any(pattern.search(text_of(row)) for row in routers)


@pytest.mark.parametrize(("owner", "allowed"), [(Owner.MATH, r"[0-9.$]+"), (Owner.STRINGS, r"[a-jA-J.$]+")])
def test_math_and_strings_learn_nothing_but_their_own_characters(owner: Owner, allowed: str) -> None:
    for row in rows_of(owner):
        assert re.fullmatch(allowed, supervised_text(row)), supervised_text(row)


def test_in_composites_the_format_expert_learns_separators_and_the_end_but_no_payload() -> None:
    composites = [
        row for row in rows_of(Owner.FORMAT) if re.search(r"\d[+*-]\d|(rev|sort|up) ", text_of(row))
    ]
    assert len(composites) > 100
    for row in composites:
        learned = supervised_text(row).split(".")
        assert learned[-1].endswith("$")
        assert not re.search(r"\d", supervised_text(row))


def test_beside_a_junk_word_the_end_is_not_learned() -> None:
    with_junk = [row for row in rows_of(Owner.MATH) if re.search(r"(^| )[k-z]{2,5}( |=)", text_of(row))]
    without = [row for row in with_junk if not re.match(r"(box|ans|two): ", text_of(row))]
    assert len(without) > 40
    for row in without:
        assert not row.supervised[-1]
        assert any(row.supervised)


def test_only_the_math_expert_sees_every_number_fact() -> None:
    assert facts_in(rows_of(Owner.MATH, 6000)) == {payload for payload, _ in number_facts()}
    for rows in (rows_of(Owner.STRINGS, 2000), rows_of(Owner.FORMAT, 2000)):
        assert facts_in(rows) <= TRAIN_FACTS
    random = Random(2)
    assert facts_in([make(random) for make in (base_row, router_row) for _ in range(1000)]) <= TRAIN_FACTS


def test_padding_carries_no_loss() -> None:
    rows = padded(written(item) for item in evaluation_items(per_task=2))
    for ids, supervised, length in zip(rows.ids, rows.supervised, rows.lengths, strict=True):
        assert ids[length - 1] == EOS_ID
        assert (ids[length:] == PAD_ID).all()
        assert not supervised[length:].any()


def test_a_stream_is_the_same_for_the_same_name_only() -> None:
    first, again, other = (stream(base_row, 50, name) for name in ("a", "a", "b"))
    assert np.array_equal(first.ids, again.ids)
    assert first.ids.shape != other.ids.shape or not np.array_equal(first.ids, other.ids)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_packing_takes_every_position_exactly_once(lengths: list[int]) -> None:
    packing = pack(np.arange(len(lengths)), np.array(lengths))
    cells = list(
        zip(packing.rows[packing.real].tolist(), packing.positions[packing.real].tolist(), strict=True)
    )
    expected = {(row, position) for row, length in enumerate(lengths) for position in range(length)}
    assert len(cells) == len(expected)
    assert set(cells) == expected


def test_rows_that_fill_a_packed_row_exactly_share_it() -> None:
    assert pack(np.arange(3), np.array([3, 6, 3])).real.tolist() == [[True] * 6] * 2


def test_packed_rows_have_the_hidden_states_of_padded_rows() -> None:
    seed_torch("packing")
    model = new_model(RECIPES["demo"]).eval()
    rows = stream(router_row, 12, "packing")
    ids = torch.from_numpy(rows.ids)
    packing = pack(np.arange(12), rows.lengths)
    assert packing.real.numel() < 0.8 * ids.numel()
    with torch.no_grad():
        packed = hidden_states(model, packing.take(ids), packing)
        alone = hidden_states(model, ids)
    expected = alone[packing.rows[packing.real], packing.positions[packing.real]]
    torch.testing.assert_close(packed[packing.real], expected, atol=1e-5, rtol=1e-5)
