"""The commands as a person or a script meets them: what they print, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from fusionroute.cli import main
from fusionroute.cli.generate import build_request
from fusionroute.cli.group import Failure
from fusionroute.cli.models import BASE_SLOT, base_to_serve, models_to_serve, parse_experts
from fusionroute.cli.stack import read_on
from fusionroute.cli.status import describe
from fusionroute.local_stack import Programs, StackPlan, start, stop
from fusionroute.stack_state import load_state
from fusionroute.v1.router_pb2 import CombineRule, ExpertChoice, OnExpertUnavailable
from tests.unit.fake_router import ANSWER, SLOTS, FakeRouter, serving

TEXT = "".join(text for text, _ in ANSWER)
FAKE = (sys.executable, str(Path(__file__).with_name("fake_daemon.py")))


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()  # type: ignore[abstract]  # the calls left out answer UNIMPLEMENTED


@pytest.fixture
def address(router: FakeRouter) -> Iterator[str]:
    with serving(router) as place:
        yield place


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FUSIONROUTE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("FUSIONROUTE_ADDRESS", raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*arguments: str, **options: str) -> Result:
    return CliRunner().invoke(main, arguments, **options)


def all_commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = [()]
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in command.list_commands(context)]
    return found


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Example:\n" in result.output
    assert f"fusionroute {' '.join(command)}".strip() in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fusionroute.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'grpc', 'numpy', 'rich', 'redis', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_version_is_told() -> None:
    assert run("--version").output.startswith("fusionroute 0.")


def test_an_unknown_command_is_wrong_usage() -> None:
    assert run("fly").exit_code == 2


def test_the_answer_goes_to_standard_output_and_nothing_else_does(address: str) -> None:
    result = run("generate", "box: 4+4; rev jbef=", "--address", address)
    assert result.exit_code == 0
    assert result.stdout == TEXT + "\n"


def test_options_left_out_stay_unset_so_that_the_routers_defaults_hold() -> None:
    request = build_request("x")
    assert request.text == "x"
    assert request.sampling.ListFields() == []
    assert request.combine == CombineRule.COMBINE_RULE_UNSPECIFIED


def test_every_sampling_option_arrives_in_the_request(router: FakeRouter, address: str) -> None:
    flags = (
        "--max-tokens 9 --temperature 0.5 --top-k 4 --top-p 0.75 --min-p 0.25 --repetition-penalty 1.5 "
        "--presence-penalty 1 --frequency-penalty -1 --logit-bias 7=-2.5 --stop END --stop ; --seed 11 "
        "--ignore-eos --combine gated_sum --expert math --session mine --on-expert-unavailable router_only"
    )
    assert run("generate", "hello", *flags.split(), "--address", address).exit_code == 0
    request = router.requests[0]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (9, 0.5, 4)
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0.75, 0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert dict(sampling.logit_bias) == {7: -2.5}
    assert list(sampling.stop) == ["END", ";"]
    assert (sampling.seed, sampling.ignore_eos) == (11, True)
    assert request.combine == CombineRule.COMBINE_RULE_GATED_SUM
    assert (request.fixed_expert, request.session_id) == ("math", "mine")
    assert request.on_expert_unavailable == OnExpertUnavailable.ON_EXPERT_UNAVAILABLE_ROUTER_ONLY


def test_baselines_are_asked_for_by_name() -> None:
    request = build_request("x", combine="ensemble")
    assert request.combine == CombineRule.COMBINE_RULE_ENSEMBLE
    request = build_request("x", combine="proxy", expert_choice="random")
    assert request.combine == CombineRule.COMBINE_RULE_PROXY
    assert request.expert_choice == ExpertChoice.EXPERT_CHOICE_RANDOM


def test_a_seed_of_zero_is_a_seed() -> None:
    assert build_request("x", seed=0).sampling.HasField("seed")


def test_chat_sends_the_prompt_as_the_users_message() -> None:
    request = build_request("hello", chat=True)
    assert request.WhichOneof("prompt") == "messages"
    assert [(message.role, message.content) for message in request.messages.messages] == [("user", "hello")]


def test_a_schema_or_an_expression_says_what_the_answer_looks_like(tmp_path: Path) -> None:
    assert build_request("x").sampling.constraint.WhichOneof("language") is None
    assert build_request("x", regex="a+").sampling.constraint.regex == "a+"
    assert build_request("x", json_schema="{}").sampling.constraint.json_schema == "{}"
    path = tmp_path / "schema.json"
    path.write_text('{"type": "integer"}')
    assert build_request("x", json_schema=f"@{path}").sampling.constraint.json_schema == '{"type": "integer"}'
    with pytest.raises(click.BadParameter, match="No such file"):
        build_request("x", json_schema="@/nowhere/schema.json")
    with pytest.raises(click.UsageError, match="not given together"):
        build_request("x", json_schema="{}", regex="a")


@pytest.mark.parametrize("bias", ["7", "x=1", "7=y", "-1=2"])
def test_a_logit_bias_of_another_form_is_wrong_usage(bias: str, address: str) -> None:
    result = run("generate", "x", "--logit-bias", bias, "--address", address)
    assert result.exit_code == 2
    assert "--logit-bias" in result.stderr


def test_a_dash_reads_the_prompt_from_standard_input(router: FakeRouter, address: str) -> None:
    assert run("generate", "-", "--address", address, input="two\nlines").exit_code == 0
    assert router.requests[0].text == "two\nlines"


def test_json_gives_one_object_per_event(address: str) -> None:
    result = run("generate", "x", "--json", "--address", address)
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [next(iter(event)) for event in events] == ["started", *["token"] * len(ANSWER), "finished"]
    assert "".join(event["token"]["text"] for event in events[1:-1]) == TEXT
    assert events[0]["started"]["seed"] == "9"


def test_a_trace_names_expert_and_weights_of_each_token(address: str) -> None:
    result = run("generate", "x", "--trace", "--address", address)
    lines = [line for line in result.stdout.splitlines() if " id " in line]
    assert len(lines) == len(ANSWER)
    assert "m math" in lines[1]
    assert "math 1.00, strings 0.00, format 0.00" in lines[1]
    assert "m math   s strings   f format   + router alone" in result.stderr


def test_a_refusal_of_the_service_is_a_message_and_exit_code_4(address: str) -> None:
    result = run("generate", "refuse me", "--address", address)
    assert result.exit_code == 4
    assert "error: text = 'refuse me' is not allowed" in result.stderr.replace(f"{address}: ", "")
    assert "Traceback" not in result.output


def test_a_router_that_is_not_there_is_named_with_exit_code_3() -> None:
    result = run("generate", "x", "--address", "127.0.0.1:9")
    assert result.exit_code == 3
    assert "127.0.0.1:9" in result.stderr


def test_without_stack_or_address_the_way_out_is_told() -> None:
    result = run("generate", "x")
    assert result.exit_code == 3
    assert "fusionroute up" in result.stderr


def test_the_environment_can_name_the_router(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONROUTE_ADDRESS", address)
    assert run("generate", "x").stdout == TEXT + "\n"


def test_ctrl_c_cancels_the_answer_and_keeps_what_was_written(router: FakeRouter, address: str) -> None:
    router.hold = True
    # Whoever runs the tests in the background may have had SIGINT ignored for all children. It is reset by a
    # program, not by `preexec_fn`: that forks a process whose gRPC threads hold locks, and the child can hang.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "fusionroute.cli", "generate", "x"]
    with subprocess.Popen(
        [*command, "--address", address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert router.holding.wait(60.0)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        output, remarks = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == "[8\n"
    assert "Traceback" not in remarks
    assert router.cancelled == [router.requests[0].session_id]


def test_experts_are_listed_those_missing_too(router: FakeRouter, address: str) -> None:
    router.missing = {"strings"}
    table = run("experts", "list", "--address", address)
    assert table.exit_code == 0
    lines = {line.split()[0]: line for line in table.stdout.splitlines()}
    assert "ready" in lines["math"]
    assert "nobody" in lines["strings"]
    told = json.loads(run("experts", "list", "--json", "--address", address).stdout)
    assert told["slots"] == list(SLOTS)
    assert [entry["slot"] for entry in told["experts"]] == ["math", "format"]


@pytest.mark.parametrize("command", ["status", "down", "logs"])
def test_commands_about_a_stack_that_is_not_up_exit_with_3(command: str) -> None:
    result = run(command, "--name", "nope")
    assert result.exit_code == 3
    assert "nope" in result.stderr


def test_a_stack_is_shown_followed_and_stopped_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "mine"
    plan = StackPlan(router_checkpoint="good", experts={"math": "good"}, port=5)
    start(plan, folder, ask_registry=lambda _: {"math": "ready"}, programs=Programs(FAKE, FAKE))
    try:
        told = run("status", "--name", "mine", "--json")
        rows = json.loads(told.stdout)["processes"]
        assert [(row["process"], row["state"]) for row in rows] == [
            ("router", "running"),
            ("expert-math", "running"),
        ]
        assert told.exit_code == 1, "nobody answers for the router"
        lines = run("logs", "expert-math", "--name", "mine").stdout
        assert "serving good for 127.0.0.1:50005" in lines
        assert "has no log of 'other'" in run("logs", "other", "--name", "mine").stderr
    finally:
        assert run("down", "--name", "mine").exit_code == 0
    assert load_state(folder) is None
    assert "expert-math: serving" in run("logs", "--name", "mine").stdout, "logs outlive the stack"


def test_status_joins_processes_with_what_the_registry_says(tmp_path: Path, router: FakeRouter) -> None:
    router.missing = {"strings"}
    plan = StackPlan(router_checkpoint="good", experts={"math": "good", "strings": "good"}, port=5)
    everyone = {"math": "ready", "strings": "ready"}
    state = start(plan, tmp_path / "s", ask_registry=lambda _: everyone, programs=Programs(FAKE, FAKE))
    try:
        entries = list(router.ListExperts(None, None).experts)
        state = replace(state, addresses={**state.addresses, "expert-math": entries[0].address})
        info = {state.router_address: router.GetRouterInfo(None, None)}
        rows = {row.process: row for row in describe(state, info, entries)}
        assert rows["router"].state == "ready"
        assert rows["expert-math"].state == "ready"
        assert (rows["expert-math"].epoch, rows["expert-math"].kv_tokens_used) == (5, 12)
        assert rows["expert-strings"].state == "running"
        os.kill(state.processes[1].pid, signal.SIGKILL)
        deadline = time.monotonic() + 10.0
        while len(state.alive) == 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert describe(state, info, entries)[1].state == "gone"
    finally:
        stop(tmp_path / "s", 5.0)


def test_up_without_models_is_wrong_usage() -> None:
    result = run("up")
    assert result.exit_code == 2
    assert "--lab" in result.stderr


def test_a_base_model_has_a_slot_that_no_expert_may_have(tmp_path: Path) -> None:
    assert base_to_serve(str(tmp_path), {"math": "m"}) == {BASE_SLOT: str(tmp_path.resolve())}
    with pytest.raises(click.UsageError, match=BASE_SLOT):
        base_to_serve(str(tmp_path), {BASE_SLOT: "m"})
    with pytest.raises(Failure, match="does not exist"):
        base_to_serve(str(tmp_path / "nowhere"), {})


def test_up_refuses_a_router_that_is_no_checkpoint(tmp_path: Path) -> None:
    missing = run("up", "--router", str(tmp_path / "no"), "--experts", "math=x")
    assert (missing.exit_code, "does not exist" in missing.stderr) == (1, True)
    incomplete = run("up", "--router", str(tmp_path), "--experts", "math=x")
    assert (incomplete.exit_code, "not a complete router checkpoint" in incomplete.stderr) == (1, True)


def test_a_missing_expert_folder_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "COMPLETE").touch()
    result = run("up", "--router", str(tmp_path), "--experts", "math=./nowhere")
    assert result.exit_code == 1
    assert "'math', ./nowhere, does not exist" in result.stderr


@pytest.mark.parametrize("text", ["math", "=x", "math="])
def test_an_expert_of_another_form_is_wrong_usage(text: str) -> None:
    with pytest.raises(click.BadParameter, match="SLOT=MODEL"):
        parse_experts((text,))


def test_a_slot_given_twice_is_wrong_usage() -> None:
    with pytest.raises(click.BadParameter, match="twice"):
        parse_experts(("math=a", "math=b"))


def test_a_preset_names_the_experts_and_options_can_replace_one(tmp_path: Path) -> None:
    (tmp_path / "COMPLETE").touch()
    preset = tmp_path / "mine.toml"
    preset.write_text('[experts]\nmath = "org/math"\ncode = "org/code"\n')
    _, models = models_to_serve(("code=org/other",), str(tmp_path), None, str(preset))
    assert models == {"math": "org/math", "code": "org/other"}


@pytest.mark.parametrize("text", ["[experts", "experts = 3", "[experts]\nmath = 3"])
def test_a_preset_that_is_not_one_is_wrong_usage(text: str, tmp_path: Path) -> None:
    preset = tmp_path / "mine.toml"
    preset.write_text(text)
    with pytest.raises(click.BadParameter, match=r"mine\.toml"):
        models_to_serve((), "x", None, str(preset))


def test_the_lab_brings_its_own_experts() -> None:
    with pytest.raises(click.UsageError, match="leave --experts"):
        models_to_serve(("math=a",), None, "demo", None)


def test_reading_on_in_a_log_gives_whole_lines_and_notices_a_new_one(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("one\ntw")
    text, offset = read_on(log, 0)
    assert text == "one\n"
    log.write_text("one\ntwo\n")
    assert read_on(log, offset) == ("two\n", 8)
    log.write_text("new\n")
    assert read_on(log, 8) == ("new\n", 4)
    assert read_on(tmp_path / "gone.log", 3) == ("", 0)


def test_a_building_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    result = run("lab", "build", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "exists already" in result.stderr
