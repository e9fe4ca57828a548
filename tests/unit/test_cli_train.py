"""`fusionroute train` as a person or a script meets it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result

from fusionroute.cli import main
from fusionroute.cli.group import Failure
from fusionroute.cli.train import print_result
from fusionroute.cli.train_config import KINDS, apply_change, guessed_kind, read_config
from fusionroute.cli.train_local import LocalResult, run_here
from fusionroute.errors import InvalidRequest, Reason, TrainingFailed
from fusionroute.v1 import trainer_pb2, trainer_pb2_grpc
from fusionroute.v1.trainer_pb2 import JobState
from tests.tiny_models import save_tiny_model
from trainer.config import JOBS, JobConfig, JobKind, PairsJob, SftJob
from trainer.config_template import template
from trainer.run_context import RunContext, RunProgress, RunResult, Stopped

SFT = """
name = "small"
router = "instruct"
[experts]
math = "models/math"
[data]
files = ["texts.jsonl"]
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "sft.toml"
    path.write_text(SFT)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def sft_job(config_file: Path) -> JobConfig:
    return read_config("sft", config_file)


class FakeRun:
    """Makes a checkpoint of one file, after as many steps as it is told; notes where it was called."""

    def __init__(self, *, stopped: bool = False) -> None:
        self.stopped = stopped
        self.folders: list[Path] = []

    def __call__(self, config: JobConfig, context: RunContext) -> RunResult:
        self.folders.append(context.folder)
        context.report(RunProgress("training", 3, 3, loss=0.5))
        if self.stopped:
            raise Stopped
        checkpoint = context.folder / "checkpoint"
        checkpoint.mkdir()
        (checkpoint / "COMPLETE").touch()
        (context.folder / "report.png").write_bytes(b"png")
        return RunResult(checkpoint, True, {"loss": 0.5})


@pytest.mark.parametrize("kind", KINDS)
def test_the_template_of_every_kind_is_valid_as_it_stands(kind: str):
    printed = run("template", kind)
    assert printed.exit_code == 0
    content = tomllib.loads(printed.output)
    job = JOBS[JobKind(kind)].from_values(content)
    assert guessed_kind(content) == kind or kind == "extend"  # without its own fields, extend looks like sft
    assert job.name == "run"


def is_field(line: str) -> bool:
    """Whether a comment is a field with its default, not words that explain one."""
    try:
        return " = " in line and bool(tomllib.loads(line.removeprefix("# ")))
    except tomllib.TOMLDecodeError:
        return False


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_template_comments_out_are_the_defaults(kind: str):
    job = JOBS[JobKind(kind)]
    lines = template(JobKind(kind)).splitlines()
    fields = [line.removeprefix("# ") if is_field(line) else line for line in lines]
    assert sum(line.startswith("# ") for line in lines) > sum(line.startswith("# ") for line in fields) + 10
    spoken_out = "\n".join(line for line in fields if line.split(" =")[0] not in ("dataset", "subset"))
    without_lora = re.sub(r"\n# \[training\.lora\].*?\n\n", "\n\n", spoken_out, flags=re.DOTALL)
    without_optional = re.sub(r"\n# \[(experts|old_data|remote)\].*?(\n\n|$)", "\n\n", without_lora, flags=re.DOTALL)
    assert job.from_values(tomllib.loads(without_optional)) == job.from_values(
        tomllib.loads(template(JobKind(kind)))
    )


def test_a_change_reaches_into_tables_and_keeps_types():
    content: dict[str, Any] = {"training": {"epochs": 1}}
    for change in (
        "training.epochs=4",
        "experts.math=models/math",
        "data.files=['a', 'b']",
        "name = mine",
        "x.y=true",
    ):
        apply_change(content, change)
    assert content == {
        "training": {"epochs": 4},
        "experts": {"math": "models/math"},
        "data": {"files": ["a", "b"]},
        "name": "mine",
        "x": {"y": True},
    }


@pytest.mark.parametrize("change", ["epochs", "=4", "training..epochs=4", "name.first=x"])
def test_a_change_of_another_form_is_wrong_usage(change: str):
    with pytest.raises(click.BadParameter):
        apply_change({"name": "run"}, change)


def test_a_value_out_of_bounds_is_named_with_file_and_field(config_file: Path):
    result = run("sft", config_file, "--local", "--set", "training.epochs=-1")
    assert result.exit_code == 4
    assert f"{config_file}: training.epochs = -1 is not allowed" in result.stderr


def test_paths_are_meant_from_the_folder_of_the_file(config_file: Path):
    (config_file.parent / "models" / "math").mkdir(parents=True)
    job = sft_job(config_file)
    assert isinstance(job, SftJob)
    assert job.data.files == (config_file.parent / "texts.jsonl",)
    assert job.experts["math"].model == str(config_file.parent / "models" / "math")
    assert job.router == "instruct"


def test_a_path_that_is_left_empty_is_not_the_folder_of_the_file(tmp_path: Path):
    path = tmp_path / "pairs.toml"
    path.write_text('output = "out.jsonl"\n[data]\nfiles = ["prompts.jsonl"]\n')
    job = read_config("pairs", path)
    assert isinstance(job, PairsJob)
    assert (job.checkpoint, job.output) == ("", tmp_path / "out.jsonl")


def test_kinds_are_told_by_the_fields_that_only_they_have():
    base: dict[str, Any] = {"experts": {}, "data": {}}
    assert guessed_kind(base) == "label"
    assert guessed_kind(base | {"router": "x"}) == "sft"
    assert guessed_kind(base | {"router": "x", "old_data": {}}) == "extend"
    assert guessed_kind(base | {"router": "x", "pairs": {}}) == "cdpo"
    assert guessed_kind(base | {"output": "x"}) == "pairs"


@pytest.mark.parametrize(
    "options",
    [("--local", "--detach"), ("--local", "--trainer", "x:1"), ("--run-folder", "x"), ("--output", "x")],
)
def test_options_of_the_two_ways_to_run_do_not_mix(config_file: Path, options: tuple[str, ...]):
    result = run("sft", config_file, *options)
    assert result.exit_code == 2
    assert "--local" in result.stderr


def test_another_server_is_asked_for_pairs_by_local_runs_alone(tmp_path: Path):
    path = tmp_path / "pairs.toml"
    path.write_text('output = "pairs.jsonl"\n[data]\nfiles = ["prompts.jsonl"]\n[remote]\napi_key_file = "key"\n')
    result = run("pairs", path, "--from-url", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "--local" in result.stderr
    config = read_config("pairs", path, ('remote.url="http://127.0.0.1:1"',))
    assert isinstance(config, PairsJob)
    assert config.remote is not None
    assert config.remote.api_key_file == tmp_path / "key"
    assert "--from-url" not in run("sft", "--help").output


def test_only_kinds_that_make_checkpoints_have_an_output():
    assert "--output" in run("sft", "--help").output
    assert "--output" not in run("label", "--help").output


def test_a_local_run_moves_its_checkpoint_and_is_not_done_twice(config_file: Path, tmp_path: Path, capsys):
    fake, folder, output = FakeRun(), tmp_path / "run", tmp_path / "checkpoints" / "one"
    result = run_here(sft_job(config_file), folder, output, fake)
    assert (output / "COMPLETE").exists()
    assert not (folder / "checkpoint").exists()
    assert (result.artifact, result.report, result.metrics) == (output, folder / "report.png", {"loss": 0.5})
    again = run_here(sft_job(config_file), folder, output, fake)
    assert again == result
    assert fake.folders == [folder]
    assert "done before" in capsys.readouterr().err


def test_a_stopped_run_exits_as_interrupted_and_the_same_command_goes_on(
    config_file: Path, tmp_path: Path, capsys
):
    with pytest.raises(click.exceptions.Exit) as caught:
        run_here(sft_job(config_file), tmp_path / "run", None, FakeRun(stopped=True))
    assert caught.value.exit_code == 130
    assert "goes on from what lies in" in capsys.readouterr().err
    assert run_here(sft_job(config_file), tmp_path / "run", None, FakeRun()).is_checkpoint


def test_a_folder_with_another_configuration_is_refused_saying_what_differs(
    config_file: Path, tmp_path: Path
):
    run_here(sft_job(config_file), tmp_path / "run", None, FakeRun())
    other = read_config("sft", config_file, ("training.epochs=3", "sft.expert_weight=0.5"))
    with pytest.raises(Failure, match="another run was begun") as caught:
        run_here(other, tmp_path / "run", None, FakeRun())
    assert "training.epochs: 1.0 there, 3.0 now" in caught.value.details
    assert "sft.expert_weight" in caught.value.details


def test_an_output_that_exists_is_refused_before_anything_is_done(config_file: Path, tmp_path: Path):
    fake = FakeRun()
    (tmp_path / "there").mkdir()
    with pytest.raises(Failure, match="exists already"):
        run_here(sft_job(config_file), tmp_path / "run", tmp_path / "there", fake)
    assert fake.folders == []


def test_a_folder_in_use_is_refused(config_file: Path, tmp_path: Path):
    def second_run(config: JobConfig, context: RunContext) -> RunResult:
        run_here(config, tmp_path / "run", None, FakeRun())
        raise AssertionError

    with pytest.raises(Failure, match="another process works in"):
        run_here(sft_job(config_file), tmp_path / "run", None, second_run)


def test_what_a_run_logs_goes_into_its_folder(config_file: Path, tmp_path: Path, capsys):
    def failing(config: JobConfig, context: RunContext) -> RunResult:
        import structlog

        structlog.get_logger().info("labels_found", rows=3)
        raise TrainingFailed(Reason.LOSS_NOT_FINITE, "loss is nan at step 3")

    with pytest.raises(TrainingFailed):
        run_here(sft_job(config_file), tmp_path / "run", None, failing)
    assert "labels_found" in (tmp_path / "run" / "log.txt").read_text()
    assert "labels_found" not in capsys.readouterr().out


def test_the_result_is_printed_for_scripts_as_json(tmp_path: Path, capsys):
    result = LocalResult(tmp_path / "a", True, tmp_path, None, {"loss": 0.25, "ownership": {"slots": []}})
    print_result(result, as_json=True)
    assert json.loads(capsys.readouterr().out)["metrics"]["loss"] == 0.25
    print_result(result, as_json=False)
    shown = capsys.readouterr().out
    assert f"checkpoint  {tmp_path / 'a'}" in shown
    assert "ownership" not in shown


class FakeTrainer(trainer_pb2_grpc.TrainerServiceServicer):
    """One job that ends as it is told, after three steps."""

    def __init__(self) -> None:
        self.requests: list[trainer_pb2.SubmitJobRequest] = []
        self.state = JobState.JOB_STATE_SUCCEEDED
        self.reason = ""
        self.publishes = True

    def SubmitJob(self, request: Any, context: Any) -> trainer_pb2.SubmitJobResponse:  # noqa: N802
        self.requests.append(request)
        created = [each.idempotency_key for each in self.requests].count(request.idempotency_key) == 1
        return trainer_pb2.SubmitJobResponse(
            job=trainer_pb2.Job(job_id="j1", kind=request.kind), created=created
        )

    def WatchJob(self, request: Any, context: Any) -> Iterator[trainer_pb2.WatchJobResponse]:  # noqa: N802
        job = trainer_pb2.Job(job_id="j1", state=JobState.JOB_STATE_RUNNING)
        for step in range(1, 4):
            job.progress.CopyFrom(trainer_pb2.JobProgress(stage="training", step=step, num_steps=3, loss=0.5))
            yield trainer_pb2.WatchJobResponse(job=job)
        job.state, job.state_reason = self.state, self.reason
        if self.publishes and self.state == JobState.JOB_STATE_SUCCEEDED:
            job.checkpoint_id, job.folder = "small-sft-j1", "jobs/j1"
        yield trainer_pb2.WatchJobResponse(job=job)


@pytest.fixture
def fake_trainer() -> FakeTrainer:
    return FakeTrainer()  # type: ignore[abstract]  # the calls left out answer UNIMPLEMENTED


@pytest.fixture
def address(fake_trainer: FakeTrainer) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(fake_trainer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def test_a_submitted_job_is_watched_until_it_has_published(
    config_file: Path, fake_trainer: FakeTrainer, address: str
):
    result = run("sft", config_file, "--trainer", address, "--set", "training.epochs=4")
    assert result.exit_code == 0, result.stderr
    assert "checkpoint  small-sft-j1" in result.stdout
    assert "training 3/3, loss 0.500" in result.stderr
    (request,) = fake_trainer.requests
    assert request.kind == trainer_pb2.JOB_KIND_SFT
    sent = SftJob.from_json(request.config)
    assert (sent.training.epochs, sent.data.files) == (4, (config_file.parent / "texts.jsonl",))
    assert 1 <= len(request.idempotency_key) <= 128


def test_a_job_that_fails_ends_the_command_with_its_reason(
    config_file: Path, fake_trainer: FakeTrainer, address: str
):
    fake_trainer.state, fake_trainer.reason = JobState.JOB_STATE_FAILED, "loss is nan at step 2"
    result = run("sft", config_file, "--trainer", address)
    assert result.exit_code == 1
    assert "job j1 failed: loss is nan at step 2" in result.stderr
    assert "fusionroute jobs logs j1" in result.stderr


def test_a_job_that_publishes_no_checkpoint_says_what_it_made(config_file: Path, fake_trainer, address: str):
    fake_trainer.publishes, fake_trainer.reason = False, "made labels"
    assert run("sft", config_file, "--trainer", address).stdout == "made labels\n"


def test_detached_it_prints_the_id_alone_and_scripts_get_json(config_file: Path, fake_trainer, address: str):
    assert run("sft", config_file, "--trainer", address, "--detach").stdout == "j1\n"
    described = json.loads(run("sft", config_file, "--trainer", address, "--json").stdout)
    assert (described["state"], described["checkpoint_id"]) == ("succeeded", "small-sft-j1")


def test_the_same_key_finds_the_job_it_made(config_file: Path, fake_trainer: FakeTrainer, address: str):
    assert "submitted" in run("sft", config_file, "--trainer", address, "--key", "k").stderr
    assert "was submitted before" in run("sft", config_file, "--trainer", address, "--key", "k").stderr


def test_nobody_there_has_an_exit_code_of_its_own(config_file: Path):
    assert run("sft", config_file, "--trainer", "127.0.0.1:1").exit_code == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def checkable(tmp_path: Path, model: Path, *lines: dict[str, Any]) -> Path:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "sft.toml"
    path.write_text(SFT.replace('"instruct"', f'"{model}"').replace('"models/math"', f'"{model}"'))
    return path


def test_good_data_is_described_and_shown(tmp_path: Path, model: Path):
    path = checkable(
        tmp_path, model, {"prompt": "w2 w3", "completion": " w4"}, {"prompt": "w5", "completion": " w6"}
    )
    result = run("validate", path)
    assert result.exit_code == 0, result.stderr
    assert "a job of kind sft" in result.stdout
    assert "2 rows of texts: 2 to be used, 0 with problems" in result.stdout
    assert "⟦" in result.stdout
    described = json.loads(run("validate", path, "--json").stdout)
    assert (described["kind"], described["data"]["data"]["num_kept"]) == ("sft", 2)


def test_every_bad_row_is_named_and_the_exit_code_says_so(tmp_path: Path, model: Path):
    path = checkable(tmp_path, model, {"prompt": "w2"}, {"prompt": "w2", "completion": " w4"}, {"text": 3})
    result = run("validate", path)
    assert result.exit_code == 4
    assert "line 1: completion: missing" in result.stdout
    assert "line 3: text: 3 is not text" in result.stdout


def test_models_of_different_vocabularies_are_named(tmp_path: Path, model: Path):
    other = save_tiny_model(tmp_path / "other", vocab_size=40)
    path = checkable(tmp_path, model, {"prompt": "w2", "completion": " w4"})
    result = run("validate", path, "--set", f"experts.code={other}")
    assert result.exit_code == 4
    assert "expert 'code'" in result.stderr and "VOCABULARY_MISMATCH" in result.stderr


def test_a_picture_is_drawn_anew(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    result = run("report", tmp_path)
    assert result.stdout.strip() == str(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_toml_is_named(tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text("router =")
    with pytest.raises(InvalidRequest, match=r"bad\.toml cannot be read"):
        read_config("sft", path)
