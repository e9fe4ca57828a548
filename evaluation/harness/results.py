"""What lm-evaluation-harness found, as outcomes of questions, and from these our own cells and comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.findings import Findings, SystemNote
from evaluation.harness.running import AskedModel, HarnessPlan, TaskSource
from evaluation.questions import RIGHT, Answer, Outcome, Question, Verdict
from evaluation.statistics.cells import cells
from evaluation.statistics.comparing import compare

UNFILTERED = "none"
MAX_PROMPT_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class OtherScore:
    """A score that is no mean over documents of numbers from 0 to 1, such as a perplexity: it has no interval here.

    Attributes:
        name: TASK/METRIC or TASK/METRIC/FILTER.
    """

    system: str
    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Collected:
    """What one run, or several together, found.

    Attributes:
        versions: of the harness and of each task.
        num_documents: asked, by task.
    """

    outcomes: tuple[Outcome, ...]
    others: tuple[OtherScore, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    num_documents: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Collected) -> Collected:
        """Both."""
        return Collected(
            self.outcomes + other.outcomes,
            self.others + other.others,
            {**self.versions, **other.versions},
            {**self.num_documents, **other.num_documents},
        )


def collect(told: Mapping[str, Any], system: str) -> Collected:
    """Reads what the worker wrote.

    Each document makes a question for every metric and filter of its task, under the task TASK/METRIC, or
    TASK/METRIC/FILTER where answers were filtered. Documents with the same `cluster` are resampled as one. Metrics
    whose score is not the mean of the documents' are kept as they are.

    Raises:
        ValueError: it is not of the form that the harness writes.
    """
    outcomes, others = list[Outcome](), list[OtherScore]()
    try:
        for task, scores in told["results"].items():
            samples = told["samples"].get(task, ())
            for key, value in scores.items():
                metric, comma, name = key.partition(",")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                label = "/".join((task, metric) if name == UNFILTERED else (task, metric, name))
                mine = [each for each in samples if each["filter"] == name and metric in each["metrics"]]
                if _is_mean(value, [each[metric] for each in mine]):
                    outcomes += _outcomes(label, metric, mine, system)
                else:
                    others.append(OtherScore(system, label, float(value)))
        versions = {task: str(version) for task, version in told["versions"].items()}
        numbers = {task: int(each["effective"]) for task, each in told["n-samples"].items()}
        return Collected(tuple(outcomes), tuple(others), {"lm_eval": told["lm_eval"], **versions}, numbers)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not what lm-evaluation-harness writes: {type(error).__name__}: {error}") from error


def _is_mean(value: float, scores: Sequence[Any]) -> bool:
    """Whether a score is the mean of numbers from 0 to 1."""
    if not scores or not all(isinstance(each, int | float) and 0.0 <= each <= 1.0 for each in scores):
        return False
    return math.isclose(value, math.fsum(scores) / len(scores), rel_tol=1e-9, abs_tol=1e-12)


def _outcomes(
    label: str, metric: str, samples: Iterable[Mapping[str, Any]], system: str
) -> Iterator[Outcome]:
    for sample in samples:
        score = float(sample[metric])
        question = Question(
            f"{label}/{sample['doc_id']}",
            label,
            str(sample["arguments"][0][0])[:MAX_PROMPT_CHARACTERS],
            str(sample["target"]),
            cluster=str(sample["doc"].get("cluster", "")),
        )
        text = _text(sample["filtered_resps"])
        verdict = RIGHT if score >= 1.0 else Verdict(score, f"{text[:60]!r}, not {question.reference[:60]!r}")
        yield Outcome(question, system, 0, Answer(text, is_complete=True), verdict)


def _text(replies: Any) -> str:
    """An answer; of choices by log-likelihood their log-probabilities."""
    if isinstance(replies, list) and len(replies) == 1 and isinstance(replies[0], str):
        return replies[0]
    return json.dumps(replies)


def findings_of(
    collected: Collected, asked: Sequence[AskedModel], sources: Sequence[TaskSource], plan: HarnessPlan
) -> Findings:
    """Cells with Wilson's intervals, and every other model compared with the first one.

    Raises:
        ValueError: no metric is a mean over documents.
    """
    if not collected.outcomes:
        raise ValueError("no metric of these tasks is a mean over documents of numbers from 0 to 1")
    parts = tuple(dict.fromkeys(outcome.question.task for outcome in collected.outcomes))
    strata = [f"task={part}" for part in parts]
    names = [each.name for each in asked]
    comparisons = (
        compare(collected.outcomes, [(names[0], name) for name in names[1:]], strata) if names[1:] else []
    )
    scores = [{"system": each.system, "score": each.name, "value": each.value} for each in collected.others]
    return Findings(
        name="lm-evaluation-harness",
        summary=_summary(collected),
        limits=(
            "Scores and filters are the harness's own; each has a row of its own, which asks the same documents.",
            "An interval is about further documents of the same kind, not about other prompts or few-shot examples.",
        ),
        systems=tuple(_note(each) for each in asked),
        divisions={"task": parts},
        cells=tuple(cells(collected.outcomes, names, strata)),
        comparisons=tuple(comparisons),
        facts={
            "versions": dict(collected.versions),
            "documents": dict(collected.num_documents),
            "sources": [source.label for source in sources],
            "api": "chat completions" if plan.chat else "completions",
            "limit": plan.limit,
            "num_fewshot": plan.num_fewshot,
            "scores_without_interval": scores,
        },
        baseline=names[0],
    )


def _summary(collected: Collected) -> tuple[str, ...]:
    tasks = ", ".join(f"{task} ({number} documents)" for task, number in collected.num_documents.items())
    version = collected.versions["lm_eval"]
    return (f"lm-evaluation-harness {version} over the OpenAI API: {tasks}.",)


def _note(asked: AskedModel) -> SystemNote:
    rule = f"rule {asked.rule}" if asked.rule else ""
    kind = (
        "expert"
        if asked.model.startswith("fusionroute/") and not asked.model.endswith("/router")
        else "served"
    )
    return SystemNote(asked.name, f"{asked.model}{f' ({rule})' if rule else ''}", kind)
