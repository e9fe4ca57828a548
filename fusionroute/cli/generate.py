"""`fusionroute generate`: one prompt through the running services, its answer streamed to the terminal."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.target import address_options, json_option, router_address

if TYPE_CHECKING:
    from rich.console import Console

    from fusionroute.cli.render import Palette
    from fusionroute.client import RouterClient
    from fusionroute.errors import FusionRouteError
    from fusionroute.v1.router_pb2 import GenerateRequest, GenerationEvent, Started

RULES = ("sum", "gated_sum", "mixture", "select", "route", "router", "ensemble", "proxy")
EXPERT_CHOICES = ("routed", "random")
POLICIES = ("wait", "next_best", "router_only", "fail")
DRAFTING = ("auto", "off", "router", "expert", "lookup")
TRACE_CANDIDATES = 3


@dataclass(frozen=True, slots=True)
class Output:
    """What to print of the events."""

    as_json: bool
    trace: bool


@click.command()
@click.argument("prompt")
@click.option("--max-tokens", type=click.IntRange(1), help="New tokens at most.  [default: 256]")
@click.option("--temperature", type=float, help="0 = greedy.  [default: 0]")
@click.option("--top-k", type=click.IntRange(0), help="Keep the k best; 0 = all.")
@click.option("--top-p", type=float, help="Keep the smallest set with this much probability.")
@click.option("--min-p", type=float, help="Keep what has this share of the best one's probability.")
@click.option("--repetition-penalty", type=float, help="Divides positive scores of tokens seen; 1 = none.")
@click.option("--presence-penalty", type=float, help="Subtracted once from tokens of this answer.")
@click.option("--frequency-penalty", type=float, help="Subtracted per occurrence in this answer.")
@click.option("--logit-bias", multiple=True, metavar="ID=VALUE", help="Added to a token's score.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text.")
@click.option(
    "--json-schema",
    metavar="JSON",
    help="Answer with JSON that this schema describes; @FILE reads it from a file, {} = any JSON.",
)
@click.option("--regex", metavar="PATTERN", help="Answer with text that this expression matches as a whole.")
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), help="Key of the noise; the same one, the same answer."
)
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-sequence token.")
@click.option(
    "--combine", type=click.Choice(RULES), help="How scores are fused; else as the checkpoint says."
)
@click.option("--expert", metavar="SLOT", help="Always use this expert instead of the routed one.")
@click.option(
    "--expert-choice",
    type=click.Choice(EXPERT_CHOICES),
    help="Who says which expert takes part; random = a draw at every token, by the seed.",
)
@click.option(
    "--on-expert-unavailable",
    "policy",
    type=click.Choice(POLICIES),
    help="What to do while an expert is not there; else as the router's settings say.",
)
@click.option("--exact", is_flag=True, help="Scores that are the same bits however they are computed; may be slower.")
@click.option(
    "--drafting",
    type=click.Choice(DRAFTING),
    help="Who proposes several tokens at a time; the text stays the same. Else as the router's settings say.",
)
@click.option("--session", metavar="ID", help="Continue a session (or begin one of this name): multi-turn.")
@click.option("--chat", is_flag=True, help="Put the prompt into the chat template, as the user's message.")
@click.option("--trace", is_flag=True, help="Per token: expert, logprob, routing weights, top candidates.")
@address_options
@json_option
def generate(prompt: str, as_json: bool, trace: bool, address: str | None, name: str, **options: Any) -> None:
    """Answer PROMPT, token by token, coloured by expert. "-" reads the prompt from standard input.

    The answer goes to standard output, legend and summary to standard error. Ctrl-C cancels the answer;
    what was written stays in the session.

    \b
    Example:
      fusionroute generate 'box: 4+4; rev jbef=' --trace
      fusionroute generate 'Tell me' --temperature 0.8 --seed 7 --json
      fusionroute generate 'A date:' --regex '[0-9]{4}-[0-9]{2}-[0-9]{2}'
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    request = build_request(text, trace=trace, **options)
    try:
        asyncio.run(_run(router_address(address, name), request, Output(as_json, trace)))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def build_request(
    prompt: str,
    *,
    trace: bool = False,
    combine: str | None = None,
    expert: str | None = None,
    expert_choice: str | None = None,
    policy: str | None = None,
    exact: bool = False,
    drafting: str | None = None,
    session: str | None = None,
    chat: bool = False,
    json_schema: str | None = None,
    regex: str | None = None,
    **sampling: Any,
) -> GenerateRequest:
    """The request that the options describe; options left out stay unset, so the router's defaults hold.

    Raises:
        click.BadParameter: a logit bias that is not ID=VALUE, a schema file that cannot be read.
        click.UsageError: a schema and an expression together.
    """
    from fusionroute.v1.router_pb2 import (
        ChatMessage,
        ChatMessages,
        CombineRule,
        Drafting,
        ExpertChoice,
        GenerateRequest,
        OnExpertUnavailable,
    )

    request = GenerateRequest(session_id=session or "", fixed_expert=expert or "", exact=exact)
    if chat:
        request.messages.CopyFrom(ChatMessages(messages=[ChatMessage(role="user", content=prompt)]))
    else:
        request.text = prompt
    if combine:
        request.combine = CombineRule.Value(f"COMBINE_RULE_{combine.upper()}")
    if expert_choice:
        request.expert_choice = ExpertChoice.Value(f"EXPERT_CHOICE_{expert_choice.upper()}")
    if policy:
        request.on_expert_unavailable = OnExpertUnavailable.Value(f"ON_EXPERT_UNAVAILABLE_{policy.upper()}")
    if drafting:
        request.drafting = Drafting.Value(f"DRAFTING_{drafting.upper()}")
    if trace:
        request.return_routing_weights = True
        request.num_top_candidates = TRACE_CANDIDATES
    _constrain(request, json_schema, regex)
    request.sampling.stop.extend(sampling.pop("stop", ()))
    for token_id, value in parse_logit_bias(sampling.pop("logit_bias", ())).items():
        request.sampling.logit_bias[token_id] = value
    for field, value in sampling.items():
        if value is not None:
            setattr(request.sampling, field, value)
    return request


def _constrain(request: GenerateRequest, json_schema: str | None, regex: str | None) -> None:
    if json_schema is not None and regex is not None:
        raise click.UsageError("--json-schema and --regex are not given together")
    if json_schema is not None:
        request.sampling.constraint.json_schema = _text_or_file(json_schema)
    if regex is not None:
        request.sampling.constraint.regex = regex


def _text_or_file(text: str) -> str:
    """A text, or after @ the file that holds it."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{text[1:]}: {error}", param_hint="--json-schema") from None


def parse_logit_bias(texts: tuple[str, ...]) -> dict[int, float]:
    """ID=VALUE texts as numbers.

    Raises:
        click.BadParameter: a text of another form.
    """
    biases: dict[int, float] = {}
    for text in texts:
        token_id, _, value = text.partition("=")
        try:
            biases[int(token_id)] = float(value)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not ID=VALUE", param_hint="--logit-bias") from None
        if not 0 <= int(token_id) < 2**32:
            raise click.BadParameter(f"{token_id} is no token id", param_hint="--logit-bias")
    return biases


async def _run(address: str, request: GenerateRequest, output: Output) -> None:
    from fusionroute.client import RouterClient
    from fusionroute.unbroken import identified

    request = identified(request)
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):  # SIGINT is asyncio's own
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with RouterClient.open(address) as router:
        printer = JsonPrinter() if output.as_json else await _terminal_printer(router, output)
        try:
            async with aclosing(router.unbroken(request, on_break=_say_break)) as events:
                async for event in events:
                    printer.show(event)
        except asyncio.CancelledError:
            with suppress(Exception):
                async with asyncio.timeout(3.0):
                    await router.cancel(request.session_id)
            raise
        finally:
            printer.close()


def _say_break(error: FusionRouteError) -> None:
    click.echo(f"reconnecting: {error.message}", err=True)


async def _terminal_printer(router: RouterClient, output: Output) -> TerminalPrinter:
    from fusionroute.cli.console import console
    from fusionroute.cli.render import Palette

    slots = [slot.slot for slot in (await router.info()).slots]
    return TerminalPrinter(console(), console(stderr=True), Palette(slots), output)


class JsonPrinter:
    """One JSON object per event and line; 64-bit integers are strings, as protobuf's JSON has them."""

    def show(self, event: GenerationEvent) -> None:
        """Prints an event."""
        from google.protobuf.json_format import MessageToDict

        fields = MessageToDict(
            event, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        click.echo(json.dumps(fields, ensure_ascii=False))

    def close(self) -> None:
        """Nothing is pending."""


class TerminalPrinter:
    """The answer as it comes, with legend before and summary behind; with trace, one line per token."""

    def __init__(self, answer: Console, remarks: Console, palette: Palette, output: Output) -> None:
        self._answer, self._remarks = answer, remarks
        self._palette, self._output = palette, output
        self._slots = palette.slots
        self._started: Started | None = None
        self._line_open = False

    def show(self, event: GenerationEvent) -> None:
        """Prints an event."""
        from fusionroute.cli.render import legend_text, summary_text, trace_text
        from fusionroute.v1.router_pb2 import COMBINE_RULE_ENSEMBLE

        kind = event.WhichOneof("event")
        if kind == "started":
            self._started = event.started
            if event.started.combine == COMBINE_RULE_ENSEMBLE:
                self._palette.nobody = "all experts"
            if self._output.trace or self._answer.is_terminal:
                self._remarks.print(legend_text(self._palette))
        elif kind == "token" and self._output.trace:
            self._answer.print(trace_text(event.token, self._slots, self._palette))
        else:
            self._write(event)
        if kind == "finished":
            self._finish_line()
            if self._started is not None and (self._output.trace or self._remarks.is_terminal):
                self._remarks.print(summary_text(self._started, event.finished))

    def close(self) -> None:
        """Ends a line that was broken off."""
        self._finish_line()

    def _write(self, event: GenerationEvent) -> None:
        """To a terminal in colour; into a pipe or file exactly as it came."""
        from fusionroute.cli.render import event_text, raw_text

        text = raw_text(event)
        if not text:
            return
        if self._answer.is_terminal:
            self._answer.print(event_text(event, self._palette), end="")
        else:
            self._answer.file.write(text)
        self._answer.file.flush()
        self._line_open = True

    def _finish_line(self) -> None:
        if self._line_open:
            self._answer.print()
            self._line_open = False
