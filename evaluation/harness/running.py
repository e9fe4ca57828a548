"""Runs of lm-evaluation-harness: which tasks, asked of which model, and the process that does it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.harness.items import TASKS_FOLDER
from fusionroute.errors import FusionRouteError, Reason, Unavailable, invalid

WORKER = Path(__file__).with_name("worker.py")
LAST_LINES = 15
MODEL = "fusionroute"


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Tasks that one process runs.

    Attributes:
        folder: of task descriptions whose data files are named relative to it; None = the harness's own tasks.
        names: of tasks or groups; empty = all of the folder.
    """

    folder: Path | None
    names: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For people and file names."""
        return "-".join(self.names) if self.folder is None else self.folder.name


@dataclass(frozen=True, slots=True)
class AskedModel:
    """Who answers.

    Attributes:
        model: as the server calls it.
        rule: the combine rule; "" = the checkpoint's, or none.
    """

    model: str
    rule: str = ""

    @property
    def name(self) -> str:
        """For programs: "fusionroute+route"."""
        return f"{self.model}+{self.rule}" if self.rule else self.model


@dataclass(frozen=True, slots=True)
class HarnessPlan:
    """How the harness asks.

    Attributes:
        url: of the server, without /v1.
        chat: whether to ask with messages, by its chat template; only tasks that generate text can be asked so.
        tokenizer: folder of the model's tokenizer; None = the server's own, asked over HTTP.
        limit: documents of each task; None = all.
        num_fewshot: examples before each question; None = as the task says.
        max_length: tokens of the context.
        ca: certificates that the server's may be signed by; None = the system's.
        timeout_seconds: of one process.
    """

    url: str
    chat: bool = False
    tokenizer: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    num_concurrent: int = 4
    batch_size: int = 1
    max_length: int = 2048
    ca: Path | None = None
    timeout_seconds: float = 24 * 3600.0


def shipped_tasks() -> list[str]:
    """Names of the folders of tasks that come with this package."""
    return sorted(path.name for path in TASKS_FOLDER.iterdir() if path.is_dir())


def sources_of(wanted: Sequence[str]) -> list[TaskSource]:
    """Each folder by itself, our own by their names; all other names are tasks of the harness.

    Raises:
        InvalidRequest: a path that is no folder.
    """
    sources, theirs = list[TaskSource](), list[str]()
    for each in wanted:
        if each in shipped_tasks():
            sources.append(TaskSource(TASKS_FOLDER / each))
        elif os.sep in each or Path(each).is_dir():
            if not Path(each).is_dir():
                raise invalid("tasks", each, "a folder, or the name of a task")
            sources.append(TaskSource(Path(each).resolve()))
        else:
            theirs.append(each)
    return [*sources, TaskSource(None, tuple(theirs))] if theirs else sources


def run(
    python: Path, source: TaskSource, asked: AskedModel, plan: HarnessPlan, output: Path, *, key: str = ""
) -> Mapping[str, Any]:
    """What the harness found, which is also in `output`; what it said is beside it, in a file that ends in .log.

    Raises:
        Unavailable: it failed, or took too long; the message ends with its last words.
        InvalidRequest: the interpreter cannot be started.
    """
    log = output.with_suffix(".log")
    output.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as said:
        try:
            done = subprocess.run(
                [str(python), str(WORKER)],
                input=json.dumps(request_of(source, asked, plan, output)),
                text=True,
                stdout=said,
                stderr=said,
                timeout=plan.timeout_seconds,
                cwd=source.folder,
                env=_environment(source, key),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _failed(source, asked, f"took longer than {plan.timeout_seconds:.0f} s", log) from None
        except OSError as error:
            raise invalid("python", str(python), f"an interpreter that can be started: {error}") from None
    if done.returncode or not output.exists():
        raise _failed(source, asked, f"ended with {done.returncode}", log)
    found: Mapping[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def request_of(source: TaskSource, asked: AskedModel, plan: HarnessPlan, output: Path) -> dict[str, Any]:
    """What the worker reads."""
    model = {
        "model": asked.model,
        "base_url": f"{plan.url}/v1/{'chat/' if plan.chat else ''}completions",
        "num_concurrent": plan.num_concurrent,
        "max_retries": 3,
        "max_length": plan.max_length,
    }
    if plan.ca is not None:
        model["ca_cert_path"] = str(plan.ca.resolve())
    if not plan.chat:
        model["tokenized_requests"] = True
        model["tokenizer_backend"] = "remote" if plan.tokenizer is None else "huggingface"
        if plan.tokenizer is not None:
            model["tokenizer"] = str(plan.tokenizer.resolve())
    return {
        "tasks": list(source.names),
        "folder": None if source.folder is None else str(source.folder),
        "chat": plan.chat,
        "model": model,
        "extra_body": {"fusionroute": {"combine": asked.rule}} if asked.rule else {},
        "limit": plan.limit,
        "num_fewshot": plan.num_fewshot,
        "batch_size": plan.batch_size,
        "output": str(output.resolve()),
    }


def _environment(source: TaskSource, key: str) -> dict[str, str]:
    """For the worker; whoever runs tasks of a folder needs nothing from the network but the server."""
    told = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if source.folder is not None:
        told |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    known = {
        name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "PYTHONPATH")
    }
    return {**known, **told, **({"OPENAI_API_KEY": key} if key else {})}


def _failed(source: TaskSource, asked: AskedModel, how: str, log: Path) -> FusionRouteError:
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
    message = f"lm_eval {how} with {source.label} and {asked.name}; see {log}\n{last}"
    return Unavailable(Reason.REMOTE_UNAVAILABLE, message)
