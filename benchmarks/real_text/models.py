"""The models of a seed, each made once and kept: experts, routers by the product's own jobs, and what to compare with.

base/                    the same for all seeds
experts/math ...         from the base, on one domain each
sft/                     router of phase I with gates, from the base
mixture_sft/             the same with `sft.aggregate = "mixture"`
data/pairs.jsonl         what the served router of phase I writes instead of right answers
cdpo/                    router of phase II with gates
single/                  from the base, on the router's data alone
merged/                  mean of the experts' weights
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.real_text.sizes import EXPERTS, Sizes
from benchmarks.real_text.texts import Row, Source, Texts
from trainer.config import CdpoJob, JobConfig, PairsJob, SftJob
from trainer.lab_family.recipe import Stage
from trainer.lab_family.training import seed_torch, train
from trainer.merging.methods import MergeMethod, MergeSettings
from trainer.merging.model_merge import merge
from trainer.run import run
from trainer.run_context import RunContext, RunProgress

Tell = Callable[[str], None]
LABEL_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Family:
    """Where the models of a seed lie.

    Attributes:
        folder: of the seed.
        base: of all seeds.
    """

    folder: Path
    base: Path
    sizes: Sizes
    seed: int
    texts: Texts
    tell: Tell

    @property
    def experts(self) -> dict[str, Path]:
        """By slot."""
        return {slot: self.folder / "experts" / slot for slot in EXPERTS}

    @property
    def sft(self) -> Path:
        """Router checkpoint of phase I."""
        return self.folder / "sft"

    @property
    def mixture_sft(self) -> Path:
        """Router checkpoint of phase I whose routing loss is the likelihood of the experts' mixture."""
        return self.folder / "mixture_sft"

    @property
    def cdpo(self) -> Path:
        """Router checkpoint of phase II."""
        return self.folder / "cdpo"

    @property
    def pairs(self) -> Path:
        """Preference pairs."""
        return self.folder / "data" / "pairs.jsonl"

    @property
    def models(self) -> dict[str, Path]:
        """Models that are asked alone, by name."""
        return {
            "base": self.base,
            "merged": self.folder / "merged",
            "single": self.folder / "single",
        }

    def train_experts(self) -> None:
        """Each from the base, on whole rows of its domain."""
        for slot, folder in self.experts.items():
            if not folder.exists():
                self._train_expert(slot, folder)

    def train_sft(self) -> None:
        """Phase I with its gates, for both routing losses; the single model on the same rows; the merged one."""
        for folder, aggregate in ((self.sft, "linear"), (self.mixture_sft, "mixture")):
            if not folder.exists():
                values = {
                    "gates": self._gates(),
                    "sft": {"aggregate": aggregate},
                    **self._loop("router", self.sizes.router_epochs),
                }
                self._run(SftJob.from_values({**self._common(), "router": str(self.base), **values}), folder)
        single = self.models["single"]
        if not single.exists():
            values = {
                "gates": {"enabled": False},
                "sft": {"expert_weight": 0.0},
                **self._loop("router", self.sizes.router_epochs),
            }
            self._run(SftJob.from_values({**self._common(), "router": str(self.base), **values}), single)
        if not self.models["merged"].exists():
            merge(list(self.experts.values()), self.models["merged"], MergeSettings(MergeMethod.AVERAGE))

    def collect_pairs(self, address: str) -> None:
        """From the router of phase I, which serves there."""
        if self.pairs.exists():
            return
        prompts = self.folder / "data" / "prompts.jsonl"
        rows = [
            row.to_json() | {"completion": self._beginning(row.answer), "completion_ended": False}
            for row in self.texts.pairs
        ]
        write_rows(prompts, rows)
        config = PairsJob.from_values(
            {
                "data": {"files": [str(prompts)], "max_tokens": 2 * self.sizes.max_tokens},
                "output": str(self.pairs),
                "router": address,
                "checkpoint": str(self.sft),
                "max_new_tokens": self.sizes.pair_tokens,
                "seed": self.seed,
            }
        )
        run(config, RunContext(self.folder / ".pairs", self._progress("pairs")))

    def train_cdpo(self) -> None:
        """Phase II from the pairs, with gates fitted anew."""
        if self.cdpo.exists():
            return
        loop = self._loop("pairs", self.sizes.pair_epochs, rows=3 * self.sizes.batch_rows // 2)
        loop["training"]["learning_rate"] = self.sizes.pair_learning_rate
        values = {
            "router": str(self.sft),
            "pairs": {"files": [str(self.pairs)], "max_tokens": self.sizes.max_tokens},
            "gates": self._gates(),
            **loop,
        }
        self._run(CdpoJob.from_values({**self._common(), **values}), self.cdpo)

    def _train_expert(self, slot: str, folder: Path) -> None:
        """Rows one after the other, each with its ends, cut into chunks of equal length."""
        seed_torch(f"real text/{self.seed}/{slot}")
        sizes = self.sizes
        model = LlamaForCausalLM.from_pretrained(self.base, dtype=torch.float32).train()
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        chunks = _chunks(self.texts.experts[slot], tokenizer, sizes)

        def loss_at(step: int) -> torch.Tensor:
            places = torch.arange(step * sizes.batch_rows, (step + 1) * sizes.batch_rows) % len(chunks)
            ids = chunks[places]
            loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
            return loss

        stage = Stage(sizes.expert_steps, sizes.batch_rows, sizes.expert_learning_rate)
        parameters = [{"params": list(model.parameters())}]
        loss = train(parameters, stage, loss_at, lambda step, loss: None)
        self.tell(f"expert {slot}: {loss:.3f} nats per token at the end of training")
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def _common(self) -> dict[str, Any]:
        data = self.folder / "data" / "router.jsonl"
        write_rows(data, [row.to_json() for row in self.texts.router])
        return {
            "experts": {
                slot: {"model": str(path), "name": f"real-{slot}"} for slot, path in self.experts.items()
            },
            "data": {"files": [str(data)], "max_tokens": self.sizes.max_tokens},
            "labels": {"folder": str(self.folder / "labels"), "batch_tokens": LABEL_BATCH_TOKENS},
            "report": {"enabled": False},
        }

    def _loop(self, name: str, epochs: float, rows: int | None = None) -> dict[str, Any]:
        return {
            "training": {
                "epochs": epochs,
                "batch_rows": rows or self.sizes.batch_rows,
                "learning_rate": self.sizes.router_learning_rate,
                "warmup_steps": 10,
                "save_every_steps": 10**6,
                "seed": self.seed,
                "device": "cpu",
                "tensorboard": False,
            }
        }

    def _gates(self) -> dict[str, Any]:
        return {"num_steps": self.sizes.gate_steps}

    def _run(self, config: JobConfig, target: Path) -> None:
        seed_torch(f"real text/{self.seed}/{target.name}")
        workspace = self.folder / f".{target.name}"
        result = run(config, RunContext(workspace, self._progress(target.name)))
        self.tell(f"{target.name}: {_shown(result.metrics)}")
        result.artifact.rename(target)
        shutil.rmtree(workspace)

    def _progress(self, name: str) -> Callable[[RunProgress], None]:
        told: set[str] = set()

        def report(progress: RunProgress) -> None:
            if progress.stage not in told:
                told.add(progress.stage)
                self.tell(f"{name}: {progress.stage}")

        return report

    def _beginning(self, answer: str) -> str:
        """Of an answer, about as long as the answers that are written for pairs."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"][: self.sizes.pair_tokens]
        return str(tokenizer.decode(ids)).strip() or answer[: self.sizes.pair_tokens]


def prepare_base(source: Source, work: Path) -> Path:
    """The base's folder, made if it is not there."""
    folder = work / "base"
    if not folder.exists():
        staged = work / ".base"
        source.save_base(staged)
        staged.rename(folder)
    return folder


def _chunks(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> torch.Tensor:
    """``[C, chunk_tokens]``, as many as are learnt."""
    wanted = sizes.expert_steps * sizes.batch_rows * sizes.chunk_tokens
    ids: list[int] = []
    for row in rows:
        ids += tokenizer(row.prompt)["input_ids"]
        ids += [*tokenizer(row.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= wanted:
            break
    whole = len(ids) // sizes.chunk_tokens * sizes.chunk_tokens
    return torch.tensor(ids[: min(whole, wanted)]).reshape(-1, sizes.chunk_tokens)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSONL; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _shown(metrics: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return ", ".join(f"{name} {value:.3g}" for name, value in list(numbers.items())[:8])
