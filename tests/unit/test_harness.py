"""What lm-evaluation-harness is asked to do, what is made of its words, and the items of our own tasks."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from click.testing import CliRunner

from evaluation.harness import running
from evaluation.harness.items import TASKS_FOLDER, all_rows, as_text
from evaluation.harness.results import Collected, collect, findings_of
from evaluation.harness.running import AskedModel, HarnessPlan, TaskSource, request_of, sources_of
from evaluation.harness.server import Server
from fusionroute.cli import main
from fusionroute.errors import InvalidRequest, Unavailable
from tests.judging_fakes import FakeJudge, serving

PLAN = HarnessPlan("http://127.0.0.1:9")
FUSED, MATH = AskedModel("fusionroute"), AskedModel("fusionroute/math")


def told(rights: list[float], **changes: Any) -> dict[str, Any]:
    """As the worker writes it: one task, answers raw and with their number taken out."""
    samples = [
        {
            "doc_id": number,
            "doc": {"question": f"{number}=", "cluster": f"c{number // 2}"},
            "target": str(number),
            "arguments": [[f"{number}=", {"until": ["\n"]}]],
            "filtered_resps": [f"answer {number}"],
            "filter": name,
            "metrics": ["exact_match", "length"],
            "exact_match": right if name == "number" else 0.0,
            "length": 0.5,
        }
        for name in ("none", "number")
        for number, right in enumerate(rights)
    ]
    scores: dict[str, Any] = {
        "alias": "sums",
        "sample_len": len(rights),
        "exact_match,none": 0.0,
        "exact_match,number": sum(rights) / len(rights),
        "exact_match_stderr,number": "N/A",
        "length,number": 7.25,
    }
    found = {
        "results": {"sums": scores},
        "samples": {"sums": samples},
        "versions": {"sums": 1.0},
        "n-samples": {"sums": {"original": 9, "effective": len(rights)}},
        "lm_eval": "0.4.13",
    }
    return {**found, **changes}


# --- its own items ---


def test_the_files_of_our_tasks_are_what_is_drawn_and_each_prompt_stands_there_once():
    for name, rows in all_rows().items():
        assert (TASKS_FOLDER / name).read_text(encoding="utf-8") == as_text(rows), (
            "python -m evaluation.harness.items"
        )
        assert len({row["question"] for row in rows}) == len(rows) >= 60


def test_programs_print_what_their_rows_say():
    for row in all_rows()["code_output/code_output.jsonl"]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(row["question"], {})  # noqa: S102 - of our own making
        assert printed.getvalue().strip() == row["answer"]


def test_choices_are_four_different_ones_and_the_right_one_is_among_them():
    for row in all_rows()["lab_code/lab_code.jsonl"]:
        assert len(set(row["choices"])) == 4 and row["choices"][row["right"]] == row["answer"]


def test_both_filters_find_the_number_in_every_gold_answer_and_only_one_in_a_bad_one():
    task = yaml.safe_load((TASKS_FOLDER / "lab_numbers" / "lab_numbers.yaml").read_text())
    strict, flexible = (each["filter"][0]["regex_pattern"] for each in task["filter_list"])
    for row in all_rows()["lab_numbers/lab_numbers.jsonl"]:
        for pattern in (strict, flexible):
            assert re.findall(pattern, row["answer"])[0] == row["number"]
    assert re.findall(flexible, "7,7, ok?") and not re.findall(strict, "7,7, ok?")


def test_every_shipped_folder_names_its_data_relative_to_itself():
    for name in running.shipped_tasks():
        (source,) = sources_of([name])
        assert source.folder is not None
        for description in source.folder.glob("*.yaml"):
            task = yaml.safe_load(description.read_text())
            assert (source.folder / task["dataset_kwargs"]["data_files"]["test"]).is_file()
            assert not task["task"].startswith("/")


# --- what is asked ---


def test_names_are_our_folders_anybodys_folders_or_tasks_of_the_harness(tmp_path):
    assert sources_of(["gsm8k", "lab_code", str(tmp_path), "mmlu"]) == [
        TaskSource(TASKS_FOLDER / "lab_code"),
        TaskSource(tmp_path.resolve()),
        TaskSource(None, ("gsm8k", "mmlu")),
    ]
    with pytest.raises(InvalidRequest, match=r"tasks = '.*/nowhere' is not allowed: a folder"):
        sources_of([str(tmp_path / "nowhere")])


def test_a_rule_goes_into_every_request_and_chats_need_no_tokenizer(tmp_path):
    source = TaskSource(None, ("gsm8k",))
    asked = request_of(source, AskedModel("fusionroute", "route"), PLAN, tmp_path / "o.json")
    assert asked["extra_body"] == {"fusionroute": {"combine": "route"}}
    assert asked["model"]["base_url"] == "http://127.0.0.1:9/v1/completions"
    assert asked["model"]["tokenizer_backend"] == "remote"
    local = request_of(source, FUSED, HarnessPlan("u", tokenizer=tmp_path), tmp_path / "o.json")
    assert (local["model"]["tokenizer_backend"], local["model"]["tokenizer"]) == (
        "huggingface",
        str(tmp_path),
    )
    assert local["extra_body"] == {}
    chat = request_of(source, FUSED, HarnessPlan("u", chat=True), tmp_path / "o.json")
    assert chat["model"]["base_url"] == "u/v1/chat/completions" and "tokenizer_backend" not in chat["model"]


def test_a_server_tells_its_models_and_how_long_its_context_is_or_what_is_wrong_with_it():
    with serving(FakeJudge()) as url:
        assert Server.found_at(url + "/v1") == Server(url, ("fake-judge",), 2048)
    with pytest.raises(Unavailable, match="does not answer"):
        Server.found_at(url)
    with pytest.raises(InvalidRequest, match="url") as raised:
        Server.found_at("http://name:secret@127.0.0.1")
    assert "secret" not in raised.value.message


# --- what was found ---


def test_each_metric_and_filter_has_a_cell_of_its_own_and_other_scores_are_kept_without():
    found = collect(told([1.0, 0.0, 1.0, 1.0]), "fusionroute")
    findings = findings_of(found, [FUSED], [TaskSource(TASKS_FOLDER)], PLAN)
    values = {cell.stratum: cell.estimate.value for cell in findings.cells}
    assert values == {"task=sums/exact_match": 0.0, "task=sums/exact_match/number": 0.75}
    assert all(0.0 <= cell.estimate.low < cell.estimate.high <= 1.0 for cell in findings.cells)
    assert findings.facts["scores_without_interval"] == [
        {"system": "fusionroute", "score": "sums/length/number", "value": 7.25}
    ]
    assert findings.facts["versions"] == {"lm_eval": "0.4.13", "sums": "1.0"}
    assert {outcome.question.cluster for outcome in found.outcomes} == {"c0", "c1"}


def test_models_are_compared_with_the_first_one_document_by_document():
    both = collect(told([1.0] * 12), FUSED.name) + collect(told([0.0] * 11 + [1.0]), MATH.name)
    findings = findings_of(both, [FUSED, MATH], [], PLAN)
    (found,) = [each for each in findings.comparisons if each.stratum.endswith("/number")]
    assert (found.first, found.second, found.only_first, found.only_second) == (FUSED.name, MATH.name, 11, 0)
    assert found.num_clusters == 6 and found.difference.value == pytest.approx(11 / 12)
    assert [note.kind for note in findings.systems] == ["served", "expert"]


def test_a_score_that_is_not_the_mean_of_its_documents_is_never_given_an_interval():
    odd = told([1.0, 0.0])
    odd["results"]["sums"]["exact_match,number"] = 0.6
    assert [each.name for each in collect(odd, "s").others] == [
        "sums/exact_match/number",
        "sums/length/number",
    ]


def test_words_that_are_not_the_harnesss_are_refused():
    for broken in ({}, told([1.0], results=[]), told([1.0], samples={"sums": [{}]})):
        with pytest.raises(ValueError, match="not what lm-evaluation-harness writes"):
            collect(broken, "s")
    with pytest.raises(ValueError, match="no metric"):
        findings_of(Collected((), (), {"lm_eval": "1"}), [FUSED], [], PLAN)


# --- the process ---


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    """A program in the place of an interpreter with lm_eval: does what the model's name says."""
    program = tmp_path / "python"
    canned = json.dumps(told([1.0, 1.0, 0.0]))
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys, time\n"
        "asked = json.load(sys.stdin)\n"
        "print('key', bool(os.environ.get('OPENAI_API_KEY')), os.environ.get('HF_HUB_OFFLINE'), os.getcwd())\n"
        "name = asked['model']['model']\n"
        "if name == 'slow': time.sleep(60)\n"
        "if name == 'broken': sys.exit('ValueError: no such task')\n"
        f"if name != 'silent': open(asked['output'], 'w').write({canned!r})\n"
    )
    program.chmod(0o755)
    return program


def test_a_run_gives_what_the_harness_wrote_and_keeps_what_it_said(harness, tmp_path):
    output = tmp_path / "o.json"
    source = TaskSource(TASKS_FOLDER / "lab_code")
    assert running.run(harness, source, FUSED, PLAN, output, key="k") == told([1.0, 1.0, 0.0])
    assert (tmp_path / "o.log").read_text() == f"key True 1 {source.folder}\n"
    running.run(harness, TaskSource(None, ("gsm8k",)), FUSED, PLAN, output)
    assert (tmp_path / "o.log").read_text() == f"key False None {Path.cwd()}\n"


def test_a_run_that_fails_is_silent_or_takes_too_long_says_where_its_log_is(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "somebody else's")
    source, output = TaskSource(TASKS_FOLDER / "lab_code"), tmp_path / "o.json"
    for name, says in (("broken", "ended with 1 .*\n.*no such task"), ("silent", "ended with 0 .*key False")):
        with pytest.raises(Unavailable, match=f"(?s){says}") as raised:
            running.run(harness, source, AskedModel(name), PLAN, output)
        assert str(output.with_suffix(".log")) in raised.value.message
    with pytest.raises(Unavailable, match="took longer than 0 s"):
        running.run(harness, source, AskedModel("slow"), HarnessPlan("u", timeout_seconds=0.3), output)
    with pytest.raises(InvalidRequest, match="python = '/nowhere'"):
        running.run(Path("/nowhere"), source, FUSED, PLAN, output)


@pytest.fixture
def own_signals() -> Iterator[None]:
    import signal

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_the_command_writes_a_report_and_names_models_that_are_not_there(harness, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSIONROUTE_API_KEY", "k-secret-2-of-some-length")
    with serving(FakeJudge()) as url:
        options = ["eval", "harness", "--url", url, "--python", str(harness), "-o", str(tmp_path / "out")]
        refused = CliRunner().invoke(main, options)
        done = CliRunner().invoke(main, [*options, "--model", "fake-judge", "--tasks", "lab_code", "--json"])
    assert refused.exit_code == 2 and "has no model 'fusionroute'; it has fake-judge" in refused.stderr
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["name"] == "lm-evaluation-harness"
    assert "1/1 lab_code with fake-judge" in done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    assert "0.667 [" in report and "secret" not in report + done.output
