"""`fusionroute train template | validate | report`: before a long run, and the picture after it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusionroute.cli.group import EXIT_REFUSED, Failure
from fusionroute.cli.target import json_option
from fusionroute.cli.train_config import KINDS, guessed_kind, read_config, read_toml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config import DataTable, JobConfig
    from trainer.data import DataReport


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
def template(kind: str) -> None:
    """Print a configuration of KIND with all of its fields, their meaning and defaults.

    \b
    Example:
      fusionroute train template sft > sft.toml
    """
    from trainer.config import JobKind
    from trainer.config_template import template as of_kind

    click.echo(of_kind(JobKind(kind)), nl=False)


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--kind", type=click.Choice(KINDS), help="Of the job.  [default: as its fields say]")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="As of the commands that run it.")
@click.option(
    "--examples/--no-examples", default=True, show_default=True, help="Show rows as models read them."
)
@json_option
def validate(config: Path, kind: str | None, changes: tuple[str, ...], examples: bool, as_json: bool) -> None:
    """Check CONFIG and all of its data and models before a long run. Exit code 4 when something is wrong.

    \b
    Example:
      fusionroute train validate sft.toml
    """
    from fusionroute.cli.train_progress import shown_progress
    from trainer.run_context import RunContext

    kind = kind or guessed_kind(read_toml(config))
    job = read_config(kind, config, changes)
    tokenizer = _shared_tokenizer(kind, job)
    reports: dict[str, DataReport] = {}
    with shown_progress() as show:
        for field, table, rows in _tables(job):
            reports[field] = _checked(table, tokenizer, rows, RunContext(Path(), show))
    if as_json:
        click.echo(
            json.dumps(
                {"kind": kind, "data": {name: _facts(each) for name, each in reports.items()}}, indent=2
            )
        )
    else:
        click.echo(f"{config}: a job of kind {kind}")
        for field, report in reports.items():
            click.echo("\n".join([f"{field}:", *(f"  {line}" for line in report.lines())]))
            for example in report.examples if examples else ():
                click.echo("  | " + example.replace("\n", "\n  | "))
    bad = [field for field, report in reports.items() if not report.is_valid]
    if bad:
        raise Failure(f"{config}: {', '.join(bad)} cannot be trained on as it is", EXIT_REFUSED)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--title", default="", help="Of the page.  [default: the folder's name]")
def report(folder: Path, title: str) -> None:
    """Draw report.png of the run in FOLDER anew, from what it has written down so far.

    \b
    Example:
      fusionroute train report runs/lab-sft
    """
    from trainer.report import write_report

    click.echo(write_report(folder, title))


def _tables(job: JobConfig) -> list[tuple[str, DataTable, str]]:
    """The data tables of a job: field, table, what its rows are meant to be."""
    kinds = {"data": "prompts" if job.kind == "pairs" else "texts", "old_data": "texts", "pairs": "pairs"}
    tables = [(field, getattr(job, field, None), rows) for field, rows in kinds.items()]
    return [(field, table, rows) for field, table, rows in tables if table is not None]


def _shared_tokenizer(kind: str, job: JobConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with which the job will read its data, after all its models were seen to share it.

    Raises:
        ModelRejected: MODEL_NOT_FOUND, MODEL_BROKEN, or VOCABULARY_MISMATCH naming both.
        Failure: the job names no model.
    """
    from fusionroute.errors import ModelRejected, Reason
    from fusionroute.vocabulary import load_tokenizer, tokenizer_fingerprint

    values: Any = job
    models = {f"expert {slot!r}": source.model for slot, source in values.experts.items()}
    own = values.checkpoint if kind == "pairs" else getattr(job, "router", "")
    if own:
        models = {"the router": own, **models}
    if not models:
        raise Failure(
            "name the checkpoint that the router serves (`checkpoint`), so that prompts can be read"
        )
    tokenizers = {who: load_tokenizer(model) for who, model in models.items()}
    (first, shared), *others = tokenizers.items()
    for who, tokenizer in others:
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(shared):
            what = f"{first} ({models[first]}) and {who} ({models[who]}) do not share a vocabulary"
            raise ModelRejected(Reason.VOCABULARY_MISMATCH, what)
    return shared


def _checked(table: DataTable, tokenizer: PreTrainedTokenizerBase, rows: str, context: Any) -> DataReport:
    from trainer.data import validate as look_through

    return look_through(table, tokenizer, rows, context)


def _facts(report: DataReport) -> dict[str, Any]:
    problems = [str(problem) for problem in report.problems]
    return {**asdict(report), "problems": problems, "is_valid": report.is_valid}
