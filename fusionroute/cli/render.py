"""How a stream of events looks at a terminal. Pure: from events to rich text, no printing.

Colour is never the only sign: each expert also has a mark, one letter, used in rulers, legends and traces.

    [8; febj]          the answer, each token in the colour of its expert
    fmffssssf          the ruler beneath: who wrote it
    m math  s strings  f format  + router alone
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from fusionroute.looks import ROUTER_MARK, next_mark
from fusionroute.v1.router_pb2 import (
    Candidate,
    Drafting,
    Finished,
    GenerationEvent,
    GenerationStatistics,
    Started,
    Token,
)

ROUTER_STYLE = "bold red"
DEGRADED_STYLE = "reverse"
"""Added where the expert that the router had picked was not there."""
# each with an attribute of its own, so that they differ on a terminal without colours too
STYLES = (
    "cyan",
    "bold yellow",
    "underline green",
    "italic magenta",
    "bold underline blue",
    "bold italic cyan",
    "italic underline yellow",
    "bold green",
)


@dataclass(frozen=True, slots=True)
class Look:
    """How an expert is shown."""

    style: str
    mark: str


class Palette:
    """A style and a mark for each expert slot, in the order of the checkpoint; more as they appear.

    Attributes:
        nobody: who wrote tokens in which no single expert took part.
    """

    def __init__(self, slots: Iterable[str] = ()) -> None:
        self.nobody = "router alone"
        self._looks: dict[str, Look] = {"": Look(ROUTER_STYLE, ROUTER_MARK)}
        for slot in slots:
            self.look(slot)

    @property
    def slots(self) -> list[str]:
        """The expert slots seen so far."""
        return [slot for slot in self._looks if slot]

    def look(self, slot: str) -> Look:
        """How a slot is shown; "" is the router writing alone."""
        if slot not in self._looks:
            mark = next_mark(slot, {look.mark for look in self._looks.values()})
            number = len(self._looks) - 1
            self._looks[slot] = Look(STYLES[number % len(STYLES)], mark)
        return self._looks[slot]


def token_text(token: Token, palette: Palette) -> Text:
    """What a token adds to the answer, in the style of the expert that took part."""
    return Text(visible(token.text), style=_style(token, palette))


def _style(token: Token, palette: Palette) -> str:
    """Of who took part; reversed where another one should have."""
    style = palette.look(token.expert).style
    return f"{style} {DEGRADED_STYLE}" if token.degraded else style


def event_text(event: GenerationEvent, palette: Palette) -> Text:
    """What any event adds to the answer."""
    kind = event.WhichOneof("event")
    if kind == "token":
        return token_text(event.token, palette)
    return Text(visible(event.finished.text) if kind == "finished" else "")


def answer_text(events: Iterable[GenerationEvent], palette: Palette) -> Text:
    """The whole answer of a stream."""
    return Text.assemble(*(event_text(event, palette) for event in events))


def ruler_text(events: Iterable[GenerationEvent], palette: Palette) -> Text:
    """One mark for each cell of a one-line answer, saying who wrote it."""
    ruler = Text()
    for event in events:
        if event.WhichOneof("event") == "token":
            look = palette.look(event.token.expert)
            ruler.append(look.mark * cell_len(event.token.text), style=_style(event.token, palette))
    return ruler


def legend_text(palette: Palette, *, with_router: bool = True) -> Text:
    """Which mark and style belong to which expert."""
    legend = Text()
    for slot in [*palette.slots, *([""] if with_router else [])]:
        look = palette.look(slot)
        legend.append(f"{look.mark} {slot or palette.nobody}", style=look.style)
        legend.append("   ")
    legend.rstrip()
    return legend


def trace_text(token: Token, slots: Sequence[str], palette: Palette) -> Text:
    """One line about a token: number, text, expert, logprob, routing weights, and below it the candidates."""
    look = palette.look(token.expert)
    line = Text(f"{token.index:4d}  ")
    line.append(f"{quoted(token.text):<12}", style=_style(token, palette))
    logprob = f"{token.logprob:z8.3f}" if token.HasField("logprob") else "unknown"
    line.append(f" id {token.id:<7d} {look.mark} {token.expert or palette.nobody:<14} logprob {logprob}")
    if token.degraded:
        line.append("  degraded", style="bold")
    if token.routing_weights:
        names = [*slots, "router"]
        weights = (f"{name} {weight:.2f}" for name, weight in zip(names, token.routing_weights, strict=False))
        line.append("  w: " + ", ".join(weights))
    for name in ("fused", "expert", "router"):
        candidates: Sequence[Candidate] = getattr(token.top, name)
        if candidates:
            shown = "  ".join(f"{quoted(each.text)} {each.logprob:z.2f}" for each in candidates)
            line.append(f"\n        {name:<7}{shown}", style="dim")
    return line


def summary_text(started: Started, finished: Finished) -> Text:
    """The closing line: why it ended, what it cost, and what is needed to get the same answer again."""
    reason = FINISH_WORDS.get(finished.reason, "ended")
    spent = finished.statistics
    speed = ""
    if finished.num_generated_tokens and spent.total_seconds > 0:
        milliseconds = 1000 * spent.total_seconds / finished.num_generated_tokens
        speed = f", {milliseconds:.1f} ms per token"
    calls = f", {spent.num_expert_calls} expert calls" if spent.num_expert_calls else ""
    if spent.num_degraded_tokens:
        calls += f", {spent.num_degraded_tokens} tokens degraded: their expert was not there"
    calls += drafting_text(spent)
    return Text(
        f"{finished.num_generated_tokens} tokens after {finished.num_prompt_tokens}, {reason}{speed}{calls}; "
        f"{rule_name(started.combine)}, seed {started.seed}, session {started.session_id}",
        style="dim",
    )


def drafting_text(spent: GenerationStatistics) -> str:
    """What came of proposed tokens and early asks; empty where there were none."""
    text = ""
    for each in spent.drafting:
        drafter = Drafting.Name(each.drafter).removeprefix("DRAFTING_").lower()
        text += (
            f", {each.num_accepted_tokens} of {each.num_drafted_tokens} tokens drafted by {drafter} accepted"
        )
    if spent.num_early_asks:
        text += f", {spent.num_early_hits} of {spent.num_early_asks} early asks right"
    return text


FINISH_WORDS = {
    1: "end of sequence",
    2: "stop string",
    3: "length reached",
    4: "cancelled",
    5: "context full",
}


def rule_name(rule: int) -> str:
    """A combine rule as options and manifests call it, for example "gated_sum"."""
    from fusionroute.v1.router_pb2 import CombineRule

    return CombineRule.Name(CombineRule.ValueType(rule)).removeprefix("COMBINE_RULE_").lower()


def quoted(text: str) -> str:
    """A token's text between quotes, control characters visible."""
    return f"'{visible(text, keep='')}'"


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with its control characters written out, so that no model can steer the terminal."""
    return "".join(c if c in keep or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def raw_text(event: GenerationEvent) -> str:
    """What an event adds to the answer, exactly."""
    kind = event.WhichOneof("event")
    if kind == "token":
        return event.token.text
    return event.finished.text if kind == "finished" else ""
