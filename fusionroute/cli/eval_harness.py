"""`fusionroute eval harness`: tasks of lm-evaluation-harness over the router's OpenAI API."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.generate import RULES
from fusionroute.cli.group import EXIT_NOBODY_THERE, Failure
from fusionroute.cli.target import folder_of, json_option, name_option

if TYPE_CHECKING:
    from evaluation.findings import Findings
    from evaluation.harness.results import Collected
    from evaluation.harness.running import AskedModel, HarnessPlan, TaskSource
    from evaluation.harness.server import Server


@click.command()
@click.option(
    "--tasks", multiple=True, default=("lab_numbers", "lab_code"), show_default=True, metavar="FOLDER|NAME",
    help="A folder of task descriptions, one of our own folders (lab_numbers, lab_code, word_problems, code_output), "
    "or a task or group of the harness, whose data it fetches. May be given several times.",
)  # fmt: skip
@click.option("--url", help="Of the HTTP port, with or without /v1; else that of the local stack.")
@name_option
@click.option(
    "--model", "models", multiple=True, metavar="NAME",
    help="fusionroute, fusionroute/SLOT, fusionroute/router, or another server's; the first one is what the others "
    "are compared with. May be given several times. [default: fusionroute]",
)  # fmt: skip
@click.option(
    "--rule", "rules", type=click.Choice(RULES), multiple=True,
    help="Also ask the fused model under this combine rule.",
)  # fmt: skip
@click.option("--chat", is_flag=True, help="Ask by chat completions; only for tasks that generate text.")
@click.option(
    "--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Whose first line is the key; else $FUSIONROUTE_API_KEY_FILE or $FUSIONROUTE_API_KEY.",
)  # fmt: skip
@click.option(
    "--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="FOLDER",
    help="The checkpoint's tokenizer; else the server's own is asked over HTTP.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The first N documents of each task only.")
@click.option("--fewshot", type=click.IntRange(0), metavar="N", help="Examples before each question.")
@click.option(
    "--concurrent",
    type=click.IntRange(1, 1000),
    default=4,
    show_default=True,
    help="Requests at the same time.",
)
@click.option(
    "--python", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="Python of an environment with lm_eval[api]; else one of its own is made in the cache folder.",
)  # fmt: skip
@click.option(
    "--output", "-o", type=click.Path(file_okay=False, path_type=Path), default=Path("harness"), show_default=True,
    help="Folder for the report, and for what the harness wrote.",
)  # fmt: skip
@json_option
def harness(
    tasks: tuple[str, ...],
    url: str | None,
    name: str,
    models: tuple[str, ...],
    rules: tuple[str, ...],
    api_key_file: Path | None,
    python: Path | None,
    output: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Run tasks of lm-evaluation-harness against a router, by its OpenAI API.

    The harness runs in an environment of its own, made from PyPI on first use (about 1 GB, a few minutes). Every
    metric that is a mean over documents gets Wilson's interval; models after the first are compared with it, document
    by document. Tasks of a folder need no network.

    \b
    Example:
      fusionroute eval harness
      fusionroute eval harness --model fusionroute --model fusionroute/math --rule route -o harness
      fusionroute eval harness --tasks word_problems --tasks gsm8k --limit 100 --url http://127.0.0.1:8080
    """
    from evaluation.harness.results import findings_of
    from evaluation.harness.running import MODEL, AskedModel, HarnessPlan, sources_of
    from evaluation.harness.server import Server
    from evaluation.report import write_report

    sources = sources_of(tasks)
    asked = [AskedModel(each) for each in models or (MODEL,)] + [AskedModel(MODEL, rule) for rule in rules]
    asked = list(dict.fromkeys(asked))
    key, ca = _key(api_key_file), os.environ.get("FUSIONROUTE_TLS_CA")
    server = Server.found_at(url or _local_url(name), key, Path(ca) if ca else None)
    _check_models(asked, server)
    plan = HarnessPlan(
        server.url,
        chat=options["chat"],
        tokenizer=options["tokenizer"],
        limit=options["limit"],
        num_fewshot=options["fewshot"],
        num_concurrent=options["concurrent"],
        max_length=server.max_context_tokens,
        ca=Path(ca) if ca else None,
    )
    output.mkdir(parents=True, exist_ok=True)
    collected = _run_all(python or _own_python(), sources, asked, plan, output, key)
    findings = findings_of(collected, asked, sources, plan)
    write_report(findings, output)
    if as_json:
        click.echo((output / "report.json").read_text(encoding="utf-8"), nl=False)
    else:
        _show(findings, output)


def _local_url(name: str) -> str:
    """The HTTP port of the local stack's first router. Raises Failure."""
    from fusionroute.stack_state import StackError, load_state

    try:
        state = load_state(folder_of(name))
    except StackError as error:
        raise Failure(str(error)) from None
    urls = [] if state is None else list(state.http_urls.values())
    if not urls:
        what = f"no stack {name!r} is up" if state is None else f"the stack {name!r} has no HTTP port"
        raise Failure(f"{what}: start one with `fusionroute up`, or give --url", EXIT_NOBODY_THERE)
    return urls[0]


def _key(file: Path | None) -> str:
    """What requests show; "" = nothing. Never printed."""
    from fusionroute.access import ClientAccess

    told = {**os.environ, **({"FUSIONROUTE_API_KEY_FILE": str(file)} if file else {})}
    if file is not None:
        told.pop("FUSIONROUTE_API_KEY", None)
    return (
        dict(ClientAccess.from_environment(told).metadata()).get("authorization", "").removeprefix("Bearer ")
    )


def _check_models(asked: Sequence[AskedModel], server: Server) -> None:
    for each in asked:
        if each.model not in server.models:
            raise click.UsageError(
                f"{server.url} has no model {each.model!r}; it has {', '.join(server.models)}"
            )


def _own_python() -> Path:
    from evaluation.environments import InstallFailed, installed_python
    from evaluation.harness import environment

    folder = environment.default_folder()
    if installed_python(folder) is None:
        click.echo(f"installing {environment.PACKAGE} {environment.VERSION} into {folder}", err=True)
    try:
        return environment.install(folder)
    except InstallFailed as error:
        raise Failure(f"lm-evaluation-harness cannot be installed: {error}") from error


def _run_all(
    python: Path,
    sources: Sequence[TaskSource],
    asked: Sequence[AskedModel],
    plan: HarnessPlan,
    output: Path,
    key: str,
) -> Collected:
    """One process after the other; each says where its words are before it begins."""
    from evaluation.harness.results import Collected, collect
    from evaluation.harness.running import run

    collected, number = Collected((), ()), len(sources) * len(asked)
    for place, (source, each) in enumerate(itertools.product(sources, asked), 1):
        file = output / f"{source.label}--{each.name.replace('/', '-')}.json"
        click.echo(
            f"{place}/{number} {source.label} with {each.name}; tail -f {file.with_suffix('.log')}", err=True
        )
        begun_at = time.monotonic()
        collected += collect(run(python, source, each, plan, file, key=key), each.name)
        click.echo(f"    {time.monotonic() - begun_at:.0f} s", err=True)
    return collected


def _show(findings: Findings, output: Path) -> None:
    from evaluation.report import print_main_table
    from fusionroute.cli.console import console

    print_main_table(findings, console())
    for each in findings.facts["scores_without_interval"]:
        click.echo(f"{each['system']}  {each['score']}  {each['value']:.6g}")
    click.echo(f"report: {output / 'report.md'}", err=True)
