"""`fusionroute up | down | logs`: the local stack as plain processes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fusionroute.cli.group import EXIT_NOBODY_THERE, Failure
from fusionroute.cli.target import folder_of, name_option

if TYPE_CHECKING:
    from fusionroute.local_stack import OnProgress, StackPlan
    from fusionroute.processes import ProcessRecord
    from fusionroute.stack_state import StackState

TEMPORARY_STOP_SECONDS = 10.0
WATCH_SECONDS = 0.5


@click.command()
@click.option(
    "--expert",
    "--experts",
    "experts",
    multiple=True,
    metavar="SLOT=MODEL",
    help="An expert: its slot and a folder or hub id. Give one for each slot of the router.",
)
@click.option("--router", metavar="FOLDER", help="The router checkpoint.")
@click.option(
    "--base",
    metavar="MODEL",
    help="Also serve this model, the experts' base, which --combine proxy takes away.",
)
@click.option(
    "--lab",
    is_flag=False,
    flag_value="demo",
    metavar="[SIZE]",
    help="Serve the tiny trained family of `fusionroute lab build` (demo or full), built if missing.",
)
@click.option(
    "--preset", metavar="NAME", help="Experts from presets/NAME.toml; give the router with --router."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=50050,
    show_default=True,
    help="Port of the router; 0 = any free one.",
)
@click.option(
    "--http-port",
    type=click.IntRange(0, 65535),
    help="Port for the OpenAI and TGI APIs and the playground; 0 = any free one.  [default: 8080, or any where"
    " that is taken]",
)
@click.option(
    "--routers",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Routers that share sessions: when one dies, another goes on with its answers.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("cpu",),
    show_default=True,
    help="Where the models run. Give several to share them out: the router's, then one for each expert.",
)
@click.option(
    "--dtype", default="auto", show_default=True, help="Number format: auto, float32, bfloat16, float16."
)
@click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Torch threads of each process; 0 = the cores shared out.",
)
@click.option(
    "--trainer", is_flag=True, help="Also start a trainer, whose promoted checkpoints the router takes up."
)
@click.option(
    "--watch",
    is_flag=True,
    help="Give each process a port for /readyz, /metrics and so on; `status` shows them.",
)
@click.option("--foreground", is_flag=True, help="Stay attached; Ctrl-C stops the stack.")
@name_option
def up(
    experts: tuple[str, ...],
    router: str | None,
    base: str | None,
    lab: str | None,
    preset: str | None,
    port: int,
    http_port: int | None,
    routers: int,
    devices: tuple[str, ...],
    dtype: str,
    threads: int,
    trainer: bool,
    watch: bool,
    foreground: bool,
    name: str,
) -> None:
    """Start router and experts, and wait until all of them are ready.

    A trainer's jobs, checkpoints and Redis stay in the stack's folder, for the next time.

    \b
    Example:
      fusionroute up --lab
      fusionroute up --lab --trainer
      fusionroute up --lab --routers 2
      fusionroute up --router ckpt --experts math=models/math --experts code=models/code
    """
    from fusionroute import local_stack
    from fusionroute.cli.models import BASE_SLOT, base_to_serve, models_to_serve
    from fusionroute.local_stack import StackPlan, threads_for

    folder = folder_of(name)
    checkpoint, models = models_to_serve(experts, router, lab, preset)
    if base is not None:
        models = {**models, **base_to_serve(base, models)}
    plan = StackPlan(
        router_checkpoint=checkpoint,
        experts=models,
        port=port,
        http_port=http_port if http_port is not None else local_stack.free_http_port(),
        routers=routers,
        devices=devices,
        dtype=dtype,
        threads=threads or threads_for(routers + len(models)),
        trainer=trainer,
        watch=watch,
        base_slot=BASE_SLOT if base is not None else "",
    )
    if foreground:
        _stay_attached(plan, folder)
        return
    _tell_what_is_up(plan, start_stack(plan, folder), folder)


def _tell_what_is_up(plan: StackPlan, state: StackState, folder: Path) -> None:
    from fusionroute.local_stack import TARGETS_FILE

    behind = "the router" if plan.routers == 1 else f"{plan.routers} routers"
    num_experts = len(plan.experts) - bool(plan.base_slot)
    beside = " and a base model" if plan.base_slot else ""
    click.echo(f"up: {num_experts} experts{beside} behind {behind} on {state.router_address}")
    for url in state.http_urls.values():
        click.echo(f"    {url}/ in a browser, {url}/v1 for OpenAI's clients")
    if plan.trainer:
        click.echo(f"    and a trainer on {state.addresses['trainer']}")
    if plan.watch:
        click.echo(f"    watch ports for Prometheus in {folder / TARGETS_FILE}")
    click.echo("try: fusionroute generate 'PROMPT'   stop: fusionroute down", err=True)


@click.command()
@name_option
@click.option(
    "--deadline",
    "deadline_seconds",
    type=click.FloatRange(0.1),
    default=25.0,
    show_default=True,
    help="Seconds for running answers to end before processes are killed.",
)
def down(name: str, deadline_seconds: float) -> None:
    """Stop the local stack and all of its processes.

    \b
    Example:
      fusionroute down
    """
    from fusionroute import local_stack
    from fusionroute.stack_state import NotUp, StackError

    try:
        killed = local_stack.stop(folder_of(name), deadline_seconds)
    except NotUp as error:
        raise Failure(str(error), EXIT_NOBODY_THERE) from None
    except StackError as error:
        raise Failure(str(error)) from None
    click.echo(
        f"down: {name}" + (f" (killed after {deadline_seconds:g} s: {', '.join(killed)})" if killed else "")
    )


@click.command()
@click.argument("process", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on as the logs grow, until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    "num_lines",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="Lines of each log to begin with.",
)
@name_option
def logs(process: str | None, follow: bool, num_lines: int, name: str) -> None:
    """Show what the daemons of a local stack say, those of the last start even when it is down.

    \b
    Example:
      fusionroute logs router -f
      fusionroute logs                 all of them
    """
    files = {path.stem: path for path in sorted((folder_of(name) / "logs").glob("*.log"))}
    if process is not None and process not in files:
        known = ", ".join(files) or "none"
        raise Failure(f"stack {name!r} has no log of {process!r}; it has: {known}", EXIT_NOBODY_THERE)
    if not files:
        raise Failure(f"stack {name!r} has no logs", EXIT_NOBODY_THERE)
    chosen = files if process is None else {process: files[process]}
    prefix = {each: f"{each}: " if len(chosen) > 1 else "" for each in chosen}
    offsets = {}
    for each, path in chosen.items():
        text, offsets[each] = read_on(path, 0)
        for line in text.splitlines()[-num_lines:] if num_lines else ():
            click.echo(prefix[each] + line)
    while follow:
        time.sleep(0.25)
        for each, path in chosen.items():
            text, offsets[each] = read_on(path, offsets[each])
            for line in text.splitlines():
                click.echo(prefix[each] + line)


def read_on(path: Path, offset: int) -> tuple[str, int]:
    """The whole lines that a log has gained since `offset`, and where to go on; from 0 after a new start."""
    try:
        size = path.stat().st_size
        with path.open("rb") as log:
            log.seek(offset if size >= offset else 0)
            data = log.read()
            end = log.tell()
    except FileNotFoundError:
        return "", 0
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode(errors="replace"), end - (len(data) - len(whole))


def start_stack(plan: StackPlan, folder: Path, *, die_with_parent: bool = False) -> StackState:
    """Starts a stack while showing how far it is.

    Raises:
        Failure: with the last words of the process that died, if one did.
    """
    from fusionroute import local_stack
    from fusionroute.client import ask_registry
    from fusionroute.stack_state import ProcessDied, StackError

    with _progress_display() as on_progress:
        try:
            return local_stack.start(
                plan,
                folder,
                ask_registry=ask_registry,
                die_with_parent=die_with_parent,
                on_progress=on_progress,
            )
        except ProcessDied as error:
            raise Failure(str(error), details=_quoted(error.log_tail)) from None
        except (StackError, OSError) as error:
            raise Failure(str(error)) from None


@contextmanager
def temporary_stack(plan: StackPlan) -> Iterator[tuple[StackState, Path]]:
    """A stack and its folder for as long as the block lasts; nothing of it survives, whatever happens.

    Raises:
        Failure: it does not start, or the block fails after one of its processes has ended.
    """
    from fusionroute import local_stack
    from fusionroute.stack_state import NotUp

    with tempfile.TemporaryDirectory(prefix="fusionroute-stack-") as name:
        folder = Path(name) / "stack"
        state = start_stack(plan, folder, die_with_parent=True)
        try:
            yield state, folder
        except Exception as error:
            gone = [record for record in state.processes if record not in state.alive]
            if not gone:
                raise
            raise Failure(f"{gone[0].name} ended: {error}", details=_last_words(gone[0].log)) from error
        finally:
            with suppress(NotUp):
                local_stack.stop(folder, TEMPORARY_STOP_SECONDS)


@contextmanager
def _progress_display() -> Iterator[OnProgress]:
    from fusionroute.cli.console import console

    screen = console(stderr=True)
    started_at = time.monotonic()
    with screen.status("starting") as spinner:

        def show(name: str, phase: str) -> None:
            spinner.update(f"{name}: {phase}")
            screen.print(f"{time.monotonic() - started_at:6.1f} s  {name:<16} {phase}", markup=False)

        yield show


def _wait_for_end(state: StackState, folder: Path) -> ProcessRecord:
    """Blocks until a process has ended that nobody took out of the stack, and says which."""
    from fusionroute.stack_state import load_state

    while True:
        state = load_state(folder) or state
        ended = [record for record in state.processes if record not in state.alive]
        state = load_state(folder) or state  # it may have been taken out while we looked
        for record in ended:
            if record in state.processes and record.name not in state.leaving:
                return record
        time.sleep(WATCH_SECONDS)


def _stay_attached(plan: StackPlan, folder: Path) -> None:
    from fusionroute import local_stack
    from fusionroute.stack_state import StackError

    state = start_stack(plan, folder, die_with_parent=True)
    click.echo(f"up: router on {state.router_address}; Ctrl-C stops it")
    try:
        ended = _wait_for_end(state, folder)
    except KeyboardInterrupt:
        local_stack.stop(folder)
        raise
    try:
        local_stack.stop(folder)
    except StackError:
        click.echo("stopped by someone else")
        return
    what = f"{ended.name} ended, so the stack was stopped; its log is {ended.log}"
    raise Failure(what, details=_last_words(ended.log))


def _last_words(log: Path) -> str:
    from fusionroute.stack_state import tail

    return _quoted(tail(log, 25))


def _quoted(lines: list[str]) -> str:
    return "\n".join(f"  | {line}" for line in lines)
