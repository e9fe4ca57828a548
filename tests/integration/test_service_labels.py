"""Labels from running expert services equal those of the same models loaded here, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fusionroute.errors import FusionRouteError, Reason, TrainingFailed, Unavailable
from tests.served_stack import Family, make_family, served
from tests.tiny_models import save_tiny_model
from trainer.config import ExpertSource, LabelsTable
from trainer.label_key import LabelKey
from trainer.label_store import LabelStore
from trainer.labelling import label_rows
from trainer.pace import Pace
from trainer.rows import Row, RowSet
from trainer.run_context import RunContext, Stop, Stopped
from trainer.service_labels import ServiceLabels


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), gates=False)


def sources(family: Family) -> dict[str, ExpertSource]:
    return {slot: ExpertSource(model=str(path)) for slot, path in family.experts.items()}


def random_rows(num_rows: int = 30) -> RowSet:
    dice = random.Random(7)
    rows = [Row.of([5, 6, 7], [False, False, False])]
    for _ in range(num_rows - 1):
        length = dice.randint(2, 40)
        marks = [False, True, *(dice.random() < 0.5 for _ in range(length - 2))]
        rows.append(Row.of([dice.randrange(2, 61) for _ in range(length)], marks))
    return RowSet.of(rows)


class StopAfter(Stop):
    """Does something at the so-manyth check."""

    def __init__(self, num_checks: int) -> None:
        super().__init__()
        self.num_checks = num_checks

    def check(self) -> None:
        self.num_checks -= 1
        if self.num_checks == 0:
            self.request()
        super().check()


async def by_services(folder: Path, family: Family, router: str, stop: Stop | None = None):
    table = LabelsTable(folder=folder, source="services", router=router, rows_per_shard=4, concurrency=3)
    context = RunContext(folder, stop=stop or Stop())
    return await asyncio.to_thread(label_rows, random_rows(), sources(family), table, context)


async def test_labels_of_services_equal_local_ones_also_when_interrupted_and_restarted(
    tmp_path, family, redis_url
):
    local, mine = label_rows(
        random_rows(), sources(family), LabelsTable(folder=tmp_path / "local"), RunContext(tmp_path)
    )
    async with served(family, redis_url=redis_url) as stack:
        router = stack.client.address
        with pytest.raises(Stopped):
            await by_services(tmp_path / "labels", family, router, StopAfter(50))
        assert list((tmp_path / "labels" / "shards").iterdir())

        async def restart() -> None:
            await stack.stop_expert("strings")
            await asyncio.sleep(0.3)
            await stack.start_expert("strings")

        restarting = asyncio.create_task(restart())
        labels, theirs = await by_services(tmp_path / "labels", family, router)
        await restarting
    assert np.abs(labels.gold_logprobs - local.gold_logprobs).max() < 1e-4
    assert np.array_equal(labels.argmax_ids, local.argmax_ids)
    assert LabelKey.of(random_rows(), theirs).digest == LabelKey.of(random_rows(), mine).digest


async def test_a_slot_that_nobody_serves_is_named_once_patience_has_ended(family, redis_url):
    async with served(family, start=False, redis_url=redis_url) as stack:
        await stack.start_expert("math")
        labels = ServiceLabels(("math", "format"), stack.client.address, 2, patience_seconds=0.3)
        with pytest.raises(Unavailable, match="no expert serves slot 'format'"):
            await asyncio.to_thread(labels.find_experts, Stop())


async def test_waiting_for_a_service_ends_when_asked_to_stop(family, redis_url):
    stop = Stop()
    async with served(family, start=False, redis_url=redis_url) as stack:
        labels = ServiceLabels(("math",), stack.client.address, 2, patience_seconds=60)
        finding = asyncio.create_task(asyncio.to_thread(labels.find_experts, stop))
        await asyncio.sleep(0.3)
        began = time.monotonic()
        stop.request()
        with pytest.raises(Stopped):
            await finding
    assert time.monotonic() - began < 5


async def test_a_router_that_is_not_there_is_unavailable(unused_address="127.0.0.1:9"):
    labels = ServiceLabels(("math",), unused_address, 2, patience_seconds=0.3)
    with pytest.raises(FusionRouteError) as caught:
        await asyncio.to_thread(labels.find_experts, Stop())
    assert isinstance(caught.value, Unavailable)


async def test_other_weights_in_a_slot_end_the_run(tmp_path, family, redis_url):
    own = Family(family.router, {"math": tmp_path / "math"})
    shutil.copytree(family.experts["math"], own.experts["math"])
    rows = random_rows()
    async with served(own, redis_url=redis_url) as stack:
        labels = ServiceLabels(("math",), stack.client.address, 2)
        records = await asyncio.to_thread(labels.find_experts, Stop())
        await stack.stop_expert("math")
        save_tiny_model(own.experts["math"], "llama", seed=77)
        await stack.start_expert("math")
        store = LabelStore(tmp_path / "labels", LabelKey.of(rows, records), rows, 8)
        store.begin()
        pending = {"math": store.pending("math")}
        with pytest.raises(TrainingFailed, match="slot 'math' is served with weights") as caught:
            await asyncio.to_thread(labels.label, rows, pending, store, Pace(None, "labels"), Stop())
    assert caught.value.reason is Reason.EXPERTS_MISMATCH


KILLED = """
import os, signal, sys
from pathlib import Path
from trainer.run_context import RunContext, Stop
from trainer.config import ExpertSource, LabelsTable
from trainer.labelling import label_rows
from tests.integration.test_service_labels import random_rows

class Death(Stop):
    num_checks = 0
    def check(self):
        self.num_checks += 1
        if self.num_checks == 12:
            os.kill(os.getpid(), signal.SIGKILL)

folder, model = Path(sys.argv[1]), sys.argv[2]
table = LabelsTable(folder=folder, rows_per_shard=2, batch_tokens=1)
label_rows(random_rows(), {"math": ExpertSource(model=model)}, table, RunContext(folder, stop=Death()))
"""


def test_after_a_kill_the_rest_is_labelled_and_all_is_as_if_nothing_had_happened(tmp_path, family):
    model = str(family.experts["math"])
    folder = tmp_path / "labels"
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", KILLED, str(folder), model]
    killed = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=90)
    assert killed.returncode == -9, killed.stderr
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("math-*")}
    assert 0 < len(before) < 15 and not (folder / "COMPLETE").exists()
    one = {"math": ExpertSource(model=model)}
    table = LabelsTable(folder=folder, rows_per_shard=2, batch_tokens=1)
    with pytest.raises(Stopped):
        label_rows(random_rows(), one, table, RunContext(tmp_path, stop=StopAfter(6)))
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "shards").glob("math-*")}
    assert before.items() < after.items()  # what the killed run had written stands untouched
    labels, _ = label_rows(random_rows(), one, table, RunContext(tmp_path))
    whole, _ = label_rows(
        random_rows(), one, table.model_copy(update={"folder": tmp_path / "whole"}), RunContext(tmp_path)
    )
    assert np.array_equal(labels.gold_logprobs, whole.gold_logprobs)
    assert np.array_equal(labels.argmax_ids, whole.argmax_ids)
