"""Peers: the loops in this process equal their definitions; a peer that fails is named, never made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.bench_runs import Runs
from evaluation.peers import genlm_environment
from evaluation.peers.findings import equal_share, report
from evaluation.peers.genlm import GenlmProduct, PeerFailed
from evaluation.peers.in_process import LogitSum, generate
from evaluation.peers.ways import Combination, Maker, Way

# the pad token, 0, among them: it is a token like others
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [2, 0, 1, 8]]
NUM_TOKENS = 12
FAKE_WORKER = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "load":
        print(json.dumps({"versions": {"genlm-control": "0"}}), flush=True)
    elif request["num_tokens"] == 666:
        sys.exit("cannot go on")
    elif request["num_tokens"] == 777:
        time.sleep(60)
    else:
        ids = [[7] * request["num_tokens"]] * request["num_sessions"]
        print(json.dumps({"ids": ids}), flush=True)
"""


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, initializer_range=0.5, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def by_definition(scores, prompt):
    ids = list(prompt)
    for _ in range(NUM_TOKENS):
        ids.append(int(scores(torch.tensor([ids])).argmax()))
    return ids[len(prompt) :]


def logits(model, ids):
    return model(ids, use_cache=False).logits[0, -1]


def test_a_ragged_batch_of_proxy_tuning_equals_its_formula_on_each_prompt_alone() -> None:
    base, expert, anti = tiny(0), tiny(1), tiny(2)
    expected = [
        by_definition(lambda ids: logits(base, ids) + logits(expert, ids) - logits(anti, ids), prompt)
        for prompt in PROMPTS
    ]
    loop = LogitSum((base, expert, anti), (1, 1, -1))
    assert loop.generate(PROMPTS, NUM_TOKENS) == expected
    assert [loop.generate([prompt], NUM_TOKENS)[0] for prompt in PROMPTS] == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS), "the case must tell the prompts apart"


def test_generate_of_a_ragged_batch_and_with_help_writes_what_the_model_writes_alone() -> None:
    model, assistant = tiny(1), tiny(2)
    expected = [by_definition(lambda ids: logits(model, ids), prompt) for prompt in PROMPTS]
    assert generate(model, PROMPTS, NUM_TOKENS) == expected
    assert generate(model, PROMPTS[:1], NUM_TOKENS, assistant_model=assistant) == expected[:1]


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_genlm_control_writes_the_product_of_two_models_also_where_prompts_end_alike(
    tmp_path: Path,
) -> None:
    python = genlm_environment.installed_python(genlm_environment.default_folder())
    if python is None:
        pytest.skip("not installed: fusionroute bench peers --install-peers")
    pair = tiny(1), tiny(2)
    folders = [str(tmp_path / name) for name in ("first", "second")]
    for model, folder in zip(pair, folders, strict=True):
        model.save_pretrained(folder)
    prompts = [[number, 3] for number in range(16)]
    expected = LogitSum(pair, (1, 1)).generate(prompts, NUM_TOKENS)
    assert len({ids[0] for ids in expected}) < len({tuple(ids) for ids in expected}), "some must part later"
    log = tmp_path / "genlm.log"
    async with GenlmProduct.open(python, folders, prompts, threads=1, log=log) as peer:
        assert peer.versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        for is_tuned in (True, False):
            assert await peer.generate(len(prompts), NUM_TOKENS, is_tuned=is_tuned) == expected


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(FAKE_WORKER)
    return path


def opened(worker: Path, python: str = sys.executable):
    log = worker.with_suffix(".log")
    return GenlmProduct.open(Path(python), ("a", "b"), PROMPTS, threads=1, log=log, worker=worker)


async def test_a_peer_in_its_own_process_answers_until_it_is_left_and_then_is_gone(worker: Path) -> None:
    async with opened(worker) as peer:
        assert peer.versions == {"genlm-control": "0"}
        assert await peer.generate(2, 3) == [[7, 7, 7], [7, 7, 7]]
    assert peer.process.returncode == 0


async def test_a_peer_that_ends_tells_its_last_words(worker: Path) -> None:
    async with opened(worker) as peer:
        with pytest.raises(PeerFailed, match="cannot go on"):
            await peer.generate(1, 666)


async def test_a_peer_that_hangs_is_given_up_and_killed(worker: Path, tmp_path: Path) -> None:
    async with opened(worker) as peer:
        with pytest.raises(PeerFailed, match=r"no answer to 'generate' within 0 s"):
            await peer.generate(1, 777, timeout_seconds=0.05)
        peer.patience_seconds = 0.05
    assert peer.process.returncode == -9


async def test_a_peer_whose_python_is_not_there_is_named(worker: Path) -> None:
    with pytest.raises(PeerFailed, match="/nowhere/python cannot be started"):
        async with opened(worker, "/nowhere/python"):
            pass


def test_an_environment_that_was_not_made_to_its_end_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert genlm_environment.installed_python(tmp_path) is None
    (tmp_path / genlm_environment.COMPLETE).touch()
    assert genlm_environment.install(tmp_path) == tmp_path / "bin" / "python"


def test_both_sides_compute_with_the_same_torch_in_any_build() -> None:
    version = torch.__version__.partition("+")[0]
    assert f"torch=={version}" in genlm_environment.constraints()


def way(maker: Maker, combination: Combination, num_sessions: int = 1) -> Way:
    async def never() -> list[list[int]]:
        raise AssertionError

    return Way(maker, combination, num_sessions, never)


def test_each_peer_is_compared_with_the_stack_that_combines_as_it_does_and_as_many_sessions() -> None:
    seconds = {
        way(Maker.SERVED, Combination.ROUTED): 2.0,
        way(Maker.SERVED, Combination.PAIR): 4.0,
        way(Maker.SERVED, Combination.ROUTED, 8): 16.0,
        way(Maker.GENERATE, Combination.ONE): 1.0,
        way(Maker.GENLM, Combination.PAIR): 32.0,
        way(Maker.PROXY_LOOP, Combination.PROXY): 1.9,
        way(Maker.PROXY_LOOP, Combination.PROXY, 8): 15.2,
    }
    runs = {
        each.name: Runs(each.name, [8, 8], [wall, 2 * wall], [wall, wall]) for each, wall in seconds.items()
    }
    written = {each.name: [[1, 3 if each.maker is Maker.SERVED else 2]] for each in seconds}
    made = report(
        {},
        list(seconds),
        runs,
        written,
        {Combination.PAIR: [[1, 3], [1, 1]]},
        {Maker.LOOKUP: "no such thing"},
    )
    found = {finding.what: (finding.value.median, finding.is_met) for finding in made.findings}
    assert found == {
        "tokens / s: served / HF generate: e, 1 session": (0.5, False),
        "tokens / s: served / genlm-control: e + r, one expert, 1 session": (8.0, True),
        "tokens / s: served / proxy-tuning loop: base + e - anti, 1 session": (pytest.approx(0.95), True),
        "tokens / s: served / proxy-tuning loop: base + e - anti, 8 sessions": (pytest.approx(0.95), False),
        "ids as in the reference, least of 2 ways: e + r, one expert, 1 session": (0.5, False),
    }  # fmt: skip
    assert {row[0]: row[1] for row in made.tables[-1].rows} == {
        "served FusionRoute: e + r, one expert, 1 session": 1.0,
        "genlm-control: e + r, one expert, 1 session": 0.5,
    }
    assert made.notes[0] == "Not measured: HF prompt lookup: no such thing"


def test_ids_are_counted_against_the_first_expected_rows() -> None:
    assert equal_share([[1, 2, 3]], [[1, 0, 3], [9, 9, 9]]) == pytest.approx(2 / 3)
