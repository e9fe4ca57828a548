"""From experts to a better router by commands alone: label, sft, promote, pairs, cdpo, promote, generate, rollback.

The services are real, the experts are those of the tiny family; the runs are short, so quality is not asked here.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from trainer.lab_family import EXPERT_SLOTS, Family, build, shown

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_TEXTS = 256
NUM_PROMPTS = 64


class Desk:
    """A terminal in a folder of its own, with a stack of its own."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.folder, self.family = folder, family
        names = ("FUSIONROUTE_", "REDIS_URL")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        self.environment = inherited | {
            "FUSIONROUTE_STATE_DIR": str(folder / "state"),
            "FUSIONROUTE_CACHE_DIR": str(folder / "cache"),
        }
        for name, count in (("router", NUM_TEXTS), ("prompts", NUM_PROMPTS)):
            lines = gzip.decompress((family.data / f"{name}.jsonl.gz").read_bytes()).splitlines()[:count]
            (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines))

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name("fusionroute"), *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def write(self, name: str, *lines: str) -> str:
        experts = [f'{slot} = "{path}"' for slot, path in self.family.experts.items()]
        data = "prompts" if name == "pairs" else "router"
        tables = ["[experts]", *experts, "[data]", f'files = ["{data}.jsonl"]', "max_tokens = 96"]
        (self.folder / f"{name}.toml").write_text("\n".join(['name = "short"', *lines, *tables]) + "\n")
        return f"{name}.toml"

    def answer(self) -> tuple[str, str]:
        """The checkpoint that answers and what it says."""
        events = [json.loads(line) for line in self.run("generate", "4+4=", "--json").splitlines()]
        started = next(event["started"] for event in events if "started" in event)
        return str(started["checkpoint"]), "".join(event.get("token", {}).get("text", "") for event in events)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with shown() as progress:
        family = build("demo", seed=0, progress=progress)
    desk = Desk(tmp_path_factory.mktemp("desk"), family)
    experts = [word for slot in EXPERT_SLOTS for word in ("--expert", f"{slot}={family.experts[slot]}")]
    ports = ["--port", "0", "--http-port", "0"]
    desk.run("up", "--router", str(family.router_sft), *experts, "--trainer", *ports, "--threads", "1")
    try:
        yield desk
    finally:
        desk.run("down")
        commands = [str(process.info["cmdline"]) for process in psutil.process_iter(["cmdline"])]
        assert not [command for command in commands if str(desk.folder) in command]


TRAINING = ("--set", "training.batch_rows=32", "--set", "training.learning_rate=1e-3", "--set", "gates.num_steps=20")


def test_a_router_is_trained_promoted_and_improved_by_commands_alone(desk: Desk) -> None:
    first, answer = desk.answer()
    assert answer == "8"
    labelled = desk.json("train", "label", desk.write("label"))
    assert labelled["state"] == "succeeded"
    start = desk.family.experts["format"]
    sft = desk.json("train", "sft", desk.write("sft", f'router = "{start}"'), *TRAINING)["checkpoint_id"]
    assert desk.json("checkpoints", "promote", sft)["checkpoint_id"] == sft
    second, _ = desk.answer()
    assert second != first

    router = next(row["address"] for row in desk.json("status")["processes"] if row["process"] == "router")
    pairs = desk.write("pairs", 'output = "pairs.jsonl"', f'router = "{router}"', "max_new_tokens = 24")
    desk.run("train", "pairs", pairs)
    rows = [json.loads(line) for line in (desk.folder / "pairs.jsonl").read_text().splitlines()]
    assert rows and all(row["chosen"] != row["rejected"] for row in rows)

    cdpo = desk.write("cdpo", f'router = "checkpoint:{sft}"', 'pairs.files = ["pairs.jsonl"]')
    better = desk.json("train", "cdpo", cdpo, *TRAINING)["checkpoint_id"]
    shown = desk.json("checkpoints", "show", better)
    lineage = shown["manifest"]["lineage"]
    assert (lineage["phase"], lineage["parent"], lineage["grandparents"]["phase"]) == ("cdpo", sft, "sft")
    desk.run("checkpoints", "promote", better)
    third, _ = desk.answer()
    assert third == shown["fingerprint"] and third not in (first, second)
    desk.run("checkpoints", "rollback")
    assert desk.answer()[0] == second

    jobs = desk.json("jobs", "list")
    assert {job["state"] for job in jobs} == {"succeeded"} and len(jobs) == 4
    assert sorted(c["checkpoint_id"] for c in desk.json("checkpoints", "list")["checkpoints"]) == sorted([sft, better])
