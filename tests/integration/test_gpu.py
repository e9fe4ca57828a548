"""The engine on a GPU gives the rows that it gives on a CPU. Runs where there is one: `pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusionroute.engine import Engine, EngineLimits, LoadedModel, StepCall, prepare_model
from fusionroute.engine.decode_graphs import GraphedDecoder
from fusionroute.engine.host_copies import HostCopies
from tests.tiny_models import tiny_model, word_tokenizer

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-3
"""Another library adds in another order; with TF32 switched off as torch has it, fp32 stays well below this."""


def loaded(family: str, device: str, **changes: Any) -> LoadedModel:
    model = tiny_model(family, **changes).to(device)
    return prepare_model(model, word_tokenizer(), name=family, heads=lambda hidden: hidden[:, :3])


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen2", "qwen3"])
async def test_rows_and_scores_of_many_sessions_equal_those_of_the_cpu(family: str) -> None:
    """Prefills in chunks, a shared beginning, decoding together, a rollback, exact sessions."""
    limits = EngineLimits(prefill_chunk_tokens=16)
    models = loaded(family, "cpu"), loaded(family, "cuda")
    assert isinstance(models[1]._network, GraphedDecoder), "the decoder was not taken; the log says why"
    prompt = [2 + (7 * at) % 50 for at in range(40)]
    rounds = [[StepCall(f"s{n}", 0, [*prompt, 3 + n], 2) for n in range(6)]]
    rounds += [[StepCall(f"s{n}", 41 + at, [5 + n + at], 1) for n in range(6)] for at in range(4)]
    rounds += [[StepCall("s1", 20, [9, 8, 7], 3)], [StepCall("e", 0, prompt, 1, exact=True)]]
    async with Engine(models[0], limits) as cpu, Engine(models[1], limits) as gpu:
        for calls in rounds:
            for wanted, got in zip(await cpu.step_batch(calls), await gpu.step_batch(calls), strict=True):
                assert not isinstance(wanted, Exception) and not isinstance(got, Exception), got
                assert got.rows.device.type == "cpu"
                torch.testing.assert_close(got.rows, wanted.rows, atol=TOLERANCE, rtol=TOLERANCE)
                assert got.head_scores is not None and wanted.head_scores is not None
                torch.testing.assert_close(
                    got.head_scores, wanted.head_scores, atol=TOLERANCE, rtol=TOLERANCE
                )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_exact_rows_keep_their_bits_on_the_gpu(dtype: torch.dtype) -> None:
    model = prepare_model(tiny_model("llama").to("cuda", dtype), word_tokenizer(), name="llama")
    text = [2 + (11 * at) % 50 for at in range(24)]
    async with Engine(model) as engine:
        whole = (await engine.step(StepCall("whole", 0, text, len(text), exact=True))).rows
        for at, token in enumerate(text):
            calls = [StepCall("alone", at, [token], 1, exact=True)]
            calls += [StepCall(f"other{n}", at, [7 + n], 1, exact=True) for n in range(at % 4)]
            mine = (await engine.step_batch(calls))[0]
            assert not isinstance(mine, Exception)
            assert torch.equal(mine.rows[0], whole[at]), at


def test_copies_to_the_host_are_whole_and_pinned() -> None:
    copies = HostCopies(torch.device("cuda"))
    source = torch.arange(1 << 20, device="cuda", dtype=torch.float32).mul_(2)
    (copy,) = copies.take(source)
    source.zero_()
    assert copy.is_pinned() and torch.equal(copy, torch.arange(1 << 20, dtype=torch.float32).mul_(2))
