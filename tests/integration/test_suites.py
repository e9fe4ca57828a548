"""People's own suites over running services: every kind of system, tasks and texts, stopped and gone on with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from evaluation.findings import ACCURACY, ALL, NLL, SCORE
from evaluation.judging.pairs import read_answer_pairs
from evaluation.questions import Outcome, Question
from evaluation.report import write_report
from evaluation.suites.asking import Heard, ask_suite
from evaluation.suites.config import Suite
from evaluation.suites.loading import loaded_tasks, loaded_texts
from evaluation.suites.results import findings_of, write_answers
from evaluation.systems.rewards import Candidate, ModelReward
from evaluation.systems.tokens import TokenizerCodec
from fusionroute.errors import InvalidRequest
from tests.served_stack import Stack, make_family, record_of, save_router, served
from tests.tiny_models import WIDTH, word_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")
TEXTS = ["w5 w9 w20 w33 w41", "w7 w7 w8", "w50 w3 w12 w4 w4 w9", "w1 w2 w30"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("family")
    async with served(make_family(folder)) as stack:
        yield stack


@pytest.fixture
def suite_file(stack: Stack, tmp_path: Path) -> Path:
    rows = [
        {"id": str(n), "prompt": f"w{n} w{n + 9}", "answer": "x", "verifier": "contains"} for n in range(6)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    expert = stack.family.experts["math"]
    (tmp_path / "suite.toml").write_text(
        f"""
        name = "mine"
        baseline = "sum"
        tokenizer = "{expert}"
        [[systems]]
        name = "sum"
        combine = "sum"
        [[systems]]
        name = "math alone"
        combine = "route"
        expert = "math"
        [[systems]]
        name = "drawn"
        combine = "sum"
        random_expert = true
        [[systems]]
        name = "folder"
        kind = "model"
        model = "{expert}"
        [[tasks]]
        kind = "jsonl"
        name = "own"
        file = "own.jsonl"
        max_tokens = 5
        [[texts]]
        name = "held-out"
        file = "texts.jsonl"
        """.replace('"math alone"', '"math"')
    )
    return tmp_path / "suite.toml"


def quiet(what: str, num_done: int) -> None:
    pass


async def run(
    stack: Stack, path: Path, output: Path, max_questions: int | None = None
) -> tuple[Suite, Heard]:
    suite = Suite.from_toml(path)
    tasks, texts = loaded_tasks(suite, max_questions), loaded_texts(suite)
    return suite, await ask_suite(suite, tasks, texts, stack.client, output, quiet)


async def test_an_expert_served_and_the_same_model_from_its_folder_answer_alike(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    _, heard = await run(stack, suite_file, tmp_path / "out")
    answers = {
        name: [each.answer.text for each in heard.outcomes if each.system == name]
        for name in ("math", "folder", "sum")
    }
    assert len(answers["math"]) == 6 and answers["math"] == answers["folder"]
    assert answers["math"] != answers["sum"]
    assert {note.name: note.kind for note in heard.notes} == {
        "sum": "served", "math": "expert", "drawn": "served", "folder": "model"
    }  # fmt: skip


async def test_texts_are_worth_what_the_model_alone_gives_them(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    _, heard = await run(stack, suite_file, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(stack.family.experts["math"]).eval()
    tokenizer = word_tokenizer()
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        gold = ids[0, 1:]
        view = next(
            each
            for each in heard.views
            if each.system == "math" and each.question.id == f"held-out/{number + 1}"
        )
        assert view.answer.num_tokens == len(gold)
        assert view.answer.logprob == pytest.approx(logprobs.gather(1, gold[:, None]).sum().item(), abs=1e-3)
        assert view.verdict.score == pytest.approx((logprobs.argmax(1) == gold).float().mean().item())
        (folder,) = [
            each for each in heard.views if (each.system, each.question.id) == ("folder", view.question.id)
        ]
        assert folder.answer.logprob == pytest.approx(view.answer.logprob, abs=1e-3)
        assert folder.verdict == view.verdict


async def test_texts_are_refused_where_a_model_has_other_tokens_or_there_is_but_one(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["another"])
    AutoModelForCausalLM.from_pretrained(stack.family.experts["math"]).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    told = suite_file.read_text()
    suite_file.write_text(told.replace('model = "', f'model = "{tmp_path}/other" #'))
    with pytest.raises(InvalidRequest, match=r"systems.folder.model = .*/other.*judged token by token"):
        await run(stack, suite_file, tmp_path / "out")
    suite_file.write_text(told + "max_rows = 1\n")
    with pytest.raises(InvalidRequest, match=r"texts.held-out = '?1 of 2 tokens or more.* at least 2"):
        loaded_texts(Suite.from_toml(suite_file))


async def test_two_checkpoints_stand_in_one_report_where_a_system_names_its_own_router(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    records = tuple(record_of(slot, path) for slot, path in stack.family.experts.items())
    other = replace(stack.family, router=save_router(tmp_path / "router", records, seed=7))
    async with served(other) as second:
        address = second.router.server.address
        told = suite_file.read_text()
        suite_file.write_text(
            told.replace(
                "[[tasks]]", f'[[systems]]\nname = "new"\ncombine = "sum"\naddress = "{address}"\n[[tasks]]'
            )
        )
        suite, heard = await run(stack, suite_file, tmp_path / "both")
        _, alone = await run(second, with_systems_of(suite_file, told), tmp_path / "alone")
    notes = {note.name: note.note for note in heard.notes}
    assert address in notes["new"] and not notes["sum"]
    assert heard.models["others"][address]["checkpoint"] != heard.models["checkpoint"]
    for mine, theirs in ((heard.outcomes, alone.outcomes), (heard.views, alone.views)):
        new, first = values_of(mine, "new"), values_of(mine, "sum")
        assert new == values_of(theirs, "sum") and new != first
    assert {note.name for note in findings_of(suite, heard, {}).systems} >= {"sum", "new"}


def with_systems_of(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def values_of(outcomes: list[Outcome], system: str) -> list[tuple[str, float | None]]:
    return [(each.answer.text, each.answer.logprob) for each in outcomes if each.system == system]


async def test_a_run_goes_on_where_it_stopped_and_the_report_is_the_same(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    suite, whole = await run(stack, suite_file, tmp_path / "whole")
    await run(stack, suite_file, tmp_path / "parts")
    journal = tmp_path / "parts" / "answers" / "sum" / "own-0.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join(lines[:4]) + b'\n{"id": "own/own/5", "te')  # three answers and a torn one
    before = stack.router.engine.load().num_forwards
    _, again = await run(stack, suite_file, tmp_path / "parts")
    assert stack.router.engine.load().num_forwards > before
    for name, heard in (("whole", whole), ("parts", again)):
        write_report(findings_of(suite, heard, {}), tmp_path / name)
    assert (tmp_path / "whole" / "report.json").read_bytes() == (
        tmp_path / "parts" / "report.json"
    ).read_bytes()
    before = stack.router.engine.load().num_forwards
    await run(stack, suite_file, tmp_path / "parts")
    assert stack.router.engine.load().num_forwards == before, "all is known"


async def test_findings_have_scores_of_answers_and_losses_of_texts(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    suite, heard = await run(stack, suite_file, tmp_path / "out")
    findings = findings_of(suite, heard, {})
    cells = {(cell.system, cell.stratum, cell.measure) for cell in findings.cells if cell.stratum != ALL}
    of_sum = {(stratum, measure) for system, stratum, measure in cells if system == "sum"}
    assert of_sum == {("task=own", SCORE), ("task=held-out", NLL), ("task=held-out", ACCURACY)}
    assert {(each.first, each.second) for each in findings.comparisons} == {
        ("sum", "math"), ("sum", "drawn"), ("sum", "folder")
    }  # fmt: skip
    assert {share.system for share in findings.routing} >= {"sum", "drawn"}


async def test_answers_are_written_as_a_judge_reads_them(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    _, heard = await run(stack, suite_file, tmp_path / "out")
    write_answers(heard.outcomes, tmp_path / "written")
    pairs = read_answer_pairs(
        tmp_path / "written" / "math.jsonl", tmp_path / "written" / "folder.jsonl"
    ).pairs
    assert len(pairs) == 6 and all(pair.first == pair.second for pair in pairs)


async def test_a_reward_model_chooses_among_served_experts_as_it_would_among_models_at_hand(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    save_reward_model(tmp_path / "reward")
    lines = suite_file.read_text()
    chosen = '[[systems]]\nname = "chosen"\nkind = "collab"\nreward = "reward"\n'
    suite_file.write_text(lines.replace("[[tasks]]", f"{chosen}[[tasks]]").split("[[texts]]")[0])
    suite, heard = await run(stack, suite_file, tmp_path / "out", max_questions=4)
    (note,) = [note for note in heard.notes if note.name == "chosen"]
    assert note.kind == "served"
    mine = [each for each in heard.outcomes if each.system == "chosen"]
    reward, codec = ModelReward.load(tmp_path / "reward"), TokenizerCodec.load(suite.tokenizer)
    models = {
        slot: AutoModelForCausalLM.from_pretrained(folder).eval()
        for slot, folder in stack.family.experts.items()
    }
    assert len(mine) == 4 and len({each.answer.experts for each in mine}) > 1
    for outcome in mine:
        text, experts = brute_force(models, reward, codec, outcome.question)
        assert (outcome.answer.text, outcome.answer.experts) == (text, experts)


def save_reward_model(folder: Path) -> None:
    torch.manual_seed(8)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=WIDTH, num_labels=1, **sizes, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def brute_force(
    models: dict[str, PreTrainedModel], reward: ModelReward, codec: TokenizerCodec, question: Question
) -> tuple[str, tuple[str, ...]]:
    """Text and writers, every expert asked anew for every token."""
    prompt, ids, experts = codec.encode(question), list[int](), list[str]()

    def text(answer: list[int]) -> str:
        return codec.decode([*prompt, *answer])[len(codec.decode(prompt)) :]

    while len(ids) < question.max_tokens and 1 not in ids:
        ways = {slot: greedy(model, prompt, ids, question.max_tokens) for slot, model in models.items()}
        candidates = [Candidate(text(way), 1 in way) for way in ways.values()]
        rewards = reward.rewards(question, candidates)
        experts.append(list(ways)[rewards.index(max(rewards))])
        ids = ways[experts[-1]][: len(ids) + 1]
    return text(ids), tuple(experts)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: list[int], ids: list[int], most: int) -> list[int]:
    ids = list(ids)
    while len(ids) < most and 1 not in ids:
        ids.append(int(model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax()))
    return ids


async def test_answers_of_other_questions_are_not_taken_for_ours(
    stack: Stack, suite_file: Path, tmp_path: Path
) -> None:
    await run(stack, suite_file, tmp_path / "out", max_questions=2)
    with pytest.raises(InvalidRequest, match="questions differ; choose another folder"):
        await run(stack, suite_file, tmp_path / "out", max_questions=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('combine = "route"', 'combine = "best"'), r"systems.1.combine = 'best' is not allowed"),
        (('baseline = "sum"', 'baseline = "none"'), r"the baseline 'none' is not among the systems"),
        (('name = "drawn"', 'name = "sum"'), r"two systems have the name 'sum'"),
        (('kind = "jsonl"', 'kind = "lab"'), r"`file` is needed, and only lab has none"),
        (('kind = "model"', 'kind = "collab"'), r"a system of kind collab, and no other, needs `reward`"),
        (("max_tokens = 5", "max_tokens = 0"), r"tasks.0.max_tokens = 0 is not allowed"),
        (('name = "own"', 'names = "own"'), r"tasks.0.names = 'own' is not allowed"),
        (("max_tokens = 5", 'split = "train"'), r"split = train is not for jsonl, only for mbpp"),
        (("max_tokens = 5", "chat = true"), r"chat = True is not for jsonl"),
        (("max_tokens = 5", "cpu_seconds = 0"), r"tasks.0.cpu_seconds = 0 is not allowed"),
        (('kind = "model"', 'kind = "model"\naddress = "h:1"'), r"address are of kind served, not model"),
    ],
)
async def test_a_suite_that_cannot_be_meant_is_refused_by_field_and_value(
    suite_file: Path, change: tuple[str, str], message: str
) -> None:
    suite_file.write_text(suite_file.read_text().replace(*change))
    with pytest.raises(InvalidRequest, match=message):
        Suite.from_toml(suite_file)
