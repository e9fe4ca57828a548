"""TrainerService's calls about checkpoints over real gRPC and Redis: listed, promoted, refused, rolled back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fusionroute.errors import FusionRouteError, Reason, Unavailable
from fusionroute.grpc_runtime import Service, server
from fusionroute.manifest import COMPLETE_FILE, MANIFEST_FILE, Manifest, written_fingerprint
from fusionroute.private_redis import PrivateRedis, connect
from fusionroute.promotions import PromotionStore
from fusionroute.router_model import load_checkpoint
from fusionroute.trainer_client import TrainerClient
from fusionroute.v1 import registry_pb2, trainer_pb2, trainer_pb2_grpc
from fusionroute.v1.registry_pb2 import ExpertEntry
from tests.served_stack import make_family, save_router
from trainer.checkpoint_rpcs import CheckpointRpcs
from trainer.checkpoint_store import CheckpointStore

A, B = "run-sft-a1", "run-cdpo-b2"
READY, DRAINING = registry_pb2.EXPERT_STATE_READY, registry_pb2.EXPERT_STATE_DRAINING


class Servicer(CheckpointRpcs, trainer_pb2_grpc.TrainerServiceServicer):
    """The trainer without its jobs."""


@dataclass
class Trainer:
    """A trainer with published checkpoints, and the experts that its router tells of."""

    folder: Path
    entries: list[ExpertEntry] = field(default_factory=list)
    router_is_away: bool = False
    client: TrainerClient = field(init=False)

    async def ask_registry(self) -> list[ExpertEntry]:
        if self.router_is_away:
            raise Unavailable(Reason.EXPERT_UNAVAILABLE, "no router at 127.0.0.1:1")
        return self.entries

    def serve(self, slot: str, fingerprint: str, state: registry_pb2.ExpertState.ValueType = READY) -> None:
        entry = ExpertEntry(
            instance_id=f"{slot}-{len(self.entries)}", slot=slot, address="host:1", state=state
        )
        entry.model.weights_fingerprint, entry.model.name = fingerprint, f"models/{slot}"
        self.entries.append(entry)

    def serve_all(self) -> None:
        manifest = Manifest.from_json((self.folder / A / MANIFEST_FILE).read_text())
        for expert in manifest.experts:
            self.serve(expert.slot, expert.weights_fingerprint)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with PrivateRedis() as redis:
            client = connect(redis.url)
            rpcs = Servicer(CheckpointStore(self.folder), PromotionStore(client), self.ask_registry)  # type: ignore[abstract]
            name = trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
            service = Service(name, lambda s: trainer_pb2_grpc.add_TrainerServiceServicer_to_server(rpcs, s))
            async with server([service]) as running, TrainerClient.open(running.address) as self.client:
                yield
            await client.aclose()


@pytest.fixture
async def trainer(tmp_path: Path) -> AsyncIterator[Trainer]:
    family = make_family(tmp_path / "family", ("math", "code"))
    records = load_checkpoint(family.router).manifest.experts
    folder = tmp_path / "published"
    for age, (seed, name) in enumerate(((22, B), (31, A))):
        save_router(folder / name, records, seed=seed)
        os.utime(folder / name / COMPLETE_FILE, (1000 - age, 1000 - age))
    made = Trainer(folder)
    async with made.running():
        yield made


async def refusal(call: object) -> FusionRouteError:
    with pytest.raises(FusionRouteError) as caught:
        await call  # type: ignore[misc]
    return caught.value


async def test_published_checkpoints_are_listed_newest_first_and_incomplete_ones_are_not(
    trainer: Trainer,
) -> None:
    save_router(trainer.folder / "half", load_checkpoint(trainer.folder / A).manifest.experts)
    (trainer.folder / "half" / COMPLETE_FILE).unlink()
    (trainer.folder / ".staged").mkdir()
    listed = await trainer.client.list_checkpoints()
    assert [(each.checkpoint_id, each.job_id) for each in listed.checkpoints] == [(B, "b2"), (A, "a1")]
    assert listed.revision == 0 and not any(each.promoted for each in listed.checkpoints)
    assert len((await trainer.client.list_checkpoints(1)).checkpoints) == 1
    one = await trainer.client.get_checkpoint(A)
    assert (one.fingerprint, one.folder) == (
        written_fingerprint(trainer.folder / A),
        str(trainer.folder / A),
    )
    assert (one.created_at_seconds, Manifest.from_json(one.manifest).slots) == (999.0, ("math", "code"))


async def test_what_is_not_published_is_unknown(trainer: Trainer) -> None:
    assert (await refusal(trainer.client.get_checkpoint("other"))).reason is Reason.CHECKPOINT_UNKNOWN
    assert (await refusal(trainer.client.promote("other", 0))).reason is Reason.CHECKPOINT_UNKNOWN
    assert (await refusal(trainer.client.get_checkpoint("../published"))).reason is Reason.INVALID_FIELD


async def test_promotions_and_rollbacks_raise_the_revision_and_mark_the_checkpoint(trainer: Trainer) -> None:
    trainer.serve_all()
    first = await trainer.client.promote(A, 0)
    second = await trainer.client.promote(B, first)
    assert await trainer.client.promote(B, first) == second, "the same call again"
    listed = await trainer.client.list_checkpoints()
    assert listed.revision == second
    assert [each.checkpoint_id for each in listed.checkpoints if each.promoted] == [B]
    assert (await refusal(trainer.client.promote(A, first))).reason is Reason.REVISION_CONFLICT
    back = await trainer.client.rollback(second)
    assert (back.checkpoint.checkpoint_id, back.checkpoint.promoted) == (A, True)
    home = await trainer.client.rollback(back.revision)
    assert not home.HasField("checkpoint")
    assert (await refusal(trainer.client.rollback(home.revision))).reason is Reason.NOTHING_TO_ROLL_BACK


async def test_a_checkpoint_of_other_experts_is_refused_naming_slot_and_both_fingerprints(
    trainer: Trainer,
) -> None:
    records = load_checkpoint(trainer.folder / A).manifest.experts
    trainer.serve("math", records[0].weights_fingerprint)
    trainer.serve("code", "of-another")
    error = await refusal(trainer.client.promote(A, 0))
    assert error.reason is Reason.EXPERTS_MISMATCH
    for named in ("'code'", records[1].weights_fingerprint, "of-another", "host:1"):
        assert named in error.message
    assert error.metadata["slot"] == "code"
    assert (await trainer.client.list_checkpoints()).revision == 0


async def test_a_slot_that_nobody_serves_is_named(trainer: Trainer) -> None:
    records = load_checkpoint(trainer.folder / A).manifest.experts
    trainer.serve("math", records[0].weights_fingerprint)
    trainer.serve("code", records[1].weights_fingerprint, DRAINING)
    error = await refusal(trainer.client.promote(A, 0))
    assert error.reason is Reason.EXPERTS_MISMATCH
    assert "'code'" in error.message and "no expert serves" in error.message


async def test_nothing_is_promoted_while_the_router_cannot_be_asked_but_rolling_back_works(
    trainer: Trainer,
) -> None:
    trainer.serve_all()
    first = await trainer.client.promote(A, 0)
    trainer.router_is_away = True
    assert isinstance(await refusal(trainer.client.promote(B, first)), Unavailable)
    assert not (await trainer.client.rollback(first)).HasField("checkpoint")


async def test_a_checkpoint_whose_files_were_changed_is_refused(trainer: Trainer) -> None:
    trainer.serve_all()
    (trainer.folder / A / "model.safetensors").replace(trainer.folder / B / "model.safetensors")
    assert (await refusal(trainer.client.promote(A, 0))).reason is Reason.MODEL_BROKEN
    error = await refusal(trainer.client.promote(B, 0))
    assert error.reason is Reason.MODEL_BROKEN
    assert written_fingerprint(trainer.folder / B) in error.message
    (trainer.folder / A / MANIFEST_FILE).write_text("{}")
    assert (await refusal(trainer.client.get_checkpoint(A))).reason is Reason.MODEL_BROKEN


async def test_a_checkpoint_to_roll_back_to_must_still_be_there(trainer: Trainer) -> None:
    trainer.serve_all()
    first = await trainer.client.promote(A, 0)
    second = await trainer.client.promote(B, first)
    (trainer.folder / A).rename(trainer.folder / "moved")
    assert (await refusal(trainer.client.rollback(second))).reason is Reason.CHECKPOINT_UNKNOWN
    assert (await trainer.client.list_checkpoints()).revision == second
