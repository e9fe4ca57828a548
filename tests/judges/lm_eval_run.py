"""lm-evaluation-harness: the same tasks with `local-completions` over HTTP and with its own `hf` on the same weights.

$JUDGED_WEIGHTS is the folder of the model that is served as $JUDGED_MODEL.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from tests.judges.scoring import Score

NUM_DOCS = 24
TOLERANCE = 1e-4
"""Of log-probabilities: kernels of their own add in another order."""
LETTERS = "abcdefghijklmnopqrstuvwxyz "
TASKS: dict[str, dict[str, Any]] = {
    "judged_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    },
    "judged_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {
            "until": ["a", '"'],
            "max_gen_toks": 16,
            "do_sample": False,
            "temperature": 0.0,
        },
        "metric_list": [{"metric": "chrf", "aggregation": "chrf"}],
    },
    "judged_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("byte_perplexity", "bits_per_byte")],
    },
}


def main() -> None:
    """Judges."""
    score = Score()
    weights = os.environ["JUDGED_WEIGHTS"]
    api = {
        "model": os.environ["JUDGED_MODEL"],
        "base_url": f"{score.url}/v1/completions",
        "tokenizer": weights,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": 1,
        "max_retries": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        ours = evaluated(folder, "local-completions", api)
        theirs = evaluated(folder, "hf", {"pretrained": weights, "dtype": "float32", "device": "cpu"})
    for task in TASKS:
        judge_task(score, task, ours, theirs)
    score.end()


def judge_task(score: Score, task: str, ours: Any, theirs: Any) -> None:
    """A point for its scores, and one for what each document was answered."""
    with score.point(f"{task}: the scores of both backends are equal"):
        for name, value in theirs["results"][task].items():
            found = ours["results"][task][name]
            if isinstance(value, float):
                print(f"      {task} {name}: {found:.6f} over HTTP, {value:.6f} with hf")
                assert math.isclose(found, value, rel_tol=TOLERANCE), (name, found, value)
    with score.point(f"{task}: what each document was answered"):
        pairs = list(zip(ours["samples"][task], theirs["samples"][task], strict=True))
        assert len(pairs) == NUM_DOCS
        for own, other in pairs:
            assert same(own["resps"], other["resps"]), (own["resps"], other["resps"])


def same(one: Any, other: Any) -> bool:
    """Whether answers are equal, log-probabilities nearly."""
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(one == other)


def evaluated(folder: str, model: str, arguments: dict[str, Any]) -> Any:
    """Scores and samples of all tasks."""
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
    )


def write_tasks(folder: Path) -> None:
    """A file of documents, and a description of each task (JSON is YAML)."""
    draw = random.Random(4)

    def text(length: int) -> str:
        return "".join(draw.choices(LETTERS, k=length)).strip() or "x"

    rows = [
        {
            "question": text(20) + " is",
            "choices": [f" {text(4 + number)}" for number in range(4)],
            "answer": draw.randrange(4),
            "text": text(30),
        }
        for _ in range(NUM_DOCS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "target_delimiter": "",
            "num_fewshot": 0,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))


if __name__ == "__main__":
    main()
