"""With a zero expert CDPO is plain DPO: the loss, the gradients and the metrics of TRL's own DPOTrainer."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny_models import WIDTH, tiny_model, word_tokenizer
from trainer.losses import cdpo_loss, pair_margins, routed_logprobs
from trainer.vocabulary_head import VocabularyHead, final_hidden

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # TRL's own and its dependencies'
]

BETA = 0.3
PAIRS = [  # with spaces, because TRL joins prompt and answer as they are
    {"prompt": "w5 w9 w2", "chosen": " w7 w8 w11", "rejected": " w7 w3"},
    {"prompt": "w12", "chosen": " w4", "rejected": " w31 w32 w33 w34 w35 w36"},
    {"prompt": "w20 w21 w22 w23 w24", "chosen": " w25 w26", "rejected": " w27 w28"},
]


class Oracle:
    """One batch of TRL's trainer: what it is fed, and what it makes of it."""

    def __init__(self, folder: Path, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        trl = import_module("trl")
        config = trl.DPOConfig(
            output_dir=str(folder),
            beta=BETA,
            per_device_train_batch_size=len(PAIRS),
            gradient_checkpointing=False,
            disable_dropout=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            max_steps=1,
        )
        self.trainer = trl.DPOTrainer(
            model=policy,
            ref_model=reference,
            args=config,
            train_dataset=import_module("datasets").Dataset.from_list(PAIRS),
            processing_class=word_tokenizer(),
        )
        self.batch: dict[str, Any] = next(iter(self.trainer.get_train_dataloader()))

    def loss(self) -> Tensor:
        result: Tensor = self.trainer.compute_loss(self.trainer.model.train(), self.batch)
        return result

    def metric(self, name: str) -> float:
        return float(self.trainer._metrics["train"][name][-1])

    def rows(self) -> tuple[Tensor, Tensor]:
        """Token ids and targets, chosen and rejected rows in turns; TRL has all chosen ones first."""
        order = torch.arange(2 * len(PAIRS)).view(2, -1).T.flatten()
        return self.batch["input_ids"][order], self.batch["completion_mask"][order].bool()


def targets_of(model: PreTrainedModel, ids: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities ``[T]``, rows ``[T]`` and hidden states of the targets."""
    hidden = final_hidden(model, ids)[:, :-1][supervised[:, 1:]]
    head = VocabularyHead.of(model, WIDTH)
    logprobs = head.gold_logprobs(hidden, ids[:, 1:][supervised[:, 1:]], chunk_tokens=4)
    return logprobs, supervised[:, 1:].nonzero()[:, 0], hidden


@pytest.fixture(params=["llama", "qwen3"])
def models(request) -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny_model(request.param, seed=1), tiny_model(request.param, seed=2)


def test_cdpo_with_a_zero_expert_is_the_dpo_of_trl(models, tmp_path: Path) -> None:
    policy, reference = models
    oracle = Oracle(tmp_path, policy, reference)
    wanted = oracle.loss()
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    ids, supervised = oracle.rows()
    with torch.no_grad():
        reference_logprobs, rows, _ = targets_of(reference, ids, supervised)
        sums = torch.zeros(len(ids)).index_add(0, rows, reference_logprobs)
    logprobs, rows, _ = targets_of(policy, ids, supervised)
    routing_scores = torch.randn(len(rows), 2, requires_grad=True)
    zero_experts = routed_logprobs(torch.zeros(len(rows), 2), routing_scores)
    margins = pair_margins(logprobs, sums, zero_experts, rows, beta=BETA)
    loss = cdpo_loss(margins)
    loss.backward()

    assert len(rows) == sum(len(f"{p['chosen']} {p['rejected']}".split()) + 2 for p in PAIRS)  # EOS twice
    assert margins.margin.abs().max() > 0.1, "policy and reference must differ"
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert set(gradients) == {name for name, _ in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=name)
    assert routing_scores.grad is None
    close = {"rel": 1e-4, "abs": 1e-4}
    assert margins.chosen_reward.mean().item() == pytest.approx(oracle.metric("rewards/chosen"), **close)
    assert margins.rejected_reward.mean().item() == pytest.approx(oracle.metric("rewards/rejected"), **close)
    assert margins.margin.mean().item() == pytest.approx(oracle.metric("rewards/margins"), **close)
    accuracy = (margins.margin > 0).float().mean().item()
    assert accuracy == pytest.approx(oracle.metric("rewards/accuracies"))


def test_an_expert_that_prefers_one_answer_makes_it_another_loss(models, tmp_path: Path) -> None:
    policy, reference = models
    oracle = Oracle(tmp_path, policy, reference)
    ids, supervised = oracle.rows()
    with torch.no_grad():
        logprobs, rows, _ = targets_of(policy, ids, supervised)
        reference_logprobs, _, _ = targets_of(reference, ids, supervised)
        sums = torch.zeros(len(ids)).index_add(0, rows, reference_logprobs)
    expert = -1.0 * (rows % 2)  # rejected tokens are unlikely
    assert cdpo_loss(pair_margins(logprobs, sums, expert, rows, beta=BETA)) < oracle.loss() - 1e-3
