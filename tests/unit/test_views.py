"""Tasks with two views: what each view leaves open, what joins them, and gates that have not seen a kind of gap."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fusionroute.lab.tasks import TASKS, Group, evaluation_items
from fusionroute.lab.tokenizer import encode
from fusionroute.lab.views import (
    BOARD,
    COLUMN_PERCENT,
    COLUMN_WORDS,
    NUM_COLUMNS,
    ROW_PERCENT,
    Part,
    Split,
    Task,
    ViewItem,
    row_of,
    view_items,
)
from fusionroute.router_model import Heads
from tests.loop_lessons import sft_lesson
from tests.tiny_models import save_tiny_model
from trainer.batches import BatchMaker
from trainer.config import TrainingTable
from trainer.gates_table import GatesTable
from trainer.lab_beyond.first_choices import Opinions, first_choices, is_mixture_reaching, items_right
from trainer.lab_beyond.gap_families import FAMILIES, _loss, family_of
from trainer.lab_beyond.views_family import gold_row
from trainer.lab_family.quality import fused_choices
from trainer.router_module import RouterModule
from trainer.rows import Row, RowSet

ROW_SHARES = {Task.EVEN: (0.5, 0.5), Task.SKEW: tuple(percent / 100 for percent in ROW_PERCENT)}
COLUMN_SHARES = {Task.EVEN: (0.25,) * 4, Task.SKEW: tuple(percent / 100 for percent in COLUMN_PERCENT)}


def items_of(*parts: Part) -> list[ViewItem]:
    return [item for split in Split for item in view_items(split, 600) if item.part in parts]


def views_of(items: list[ViewItem]) -> tuple[Tensor, Tensor, Tensor]:
    """What a perfect expert and a perfect router believe of each letter ``[T, 8]``, and the right letter ``[T]``."""
    expert, router = torch.full((2, len(items), len(BOARD)), 1e-6)
    for number, item in enumerate(items):
        for place in range(len(BOARD)):
            row, column = divmod(place, NUM_COLUMNS)
            if row == item.row:
                expert[number, place] = COLUMN_SHARES[item.task][column]
            if column == item.column:
                router[number, place] = ROW_SHARES[item.task][row]
    return expert, router, torch.tensor([BOARD.index(item.answer) for item in items])


def test_the_answer_is_the_letter_in_the_keys_row_and_the_words_column() -> None:
    for item in items_of(Part.EVEN, Part.SKEW_FREQUENT, Part.SKEW_RARE):
        _, key, word = item.prompt.removesuffix("=").split()
        assert item.answer == BOARD[4 * row_of(key) + COLUMN_WORDS.index(word)]
        assert (item.row, item.column) == divmod(BOARD.index(item.answer), 4)


def test_no_key_is_in_two_splits() -> None:
    router, gate, test = ({item.key for item in view_items(split, 300) if item.key} for split in Split)
    assert not router & gate and not router & test and not gate & test
    assert min(len(router), len(gate), len(test)) >= 10


def test_rows_and_columns_are_as_frequent_as_the_task_says() -> None:
    for task in (Task.EVEN, Task.SKEW):
        items = view_items(Split.TEST, 3000, tasks=[task])
        for shares, found in (
            (ROW_SHARES[task], Counter(item.row for item in items)),
            (COLUMN_SHARES[task], Counter(item.column for item in items)),
        ):
            assert [found[place] / 3000 for place in range(len(shares))] == pytest.approx(shares, abs=0.03)


def test_the_product_of_both_views_is_right_for_every_item() -> None:
    expert, router, gold = views_of(items_of(Part.EVEN, Part.SKEW_FREQUENT, Part.SKEW_RARE))
    assert torch.equal((expert.log() + router.log()).argmax(dim=1), gold)


def test_where_neither_is_frequent_no_selection_and_no_mixture_is_right() -> None:
    expert, router, gold = views_of(items_of(Part.SKEW_RARE))
    assert len(gold) > 100
    assert not (expert.argmax(dim=1) == gold).any() and not (router.argmax(dim=1) == gold).any()
    assert not is_mixture_reaching(expert, router, gold).any()


def test_equal_halves_add_up_so_that_a_mixture_is_right_too() -> None:
    expert, router, gold = views_of(items_of(Part.EVEN))
    assert torch.equal((0.7 * expert + 0.3 * router).argmax(dim=1), gold)
    assert is_mixture_reaching(expert, router, gold).all()


def test_a_mixture_reaches_what_some_share_on_a_fine_grid_reaches() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.softmax(2 * torch.randn(400, 5, generator=generator), dim=1) for _ in range(2))
    gold = torch.randint(5, (400,), generator=generator)
    grid = torch.stack(
        [((1 - w) * first + w * second).argmax(dim=1) == gold for w in np.linspace(0, 1, 1001)]
    )
    found = is_mixture_reaching(first, second, gold)
    assert (found != grid.any(dim=0)).sum() <= 2, "but for windows that are narrower than the grid"
    assert 0.2 < found.float().mean() < 0.8


def test_an_item_is_right_when_all_its_tokens_are_its_end_included() -> None:
    rows = RowSet.of(Row.of(row.ids, row.supervised) for row in map(gold_row, view_items(Split.TEST, 1)))
    assert rows.num_targets == 8
    assert items_right(torch.tensor([True] * 8), rows) == [True] * 4
    assert items_right(torch.tensor([True, False] + [True] * 5 + [False]), rows) == [False, True, True, False]


def test_prompts_tell_their_kind_of_gap() -> None:
    kinds = {task: family for family, tasks in FAMILIES.items() for task in tasks}
    assert set(kinds) == {task for task, group in TASKS.items() if group is Group.GAP}
    for item in evaluation_items(per_task=60):
        assert family_of(item.prompt) == kinds.get(item.task, "")


def test_a_row_that_is_left_out_teaches_the_router_but_not_the_gate(tmp_path: Path) -> None:
    folder, gates = save_tiny_model(tmp_path / "router"), GatesTable(reaches_router=True)
    module = RouterModule.load(str(folder), 2, TrainingTable(device="cpu"), gates=gates)
    maker, rows = BatchMaker(sft_lesson(), None, 2, all_targets=False), np.arange(4)

    def gradients(taught: list[int]) -> tuple[Tensor | None, Tensor]:
        module.zero_grad()
        chosen = np.isin(rows, taught)
        _loss(module, maker, rows[chosen], rows[~chosen]).backward()
        assert module.gate is not None
        of_lm = module.lm.model.norm.weight.grad
        assert of_lm is not None
        return module.gate.output.bias.grad, of_lm.clone()

    of_nobody, lm_alone = gradients([])
    assert of_nobody is None or not of_nobody.any()
    of_two, lm_of_two = gradients([0, 1])
    assert of_two is not None and of_two.any()
    torch.testing.assert_close(
        lm_alone, lm_of_two, msg="the gate says nothing yet, so the router learns the same"
    )


def test_prompts_and_answers_are_written_in_the_labs_characters() -> None:
    texts = [item.prompt + item.answer for item in view_items(Split.GATE, 50)]
    assert encode("?")[0] not in {token for text in texts for token in encode(text)}


def test_first_choices_are_those_that_the_labs_table_is_made_of() -> None:
    torch.manual_seed(0)
    states, router, experts = torch.randn(50, 6), torch.randn(50, 9), torch.randn(2, 50, 9)
    heads = Heads(
        torch.randn(2, 6),
        torch.randn(2),
        torch.randn(3, 6),
        torch.randn(3),
        torch.randn(1, 6),
        torch.randn(1),
    )
    rows = RowSet.of([Row.of([2] * 51, [False] + [True] * 50)])
    found = first_choices(Opinions(rows, states, router, experts, torch.zeros(50, dtype=torch.int64)), heads)
    wanted = fused_choices(states, router, experts, heads.tensors())
    assert found.keys() == wanted.keys() | {"router"}
    assert all(torch.equal(found[rule], wanted[rule]) for rule in wanted)
