"""A forward of transformers' module with its DynamicCache against the engine's, in one run, interleaved.

The engine's twice: with torch's products only, and with its own kernels for few rows where those are there and faster.

    python benchmarks/forward.py --shape tiny --dtype float32 --threads 1

One row per case: batch sessions with one token each, or one session that catches up on 16 tokens; all with the head on
the last token of each session only. Medians of many, wall time and CPU time of the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fusionroute.engine import LoadedModel, prepare_model
from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.decoder import Decoder
from fusionroute.engine.kv_cache import SessionCache
from tests.tiny_models import word_tokenizer

SHAPES = {
    "tiny": {"vocab_size": 65, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2},
    "h512": {"vocab_size": 128_256, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
}
HEADS = {"tiny": (4, 2), "h512": (8, 4)}
CASES = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (1, 4), (1, 16))
"""Sessions, and new tokens of each."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one forward: wall, and CPU of the whole process."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Result:
    """Medians of one case, in milliseconds.

    Attributes:
        torch_ms: of the engine without kernels of its own.
        engine_ratio: engine / module.
        kernels_ratio: engine / engine without kernels.
        exact_ratio: exact / engine.
    """

    sessions: int
    tokens: int
    module_ms: float
    torch_ms: float
    engine_ms: float
    exact_ms: float
    engine_ratio: float
    engine_cpu_ratio: float
    kernels_ratio: float
    kernels_cpu_ratio: float
    exact_ratio: float


def timed(forward: Callable[[], object]) -> Seconds:
    """Runs it once."""
    wall, cpu = time.perf_counter(), time.process_time()
    forward()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def module_forward(model: LlamaForCausalLM, past: int, sessions: int, tokens: int) -> Callable[[], object]:
    """A forward of the module over a cache that is put back afterwards."""
    cache = DynamicCache(config=model.config)
    model(torch.full((sessions, past), 3), past_key_values=cache, logits_to_keep=1)
    ids = torch.full((sessions, tokens), 5)

    def forward() -> object:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for layer in cache.layers:  # by hand: what `crop` means has changed between versions
            layer.keys, layer.values = layer.keys[:, :, :past], layer.values[:, :, :past]
        return logits

    return forward


def engine_forward(
    model: LoadedModel, past: int, sessions: int, tokens: int, exact: bool
) -> Callable[[], object]:
    """The same forward of the engine."""
    caches = [SessionCache(past + tokens) for _ in range(sessions)]
    for cache in caches:
        batch = RaggedBatch([Segment(cache, 0, 0, past)])
        model.forward(batch, [3] * past, range(past), [], exact=exact)
    ids, positions = [5] * (sessions * tokens), [*range(past, past + tokens)] * sessions
    wanted = [(number + 1) * tokens - 1 for number in range(sessions)]

    def forward() -> object:
        segments = [
            Segment(cache, past, number * tokens, (number + 1) * tokens)
            for number, cache in enumerate(caches)
        ]
        return model.forward(RaggedBatch(segments), ids, positions, wanted, exact=exact)

    return forward


def measure(models: Models, sessions: int, tokens: int, past: int, times: int) -> Result:
    """One case."""
    engine = models.engine
    forwards = [
        module_forward(models.module, past, sessions, tokens),
        engine_forward(models.without_kernels, past, sessions, tokens, exact=False),
        engine_forward(engine, past, sessions, tokens, exact=False),
        engine_forward(engine, past, sessions, tokens, exact=True),
    ]
    taken: list[list[Seconds]] = [[] for _ in forwards]
    for number in range(times + 2):
        for forward, seconds in zip(forwards, taken, strict=True):
            if number >= 2:
                seconds.append(timed(forward))
            else:
                forward()
    walls = [statistics.median(each.wall for each in seconds) for seconds in taken]
    cpus = [statistics.median(each.cpu for each in seconds) for seconds in taken]
    return Result(
        sessions,
        tokens,
        module_ms=round(1e3 * walls[0], 3),
        torch_ms=round(1e3 * walls[1], 3),
        engine_ms=round(1e3 * walls[2], 3),
        exact_ms=round(1e3 * walls[3], 3),
        engine_ratio=round(walls[2] / walls[0], 3),
        engine_cpu_ratio=round(cpus[2] / cpus[0], 3),
        kernels_ratio=round(walls[2] / walls[1], 3),
        kernels_cpu_ratio=round(cpus[2] / cpus[1], 3),
        exact_ratio=round(walls[3] / walls[2], 3),
    )


@dataclass(frozen=True, slots=True)
class Models:
    """The same random weights as a module on sdpa, and prepared for the engine twice."""

    module: LlamaForCausalLM
    engine: LoadedModel
    without_kernels: LoadedModel


def models_of(shape: str, dtype: torch.dtype) -> Models:
    """The models of a shape."""
    torch.manual_seed(0)
    heads, key_value_heads = HEADS[shape]
    config = LlamaConfig(
        **SHAPES[shape],
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )
    module = LlamaForCausalLM(config).to(dtype).eval()
    tokenizer = word_tokenizer(SHAPES[shape]["vocab_size"])
    engine, without = (prepare_model(copy.deepcopy(module), tokenizer, name=shape, epoch=1) for _ in range(2))
    assert isinstance(without._network, Decoder)
    without._network.drop_row_kernels()
    return Models(module, engine, without)


@torch.inference_mode()
def main() -> None:
    """Prints the table, and writes it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--past", type=int, default=128, help="tokens cached before")
    parser.add_argument("--times", type=int, default=0, help="forwards of each kind; 0 = 200 tiny, 15 else")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = models_of(options.shape, getattr(torch, options.dtype))
    times = options.times or (200 if options.shape == "tiny" else 15)
    print(
        f"{options.shape} {options.dtype}, {options.threads} threads, {options.past} tokens cached, {times} times"
    )
    print(
        "sessions tokens   module    torch   engine    exact ms"
        "   engine/module (CPU)   engine/torch (CPU)   exact/engine"
    )
    results = []
    for sessions, tokens in CASES:
        result = measure(models, sessions, tokens, options.past, times)
        results.append(asdict(result))
        print(
            f"{sessions:8} {tokens:6} {result.module_ms:8.3f} {result.torch_ms:8.3f} {result.engine_ms:8.3f}"
            f" {result.exact_ms:8.3f}       {result.engine_ratio:13.2f} ({result.engine_cpu_ratio:.2f})"
            f"        {result.kernels_ratio:6.2f} ({result.kernels_cpu_ratio:.2f})   {result.exact_ratio:12.2f}",
            flush=True,
        )
    if options.output:
        configuration = {key: str(value) for key, value in vars(options).items()}
        options.output.write_text(json.dumps({"configuration": configuration, "results": results}, indent=1))


if __name__ == "__main__":
    main()
