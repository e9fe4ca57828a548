"""`fusionroute experts add | swap`: another model for a slot, or one more expert, while answers are being written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.expert_parts import (
    device_option,
    drain_seconds_option,
    launcher_options,
    policy_of,
    policy_option,
    run_with_parts,
    start_seconds_option,
)
from fusionroute.cli.target import address_options, json_option, router_address

if TYPE_CHECKING:
    from fusionroute.swapping.canary import Canary
    from fusionroute.swapping.swap import SwapReport

DEFAULT_MARGIN_NATS = 0.5
"""As `fusionroute.swapping.canary`, which takes too long to import for `--help`."""


@click.command()
@click.argument("slot")
@click.option(
    "--model", required=True, metavar="FOLDER", help="The new expert's model, as the started expert sees it."
)
@device_option
@click.option(
    "--canary",
    "samples",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help='Lines {"prompt": ..., "answer": ...} that both experts score; else what the old one writes.',
)
@click.option(
    "--canary-margin",
    "margin_nats",
    type=click.FloatRange(0),
    default=DEFAULT_MARGIN_NATS,
    show_default=True,
    help="How much less likely, in nats per token, the new expert may find the answers.",
)
@click.option("--no-canary", is_flag=True, help="Do not compare what the experts write.")
@click.option(
    "--tokenizer",
    metavar="FOLDER",
    help="Tokenizer for the canary's file; else that of --model, on this machine.",
)
@start_seconds_option
@drain_seconds_option
@policy_option
@launcher_options
@address_options
@json_option
def swap(
    slot: str,
    model: str,
    device: str,
    samples: Path | None,
    margin_nats: float,
    no_canary: bool,
    tokenizer: str | None,
    start_seconds: float,
    drain_seconds: float,
    policy: str,
    launcher: str,
    project: str,
    address: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Let another model serve a slot; running answers go on without a gap.

    The new expert is started beside the old one, compared with it, warmed up and scored, and only then takes
    over, in one step. Whatever fails before that stops the new one and leaves the old one as it was.

    \b
    Example:
      fusionroute experts swap math --model models/math-v2
      fusionroute experts swap math --model /models/math-v2 --launcher docker
    """
    canary = None if no_canary else _canary(samples, margin_nats, tokenizer or model)
    report = _change(
        slot, model, device, canary, policy=policy, start_seconds=start_seconds, drain_seconds=drain_seconds,
        keep=False, launcher=launcher, project=project, address=address, name=name,
    )  # fmt: skip
    _show(report, as_json)


@click.command()
@click.argument("slot")
@click.option("--model", required=True, metavar="FOLDER", help="The model that serves the slot already.")
@device_option
@start_seconds_option
@launcher_options
@address_options
@json_option
def add(
    slot: str,
    model: str,
    device: str,
    start_seconds: float,
    launcher: str,
    project: str,
    address: str | None,
    name: str,
    as_json: bool,
) -> None:
    """Start one more expert for a slot, with the weights that serve it, or the first one.

    \b
    Example:
      fusionroute experts add math --model models/math
    """
    report = _change(
        slot, model, device, None, policy="migrate", start_seconds=start_seconds, drain_seconds=0.0,
        keep=True, launcher=launcher, project=project, address=address, name=name,
    )  # fmt: skip
    _show(report, as_json)


def _change(
    slot: str,
    model: str,
    device: str,
    canary: Canary | None,
    *,
    policy: str,
    start_seconds: float,
    drain_seconds: float,
    keep: bool,
    launcher: str,
    project: str,
    address: str | None,
    name: str,
) -> SwapReport:
    from fusionroute.launching import Launch
    from fusionroute.swapping.parts import Timing
    from fusionroute.swapping.swap import Swap

    model = str(Path(model).resolve()) if launcher == "process" and Path(model).is_dir() else model
    launch = Launch(slot, model, router_address(address, name), device)
    timing = Timing(start_seconds=start_seconds, drain_seconds=drain_seconds)
    return run_with_parts(
        lambda parts: Swap(parts, launch, policy_of(policy), canary, keep=keep).run(),
        address=address, name=name, launcher=launcher, project=project, timing=timing,
    )  # fmt: skip


def _canary(samples: Path | None, margin_nats: float, tokenizer: str) -> Canary:
    from fusionroute.swapping.canary import Canary, read_samples

    if samples is None:
        return Canary(margin_nats=margin_nats)
    from fusionroute.vocabulary import load_tokenizer

    encode = load_tokenizer(tokenizer)
    return Canary(
        read_samples(samples, lambda text: encode(text, add_special_tokens=False)["input_ids"]), margin_nats
    )


def _show(report: SwapReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({**asdict(report), "outcome": report.outcome.value}, indent=2))
        return
    left = [each for each in report.retired if each not in report.stopped]
    rest = f"; still draining: {', '.join(left)}" if left else ""
    if report.outcome.value == "rolled back":
        click.echo(f"rolled back meanwhile: {', '.join(report.retired)} serves slot {report.slot} again")
        return
    click.echo(
        f"{report.outcome.value}: {report.instance_id} serves slot {report.slot}, epoch {report.epoch}{rest}"
    )
