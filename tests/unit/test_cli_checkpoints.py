"""`fusionroute checkpoints` as a person or a script meets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from fusionroute.cli import main
from fusionroute.v1 import router_pb2, trainer_pb2, trainer_pb2_grpc
from tests.unit.fake_router import FakeRouter, serving

MANIFEST = json.dumps(
    {"experts": [{"slot": "math"}, {"slot": "code"}], "combine": "sum", "lineage": {"data": "d1"}}
)
IDS = ("run-cdpo-b", "run-sft-a")


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Two checkpoints at revision 7, the older one promoted; a change leads to the next revision."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    @staticmethod
    def checkpoint(name: str) -> trainer_pb2.Checkpoint:
        return trainer_pb2.Checkpoint(
            checkpoint_id=name, job_id=name[-1], fingerprint=f"print-{name[-1]}", manifest=MANIFEST,
            promoted=name == IDS[1], created_at_seconds=86400, folder=f"checkpoints/{name}",
        )  # fmt: skip

    def ListCheckpoints(self, request: Any, context: Any) -> trainer_pb2.ListCheckpointsResponse:  # noqa: N802
        found = [self.checkpoint(name) for name in IDS[: request.limit]]
        return trainer_pb2.ListCheckpointsResponse(checkpoints=found, revision=7)

    def GetCheckpoint(self, request: Any, context: Any) -> trainer_pb2.GetCheckpointResponse:  # noqa: N802
        if request.checkpoint_id not in IDS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no checkpoint {request.checkpoint_id!r}")
        return trainer_pb2.GetCheckpointResponse(checkpoint=self.checkpoint(request.checkpoint_id))

    def PromoteCheckpoint(self, request: Any, context: Any) -> trainer_pb2.PromoteCheckpointResponse:  # noqa: N802
        self.calls.append(request)
        if request.checkpoint_id not in IDS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "slot 'math' serves other weights")
        return trainer_pb2.PromoteCheckpointResponse(revision=8)

    def RollbackCheckpoint(self, request: Any, context: Any) -> trainer_pb2.RollbackCheckpointResponse:  # noqa: N802
        self.calls.append(request)
        return trainer_pb2.RollbackCheckpointResponse(revision=8)


class FollowingRouter(FakeRouter):
    """Acts upon revision 8 when it is asked for the third time."""

    def __init__(self, error: str = "", checkpoint_id: str = IDS[0]) -> None:
        super().__init__()
        self.error, self.checkpoint_id, self.num_asked = error, checkpoint_id, 0

    def GetRouterInfo(self, request: Any, context: Any) -> router_pb2.GetRouterInfoResponse:  # noqa: N802
        self.num_asked += 1
        if self.num_asked < 3:
            return router_pb2.GetRouterInfoResponse(promotion_revision=7)
        return router_pb2.GetRouterInfoResponse(
            promotion_revision=8,
            promotion_error=self.error,
            checkpoint="print-b",
            checkpoint_id=self.checkpoint_id,
        )


@contextmanager
def training(trainer: FakeTrainer) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(trainer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait(5.0)


@pytest.fixture
def trainer() -> FakeTrainer:
    return FakeTrainer()  # type: ignore[abstract]  # the calls about jobs are not needed


@pytest.fixture(autouse=True)
def places(trainer: FakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    with training(trainer) as address:
        monkeypatch.setenv("FUSIONROUTE_TRAINER", address)
        monkeypatch.setenv("FUSIONROUTE_STATE_DIR", str(tmp_path))
        monkeypatch.delenv("FUSIONROUTE_ADDRESS", raising=False)
        yield


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["checkpoints", *arguments])


def test_the_list_says_which_one_is_promoted() -> None:
    result = run("list")
    newest, older = result.stdout.splitlines()[1:]
    assert newest.startswith(IDS[0]) and "promoted" not in newest and "math, code" in newest
    assert older.startswith(IDS[1]) and "promoted" in older
    content = json.loads(run("list", "--json").stdout)
    assert (content["revision"], content["checkpoints"][1]["promoted"]) == (7, True)
    assert content["checkpoints"][0]["manifest"]["combine"] == "sum"


def test_one_of_them_is_shown_with_its_manifest() -> None:
    assert '"data": "d1"' in run("show", IDS[0]).stdout
    assert json.loads(run("show", IDS[0], "--json").stdout)["job_id"] == "b"
    unknown = run("show", "other")
    assert unknown.exit_code == 4 and "other" in unknown.output


def test_promoting_waits_until_the_router_serves(trainer: FakeTrainer) -> None:
    router = FollowingRouter()  # type: ignore[abstract]
    with serving(router) as address:
        result = run("promote", IDS[0], "--address", address)
    assert result.exit_code == 0, result.output
    assert f"serves {IDS[0]}" in result.stdout
    assert router.num_asked == 3
    assert (trainer.calls[0].checkpoint_id, trainer.calls[0].expected_revision) == (IDS[0], 7)


def test_a_router_that_cannot_serve_it_is_a_failure_with_its_reason() -> None:
    router = FollowingRouter("out of memory")  # type: ignore[abstract]
    with serving(router) as address:
        result = run("promote", IDS[0], "--address", address)
    assert result.exit_code == 1
    assert "out of memory" in result.output


def test_a_router_that_does_not_follow_is_a_failure_that_says_what_to_look_at() -> None:
    with serving(FakeRouter()) as address:  # type: ignore[abstract]
        result = run("promote", IDS[0], "--address", address, "--timeout", "0.3")
    assert result.exit_code == 1
    assert "0.3 s" in result.output and "checkpoints_dir" in result.output


def test_a_refusal_of_the_trainer_ends_it_before_the_router_is_asked() -> None:
    router = FollowingRouter()  # type: ignore[abstract]
    with serving(router) as address:
        result = run("promote", "other", "--address", address)
    assert result.exit_code == 4 and "'math'" in result.output
    assert router.num_asked == 0


def test_rolling_back_without_waiting_needs_no_router(trainer: FakeTrainer) -> None:
    result = run("rollback", "--no-wait", "--json")
    assert json.loads(result.stdout) == {"checkpoint_id": "", "revision": 8}
    assert trainer.calls[0].expected_revision == 7


def test_without_a_trainer_it_is_said_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSIONROUTE_TRAINER")
    result = run("list")
    assert result.exit_code == 3
    assert "fusionroute up --trainer" in result.output
