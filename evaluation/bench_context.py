"""What a growing session costs: ms per token by position, beside what attention alone takes at these lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from evaluation.bench_machine import machine, sizes
from evaluation.bench_report import Finding, Lines, Report, Table, speed_table
from evaluation.bench_runs import OnRun, Spread, take_turns
from evaluation.bench_served import ServedStack, request_for

PROMPT_TOKENS = 16
BIN_TOKENS = 64
NUM_WARMUPS = 1
ATTENTION_REPEATS = 200

Prompts = Callable[[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What attention of one token depends on besides the length."""

    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, folder: str) -> AttentionShape:
        """Of a model on disk."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        heads = config.num_attention_heads
        return cls(config.num_hidden_layers, heads, config.num_key_value_heads or heads, head_size, dtype)


async def measure_context(
    stack: ServedStack,
    prompts: Prompts,
    *,
    num_tokens: int,
    num_runs: int,
    threads: int,
    on_run: OnRun = lambda done, total: None,
) -> Report:
    """Measures one session that grows to `num_tokens` new tokens."""
    torch.set_num_threads(threads)
    arrivals: list[list[float]] = []

    async def grow(number: int) -> int:
        turn = await stack.turn(request_for(prompts(number)[:PROMPT_TOKENS], num_tokens))
        arrivals.append(turn.arrived)
        return len(turn.ids)

    runs = await take_turns(
        {"one session": grow},
        num_runs=num_runs, pids=stack.all_pids, num_warmups=NUM_WARMUPS, tidy=stack.tidy, on_run=on_run,
    )  # fmt: skip
    ends = list(range(2 * BIN_TOKENS, num_tokens + 1, BIN_TOKENS))
    measured = arrivals[NUM_WARMUPS:]
    served = {end: Spread.of(_ms_per_token(each, end) for each in measured) for end in ends}
    models = [
        AttentionShape.of(str(folder)) for folder in (stack.checkpoint, next(iter(stack.experts.values())))
    ]
    alone = {end: sum(attention_ms(model, PROMPT_TOKENS + end) for model in models) for end in ends}
    return Report(
        suite="context",
        question="Does a token get slower as its session grows?",
        configuration={
            **machine(threads), **sizes(stack.checkpoint), "experts": len(stack.experts),
            "prompt_tokens": PROMPT_TOKENS, "new_tokens": num_tokens, "runs": num_runs, "warmups": NUM_WARMUPS,
            "combine": "sum", "greedy": True, "drafting": "off",
        },
        findings=_findings(measured, alone, ends),
        tables=[_by_position(served, alone), _by_length(measured, num_tokens), speed_table("Whole runs", runs)],
        panels=[
            Lines("By position in the session", "new tokens so far", "ms per token",
                  {"served": [(end, each.median) for end, each in served.items()],
                   "attention of both models alone": list(alone.items())}),
            Lines("Whole answers", "new tokens", "ms per token, prompt included",
                  {"served": [(length, _whole(measured, length).median) for length in _lengths(num_tokens)]}, True),
        ],
        notes=["'attention alone': scaled_dot_product_attention of one query over as many keys in all layers of"
               " router and one expert, in this process, nothing else computed.",
               "A position's figure is the mean over the 64 tokens that end there; the first 64, which hold the"
               " prefills of the experts, are left out."],
        runs={"context": runs},
    )  # fmt: skip


def attention_ms(shape: AttentionShape, length: int, repeats: int = ATTENTION_REPEATS) -> float:
    """Attention of one token over `length` keys in all layers, median of many."""
    query = torch.randn(1, shape.heads, 1, shape.head_size).to(shape.dtype)
    keys, values = torch.randn(2, 1, shape.key_value_heads, length, shape.head_size).to(shape.dtype)
    grouped = shape.heads != shape.key_value_heads
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)
            seconds.append(time.perf_counter() - started)
    return 1000 * shape.layers * statistics.median(seconds)


def _ms_per_token(arrived: Sequence[float], end: int) -> float:
    """Over the tokens (end - BIN_TOKENS, end]."""
    return 1000 * (arrived[end - 1] - arrived[end - 1 - BIN_TOKENS]) / BIN_TOKENS


def _lengths(num_tokens: int) -> list[int]:
    return [length for length in (64, 128, 256, 512, 1024, 2048) if length <= num_tokens]


def _whole(measured: Sequence[Sequence[float]], length: int) -> Spread:
    return Spread.of(1000 * arrived[length - 1] / length for arrived in measured)


def _findings(
    measured: Sequence[Sequence[float]], alone: Mapping[int, float], ends: Sequence[int]
) -> list[Finding]:
    first, last = ends[0], ends[-1]
    growth = [_ms_per_token(arrived, last) - _ms_per_token(arrived, first) for arrived in measured]
    by_attention = alone[last] - alone[first]
    return [
        Finding(f"ms / token at {last} new tokens / at {first}",
                Spread.of(_ms_per_token(a, last) / _ms_per_token(a, first) for a in measured)),
        Finding(f"growth from {first} to {last} new tokens", Spread.of(growth), unit="ms"),
        Finding("of it attention alone, in one process", Spread.of([by_attention]), unit="ms"),
        Finding("share of the growth that is attention alone", Spread.of([_share(by_attention, growth)])),
        Finding(f"the same ratio with what attention alone explains taken off, {last} / {first}",
                Spread.of((_ms_per_token(a, last) - by_attention) / _ms_per_token(a, first) for a in measured)),
    ]  # fmt: skip


def _share(by_attention: float, growth: Sequence[float]) -> float:
    """Of the median growth; 1 where nothing grew that attention does not explain."""
    whole = statistics.median(growth)
    return by_attention / whole if whole > by_attention else 1.0


def _by_position(served: Mapping[int, Spread], alone: Mapping[int, float]) -> Table:
    rows = [[end, each.median, each.low, each.high, alone[end]] for end, each in served.items()]
    return Table("By position", ("new tokens", "ms / token", "least", "most", "attention alone"), rows)


def _by_length(measured: Sequence[Sequence[float]], num_tokens: int) -> Table:
    rows = []
    for length in _lengths(num_tokens):
        whole = _whole(measured, length)
        rows.append([length, whole.median, whole.low, whole.high])
    return Table("Whole answers, prompt included", ("new tokens", "ms / token", "least", "most"), rows)
