"""What the demo shows of a running stack: answers token by token, and an expert overruled by the router."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from fusionroute.cli.render import Palette, answer_text, legend_text, quoted, rule_name, ruler_text
from fusionroute.v1.router_pb2 import (
    Candidate,
    CombineRule,
    FinishReason,
    GenerateRequest,
    GenerationEvent,
    Token,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fusionroute.client import RouterClient
    from fusionroute.lab.tasks import Item

MAX_TOKENS = 40
VETO_RULES = (
    CombineRule.COMBINE_RULE_SUM,
    CombineRule.COMBINE_RULE_GATED_SUM,
    CombineRule.COMBINE_RULE_MIXTURE,
)


@dataclass(frozen=True, slots=True)
class Shown:
    """An item with the events of its answer."""

    item: Item
    rule: CombineRule.ValueType
    events: tuple[GenerationEvent, ...]

    @property
    def answer(self) -> str:
        """The text that was written."""
        return answer_text(self.events, Palette()).plain

    @property
    def is_right(self) -> bool:
        """Exact match, the end included."""
        finished = self.events[-1].finished
        return self.answer == self.item.answer and finished.reason == FinishReason.FINISH_REASON_EOS

    @property
    def overruled(self) -> list[Token]:
        """The tokens that the expert alone would have chosen otherwise."""
        tokens = (event.token for event in self.events if event.WhichOneof("event") == "token")
        return [token for token in tokens if token.top.expert and token.top.expert[0].id != token.id]


async def show_answers(
    console: Console, router: RouterClient, covered: Sequence[Item], gaps: Iterable[Item]
) -> None:
    """Prints the answers to some covered items, and one gap item where the complement overrules the expert.

    Args:
        console: to print on.
        router: that answers.
        covered: each is shown.
        gaps: tried in turn until one shows an overruled expert and a right answer.
    """
    info = await router.info()
    palette = Palette(slot.slot for slot in info.slots)
    console.print(Text("   ").append_text(legend_text(palette)))
    for item in covered:
        print_answer(console, await ask(router, item, CombineRule.COMBINE_RULE_SUM), palette)
    rules = [rule for rule in VETO_RULES if rule in info.available_combine]
    found = await find_veto(router, list(gaps), rules)
    console.print()
    if found is None:
        console.print("   (no gap item of this draw shows an expert overruled; try another --seed)")
        return
    print_answer(console, found, palette)
    for sentence in explain(found):
        console.print(Text(f"     {sentence}"))


async def ask(router: RouterClient, item: Item, rule: CombineRule.ValueType) -> Shown:
    """The answer to an item by the services, greedy, with top candidates."""
    request = GenerateRequest(text=item.prompt, combine=rule, num_top_candidates=1)
    request.sampling.max_tokens = MAX_TOKENS
    async with aclosing(router.generate(request, 60.0)) as stream:
        return Shown(item, rule, tuple([event async for event in stream]))


async def find_veto(
    router: RouterClient, items: Sequence[Item], rules: Sequence[CombineRule.ValueType]
) -> Shown | None:
    """The first right answer in which an expert was overruled, else the first wrong one, else None."""
    second_best: Shown | None = None
    for rule in rules:
        for item in items:
            shown = await ask(router, item, rule)
            if shown.overruled and shown.is_right:
                return shown
            if shown.overruled and second_best is None:
                second_best = shown
    return second_best


def print_answer(console: Console, shown: Shown, palette: Palette) -> None:
    """Prompt and answer on one line, beneath it the mark of each token's expert."""
    verdict = "" if shown.is_right else f"   wrong: expected {shown.item.answer}"
    prompt = Text(f"   {shown.item.prompt}", style="dim")
    console.print(Text.assemble(prompt, answer_text(shown.events, palette), Text(verdict, style="red")))
    indent = Text(" " * prompt.cell_len)
    console.print(Text.assemble(indent, ruler_text(shown.events, palette)))


def explain(shown: Shown) -> list[str]:
    """In words: where the expert wanted another token, and what the router's share made of it."""
    sentences = [f"combine rule: {rule_name(shown.rule)}"]
    for token in shown.overruled[:3]:
        wanted = token.top.expert[0]
        added = token.top.router[0] if token.top.router else None
        router = f"the router alone would write {_called(added)}" if added else "the router added its logits"
        sentences.append(
            f"token {token.index + 1}: expert {token.expert} wanted {_called(wanted)}; {router}; "
            f"together they wrote {_called_id(token)}"
        )
    return sentences


def _called(candidate: Candidate) -> str:
    name = quoted(candidate.text) if candidate.text.strip("<>") not in ("", "eos") else "to end the answer"
    return f"{name} (p = {math.exp(candidate.logprob):.2f})"


def _called_id(token: Token) -> str:
    if token.top.fused and token.top.fused[0].id == token.id:
        return _called(token.top.fused[0])
    return quoted(token.text)
