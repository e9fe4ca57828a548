"""The benchmarks' in-process reference equals a loop without caches; ways take turns; their arithmetic adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evaluation.bench_decode import equal_share, shares
from evaluation.bench_plot import write_plot
from evaluation.bench_reference import CachedFusion, CachedModel, generate_with_one
from evaluation.bench_report import Bars, Finding, Lines, Report, Stacks, speed_table
from evaluation.bench_runs import CpuClock, Runs, Spread, ratio, take_turns
from evaluation.bench_served import ServedTurn
from fusionroute.v1.router_pb2 import GenerationStatistics

PROMPT = [3, 1, 4, 1, 5]


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, initializer_range=0.5, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def without_cache(router, experts, weight, bias, num_tokens):
    ids, chosen = list(PROMPT), []
    with torch.inference_mode():
        for _ in range(num_tokens):
            output = router(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
            chosen.append(int(torch.argmax(weight @ output.hidden_states[-1][0, -1] + bias)))
            logits = experts[chosen[-1]](torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(torch.argmax(logits + output.logits[0, -1])))
    return ids[len(PROMPT) :], chosen


def test_the_cached_reference_equals_a_loop_without_caches_across_expert_switches() -> None:
    router, experts = tiny(0), [tiny(1), tiny(2), tiny(3)]
    weight, bias = torch.randn(3, 16), torch.zeros(3)
    fusion = CachedFusion(CachedModel(router), [CachedModel(expert) for expert in experts], weight, bias)
    expected, chosen = without_cache(router, experts, weight, bias, 24)
    assert len(set(chosen)) == 3, "the case must make experts catch up"
    for _ in range(2):
        assert fusion.generate(PROMPT, 24) == expected
        assert fusion.chosen == chosen


def test_generate_with_one_gives_exactly_as_many_tokens_as_asked() -> None:
    assert len(generate_with_one(tiny(1), PROMPT, 9)) == 9


def turn(total: float) -> GenerationStatistics:
    return GenerationStatistics(
        total_seconds=total, router_seconds=0.25, router_forward_seconds=0.125, expert_seconds=0.5,
        expert_forward_seconds=0.375, fuse_seconds=0.0625, store_seconds=0.03125,
    )  # fmt: skip


def test_the_parts_of_a_served_token_add_up_to_the_total_of_the_median_turn() -> None:
    parts = shares([turn(9.0), turn(1.0), turn(2.0)], num_tokens=1000)
    assert parts["total"] == pytest.approx(2.0)
    assert parts["wire"] == pytest.approx(0.125)
    assert parts["hand-over"] == pytest.approx(0.125)
    assert sum(value for name, value in parts.items() if name != "total") == pytest.approx(2.0)


async def test_ways_take_turns_and_each_round_begins_with_another_one() -> None:
    order: list[str] = []

    def way(name):
        async def run(number: int) -> int:
            order.append(f"{name}{number}")
            return 10

        return run

    tidied: list[int] = []

    async def tidy() -> None:
        tidied.append(len(order))

    runs = await take_turns({"a": way("a"), "b": way("b")}, num_runs=2, num_warmups=1, tidy=tidy)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert tidied == [1, 2, 3, 4, 5, 6], "sessions are forgotten after each run"
    assert [len(each.wall_seconds) for each in runs.values()] == [2, 2], "warm-ups are not measured"
    assert runs["a"].num_tokens == [10, 10]


def test_a_ratio_is_taken_round_by_round() -> None:
    slow_minute = ratio([2.0, 20.0, 9.0], [1.0, 10.0, 1.0])
    assert (slow_minute.median, slow_minute.low, slow_minute.high) == (2.0, 2.0, 9.0)


def test_the_clock_of_processors_counts_what_another_process_computes() -> None:
    burn = "sum(range(10_000_000)); print('done', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=PIPE, stdout=PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        with_it = CpuClock([process.pid]).seconds()
        assert with_it - CpuClock().seconds() > 0.05
        process.stdin.write(b"\n")
    assert CpuClock([process.pid]).seconds() < with_it, "a process that has ended counts nothing"


def test_ids_count_as_equal_up_to_the_first_that_differs() -> None:
    assert equal_share([[1, 2, 3, 4]], [[1, 2, 3, 4]]).median == 1.0
    assert equal_share([[1, 2, 9, 4]], [[1, 2, 3, 4]]).median == 0.5
    assert equal_share([[1, 2]], [[1, 2, 3, 4]]).median == 0.5


@pytest.mark.parametrize(
    ("median", "limits", "is_met"),
    [(1.1, {"at_most": 1.05}, False), (1.0, {"at_most": 1.05}, True), (8.0, {"at_least": 8}, True),
     (7.9, {"at_least": 8}, False), (5.0, {}, None)],
)  # fmt: skip
def test_a_finding_says_whether_its_aim_is_met(median: float, limits, is_met) -> None:
    assert Finding("a / b", Spread(median, median, median), **limits).is_met is is_met


def test_gaps_before_an_expert_has_written_are_no_familiar_gaps() -> None:
    turn = ServedTurn(arrived=[1.0, 2.0, 5.0, 6.0], experts=["a", "a", "b", "a"])
    assert turn.gaps == [1.0, 3.0, 1.0]
    assert turn.familiar_gaps() == [1.0, 1.0]
    changes = ServedTurn(arrived=[0, 1, 3, 6, 10, 15], experts=["a", "a", "b", "a", "b", "b"])
    assert changes.familiar_gaps() == [1, 3, 4, 5]
    assert changes.familiar_gaps(changed=True) == [3, 4]
    assert changes.familiar_gaps(changed=False) == [1, 5]


def test_a_report_tells_programs_everything_and_can_be_drawn(tmp_path: Path) -> None:
    runs = {"served": Runs("served", [10, 10, 10], [0.1, 0.3, 0.2], [0.1, 0.1, 0.1])}
    value = Spread.of(runs["served"].ms_per_token)
    report = Report(
        "decode", "How fast?", {"cores": 2}, [Finding("served", value, at_most=15.0, unit="ms")],
        [speed_table("One", runs)],
        panels=(
            Bars("bars", "ms", {"served": value}, reference=1.0),
            Stacks("parts", "ms", {"served": {"a": 1.0, "b": 2.0}}),
            Lines("lines", "n", "ms", {"x": [(1, 2.0), (2, 3.0)], "y": [(1, 1.0)]}, has_log_x=True),
        ),
        runs={"one": runs},
    )  # fmt: skip
    told = json.loads(json.dumps(report.to_json()))
    assert told["findings"][0] == {
        "what": "served", "median": 20.0, "low": 10.0, "high": 30.0, "unit": "ms", "aim": "at most 15",
        "is_met": False,
    }  # fmt: skip
    assert told["tables"][0]["rows"][0][:2] == ["served", 20.0]
    assert told["runs"]["one"]["served"]["wall_seconds"] == [0.1, 0.3, 0.2]
    write_plot(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["bench.png"]
