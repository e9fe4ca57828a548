"""Environments for judges, a served stack of tiny models for them to judge, and their scores.

judge_stack() -> URL ─┐
Judge -> its venv ────┴─> score_of(judge, url): its script's last line, "PASSED n of m"
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shutil
import sys
import venv
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.judges.scoring import URL_VARIABLE
from tests.served_stack import Stack, make_family, served

CACHE_VARIABLE = "FUSIONROUTE_JUDGES_DIR"
INSTALL_SECONDS = 900.0
ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
"""Of words alone: the tiny tokenizer knows nothing else."""

_SCORE = re.compile(r"PASSED (\d+) of (\d+)")


@dataclass(frozen=True)
class Judge:
    """A client of somebody else.

    Attributes:
        name: of its environment.
        requirements: for pip, pinned.
        packages: for npm, pinned; the script finds them in the folder of its environment.
        script: a file in this folder; ends with a line "PASSED n of m".
        seconds: that it may take.
        variables: further environment variables.
    """

    name: str
    requirements: tuple[str, ...]
    script: str
    seconds: float = 120.0
    packages: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a judge said."""

    num_won: int
    num_points: int
    output: str

    def lost(self, explained: Mapping[str, str] | None = None) -> list[str]:
        """The points lost, in its words, but for those whose loss is explained: by the point, why."""
        lines = [
            line.removeprefix("LOST").strip() for line in self.output.splitlines() if line.startswith("LOST")
        ]
        return [line for line in lines if not any(line.startswith(f"{point}: ") for point in explained or {})]


@asynccontextmanager
async def judge_stack(folder: Path, **router: Any) -> AsyncIterator[Stack]:
    """Tiny random models with a chat template, served over HTTP at `stack.router.http_url`, within the context."""
    family = make_family(folder)
    (family.router / "chat_template.jinja").write_text(TEMPLATE)
    async with served(family, http_port=0, **router) as stack:
        yield stack


async def score_of(judge: Judge, url: str) -> Verdict:
    """Runs a judge in its environment, which is made where it is missing. Prints what it says.

    Raises:
        RuntimeError: it could not be installed, or has given no score.
    """
    python = await environment_of(judge)
    variables = {
        URL_VARIABLE: url,
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [str(python), str(Path(__file__).with_name(judge.script))]
    output = await _run(command, judge.seconds, {**variables, **judge.variables})
    print(f"--- {judge.name} ({', '.join(judge.requirements + judge.packages)})\n{output}", flush=True)
    found = _SCORE.findall(output)
    if not found:
        raise RuntimeError(f"{judge.name} gave no score:\n{output}")
    num_won, num_points = map(int, found[-1])
    return Verdict(num_won, num_points, output)


async def environment_of(judge: Judge) -> Path:
    """The Python of a judge's environment, kept in $FUSIONROUTE_JUDGES_DIR or the user's cache between runs."""
    facts = json.dumps([judge.requirements, sys.version_info[:3], *judge.packages])
    name = f"{judge.name}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
    default = Path.home() / ".cache" / "fusionroute" / "judges"
    folder = Path(os.environ.get(CACHE_VARIABLE) or default) / name
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(venv.create, folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
        output = ""
        for installer, wanted in ((pip, judge.requirements), (npm, judge.packages)):
            if wanted:
                output += await _run([*installer, *wanted], INSTALL_SECONDS, {}, must_succeed=True)
        done.write_text(output)
    return python


async def _run(
    command: list[str], seconds: float, variables: Mapping[str, str], *, must_succeed: bool = False
) -> str:
    """What a command prints, errors included. Raises RuntimeError, or TimeoutError after killing it."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **variables},
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    text = output.decode(errors="replace")
    if must_succeed and process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}:\n{text}")
    return text
