"""The lab's evaluation from nothing to a report: families trained, served, asked, compared."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusionroute.cli.group import Failure

if TYPE_CHECKING:
    from rich.console import Console

    from evaluation.findings import Findings, TracedAnswer
    from evaluation.lab.asking import SeedFolder
    from evaluation.lab.plan import LabPlan
    from evaluation.lab.systems import SeedRecords
    from evaluation.questions import Question
    from fusionroute.stack_state import StackState
    from trainer.lab_family import Family

PROMOTION_SECONDS = 60.0
TIMINGS = "timings.json"
BASE = "base"


@dataclass(frozen=True, slots=True)
class SeedModels:
    """The models of one seed on disk.

    Attributes:
        routers: checkpoints by the name that systems give them, phase I first.
        models: models that are asked alone, by name.
        reward: a reward model; None where nobody is asked whom a reward guides.
    """

    seed: int
    family: Family
    routers: Mapping[str, Path]
    models: Mapping[str, Path]
    reward: Path | None = None


def run_lab(plan: LabPlan, output: Path, console: Console) -> Findings:
    """Trains what is missing, asks what is not known yet, writes the report and returns what it shows.

    Raises:
        Failure: a model cannot be trained or served, or written answers are not those that were judged.
    """
    from evaluation.lab.asking import disagreements, judge_by_model, read_seed
    from evaluation.lab.collab import read_collab
    from evaluation.lab.results import findings_of, gather
    from evaluation.report import write_report
    from evaluation.scores import Scores

    questions = plan.questions()
    clock = _Clock(output / TIMINGS)
    with clock.stage("training"):
        seeds = _train(plan)
    records: list[SeedRecords] = []
    examples: list[TracedAnswer] = []
    for models in seeds:
        place = _place(output, plan, questions, models)
        slots = list(models.family.experts)
        with (
            clock.stage(f"asking the services, seed {models.seed}"),
            _bars(console, models.seed) as on_progress,
        ):
            _ask_services(place, models, on_progress)
        with (
            clock.stage(f"asking single models, seed {models.seed}"),
            _bars(console, models.seed) as on_progress,
        ):
            for name, folder in models.models.items():
                judge_by_model(place, name, folder, on_progress)
        heard = read_seed(place, models.seed, slots, list(models.routers), list(models.models))
        records.append(replace(heard, unjudged=read_collab(place)))
        examples = place.examples() or examples
    compared, differing = 0, list[str]()
    for record in records:
        num, names = disagreements(record)
        compared, differing = compared + num, differing + names
    if differing:
        shown = ", ".join(differing[:5])
        raise Failure(f"{len(differing)} of {compared} written answers are not what was judged: {shown}")
    with clock.stage("statistics and report"):
        facts = {
            "command": _command(plan, output),
            **_facts(seeds),
            "written_answers": compared,
            "written_answers_that_differ": len(differing),
        }
        gathered = gather(questions, records)
        findings = findings_of(plan, questions, records, gathered, examples, facts)
        write_report(findings, output)
        Scores.of(questions, gathered.notes, gathered.outcomes()).write(output)
    return findings


def _train(plan: LabPlan) -> list[SeedModels]:
    from evaluation.lab.plan import CDPO, SFT
    from fusionroute.cli.lab import build_families
    from trainer.lab_family.reward import reward_of

    found = []
    for family in build_families(plan.size, plan.seeds, plan.variants):
        of_routers = {name: path for name, path in family.variants.items() if name.startswith((SFT, CDPO))}
        rest = {name: path for name, path in family.variants.items() if name not in of_routers}
        routers = {SFT: family.router_sft, CDPO: family.router, **of_routers}
        reward = reward_of(family) if plan.per_task_written else None
        found.append(SeedModels(family.facts["seed"], family, routers, rest, reward))
    return found


def _place(output: Path, plan: LabPlan, questions: Sequence[Question], models: SeedModels) -> SeedFolder:
    from evaluation.lab.asking import SeedFolder
    from evaluation.lab.collab import COLLAB

    family = models.family
    of_family = dict.fromkeys((*models.routers, *models.models), family.folder.name)
    others = dict(family.variants) | ({COLLAB: models.reward} if models.reward else {})
    origins = of_family | {name: f"{path.parent.name}/{path.name}" for name, path in others.items()}
    return SeedFolder(output / "answers" / f"seed-{models.seed}", plan, questions, origins)


def _ask_services(place: SeedFolder, models: SeedModels, on_progress: Callable[[str, int], None]) -> None:
    """Serves one router checkpoint after the other and asks it; nothing is started where all is known."""
    from evaluation.lab.collab import is_collab_known
    from evaluation.lab.plan import SFT
    from fusionroute.cli.stack import temporary_stack
    from fusionroute.local_stack import StackPlan

    missing = _missing(place, models)
    if not missing and not is_collab_known(place):
        missing = [SFT]  # its journals are full; whichever router serves, the experts are the same
    if not missing:
        return
    plan = StackPlan(
        router_checkpoint=str(models.routers[missing[0]]),
        experts={
            slot: str(path) for slot, path in (models.family.experts | {BASE: models.family.base}).items()
        },
        base_slot=BASE,
        port=0,
        http_port=0,
        threads=1,
        isolated=True,
        trainer=len(missing) > 1,
    )
    with temporary_stack(plan) as (state, folder):
        asyncio.run(_ask_all(place, models, missing, state, folder, on_progress))


async def _ask_all(
    place: SeedFolder,
    models: SeedModels,
    checkpoints: Sequence[str],
    state: StackState,
    folder: Path,
    on_progress: Callable[[str, int], None],
) -> None:
    from evaluation.lab.asking import judge_by_router, trace_examples, ways_of, write_by_router, written_ways
    from evaluation.lab.collab import is_collab_known, write_by_collab
    from evaluation.lab.plan import CDPO
    from evaluation.lab.systems import FUSIONROUTE
    from evaluation.systems.ways import SUM, rule_names
    from fusionroute.client import RouterClient

    slots = list(models.family.experts)
    for number, checkpoint in enumerate(checkpoints):
        if number > 0:
            await _promote(state, folder, checkpoint, models.routers[checkpoint])
        async with RouterClient.open(state.router_address) as router:
            ways = ways_of(checkpoint, slots, rule_names((await router.info()).available_combine))
            await judge_by_router(router, place, checkpoint, ways, on_progress)
            await write_by_router(router, place, checkpoint, written_ways(checkpoint, slots), on_progress)
            if number == 0 and models.reward is not None and not is_collab_known(place):
                await write_by_collab(router, place, slots, models.reward, on_progress)
            if checkpoint == CDPO:
                place.keep_examples(await trace_examples(router, FUSIONROUTE, SUM))


def _missing(place: SeedFolder, models: SeedModels) -> list[str]:
    """Router checkpoints of which something is not known yet, phase I first."""
    from evaluation.lab.asking import is_known

    slots = list(models.family.experts)
    return [name for name in models.routers if not is_known(place, name, slots)]


async def _promote(state: StackState, folder: Path, name: str, checkpoint: Path) -> None:
    """Publishes a checkpoint as a finished job does, and has it promoted."""
    from fusionroute.cli.checkpoints import tell_trainer, wait_for_router
    from fusionroute.local_stack import CHECKPOINTS, TRAINER

    published = folder / CHECKPOINTS / name.replace("_", "-")
    await asyncio.to_thread(shutil.copytree, checkpoint, published)
    _, revision = await tell_trainer(state.addresses[TRAINER], published.name)
    await wait_for_router(state.router_address, revision, PROMOTION_SECONDS)


def _facts(seeds: Sequence[SeedModels]) -> dict[str, Any]:
    """What decides the outcome besides the plan."""
    facts = seeds[0].family.facts
    return {
        "recipe": facts["recipe"],
        "torch": facts["torch"],
        "transformers": facts["transformers"],
        "families": [models.family.folder.name for models in seeds],
    }


def _command(plan: LabPlan, output: Path) -> str:
    """That makes the same report."""
    from evaluation.lab.plan import PLANS

    usual = PLANS[plan.name]
    seeds = "" if plan.seeds == usual.seeds else f" --seeds {','.join(map(str, plan.seeds))}"
    per_task = "" if plan.per_task == usual.per_task else f" --per-task {plan.per_task}"
    names = "" if plan.variants == usual.variants else f" --variants {','.join(plan.variants) or 'none'}"
    return f"fusionroute eval run --suite {plan.name}{seeds}{per_task}{names} --output {output.name}"


class _Clock:
    """How long each stage took, in a file beside the report: timings are no findings."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Takes the time of a block."""
        began = time.monotonic()
        yield
        self._seconds[name] = round(self._seconds.get(name, 0.0) + time.monotonic() - began, 1)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._seconds, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _bars(console: Console, seed: int) -> Iterator[Callable[[str, int], None]]:
    """A bar while questions are answered; nothing where nobody watches."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(f"   seed {seed}  {{task.description}}"),
        BarColumn(),
        TextColumn("{task.completed}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(what: str, num_done: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=None)
            bars.advance(tasks[what], num_done)

        yield advance
