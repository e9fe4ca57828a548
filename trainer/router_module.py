"""The router while it learns: causal LM and routing head in one module that does all vocabulary work in `forward`.

    ids [B, L] -> LM -> hidden states at the targets [T, H] -+-> log-probabilities of the targets [T]   (in chunks)
                                                             +-> routing scores [T, n]
                                                             +-> gate scores [T, n + 1], where a gate learns with it

`forward` returns sums; what they are divided by is known to the loop alone, which sees all micro-batches and processes.
Everything that has parameters is called in `forward`, so that DDP and FSDP find it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fusionroute.errors import ModelRejected, Reason, invalid
from fusionroute.vocabulary import check_location, first_line, load_tokenizer, logits_width
from trainer.batches import Batch, PaddedRows
from trainer.config import CdpoLossTable, LoraTable, SftLossTable, TrainingTable
from trainer.frozen_models import FrozenModel
from trainer.gate_head import GateHead
from trainer.gates_table import GatesTable
from trainer.loop_statistics import pair_statistics, target_statistics
from trainer.losses import cdpo_loss, expert_loss, gate_loss, gold_loss, logprobs_at, pair_margins, routes_of
from trainer.vocabulary_head import VocabularyHead, final_hidden, fused_log_partition

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUTING = "routing."
"""How the names of the routing head's parameters begin."""
GATE = "gate."
"""How those of the gate begin; all others belong to the LM."""


@dataclass(frozen=True, slots=True)
class LossSwitches:
    """Which of the method's readings `forward` computes.

    Attributes:
        sft: of phase I.
        cdpo: of phase II.
        experts: frozen, for `cdpo.policy = normalised`; else none.
    """

    sft: SftLossTable = field(default_factory=SftLossTable)
    cdpo: CdpoLossTable = field(default_factory=CdpoLossTable)
    experts: Sequence[FrozenModel] = ()


class PartSums(NamedTuple):
    """Sums over one batch, each attached to the graph even where nothing was summed.

    Attributes:
        parts: ``[3]`` sums of L_LM over targets, of L_expert over informative targets, of L_CDPO over pairs; ``[4]``
            with that of L_gate over targets, where there is a gate.
        statistics: ``[S]`` float32, as `trainer.loop_statistics` names them; no gradient.
    """

    parts: Tensor
    statistics: Tensor


class RouterModule(nn.Module):
    """Causal LM and routing head.

    Args:
        lm: weights in float32; adapters may be in it already.
        routing: ``Linear(H, n)`` in float32.
        head: the LM's own, see `VocabularyHead.of`.
        tokenizer: of the LM, saved beside it.
        table: precision, gradient checkpointing, chunk_tokens.
        stored_dtype: of the weights before training; the trained ones are stored in it too.
        gate: learns with the router, whose hidden states its gradient reaches; None = gates come later, or never.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        routing: nn.Linear,
        head: VocabularyHead,
        tokenizer: PreTrainedTokenizerBase,
        table: TrainingTable,
        stored_dtype: torch.dtype,
        gate: GateHead | None = None,
    ) -> None:
        super().__init__()
        self.lm = lm
        self.routing = routing
        self.gate = gate
        self.tokenizer = tokenizer
        self.stored_dtype = stored_dtype
        self.switches = LossSwitches()
        self._head = head
        self._chunk_tokens = table.chunk_tokens
        self._autocasts = table.precision == "bf16"
        self._no_split_modules = getattr(lm, "_no_split_modules", None)  # what FSDP wraps

    @classmethod
    def load(
        cls,
        path_or_id: str,
        num_experts: int,
        table: TrainingTable,
        routing: tuple[Tensor, Tensor] | None = None,
        device: str | torch.device = "cpu",
        gates: GatesTable | None = None,
    ) -> RouterModule:
        """A router to be trained.

        Args:
            path_or_id: folder or hub id of a causal LM with its tokenizer; safetensors only.
            num_experts: n.
            table: precision, gradient checkpointing, LoRA, chunk_tokens.
            routing: weight ``[n, H]`` and bias ``[n]``; None = zeros, all experts alike.
            device: a torch device.
            gates: shape of the gate that learns with the router, if they say that one does.

        Raises:
            ModelRejected: MODEL_NOT_FOUND, MODEL_BROKEN, MODEL_UNSUPPORTED or VOCABULARY_MISMATCH, naming the model.
        """
        check_location(path_or_id)
        tokenizer = load_tokenizer(path_or_id)
        lm, stored_dtype = _load_lm(path_or_id)
        hidden_size = lm.config.get_text_config().hidden_size
        if table.gradient_checkpointing:
            _checkpoint_gradients(lm)
        if table.lora is not None:
            lm = _with_adapters(lm, table.lora, table.seed)
        lm = lm.to(device)
        head = VocabularyHead.of(lm, logits_width(tokenizer))
        linear = _routing_head(hidden_size, num_experts, routing).to(device)
        gate = None
        if gates is not None and gates.learn_with_router:
            gate = GateHead(hidden_size, num_experts + 1, gates, table.seed).to(device)
        return cls(lm, linear, head, tokenizer, table, stored_dtype, gate)

    @property
    def device(self) -> torch.device:
        """Of the routing head, which is where the LM is."""
        return self.routing.weight.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def freeze_routing(self) -> None:
        """For pairs alone: nothing but SFT rows teaches the routing head."""
        self.routing.requires_grad_(False)

    def forward(self, batch: Batch) -> PartSums:
        """Sums over a batch.

        The routing scores of SFT rows are not detached: routing head and LM both learn from L_expert, and gate and LM
        from L_gate. Pairs use detached scores, so they leave the routing head alone.
        """
        with self._precision(batch.ids.device):
            hidden = _at(final_hidden(self.lm, batch.ids), batch.cells)
            gold_logprobs = self._head.gold_logprobs(hidden, batch.gold, self._chunk_tokens)
            scores = self._scores(hidden)
            split = batch.num_sft_targets
            lm_sum = gold_loss(gold_logprobs[:split], 1.0)
            expert_sum = expert_loss(
                scores[:split],
                batch.gold_logprobs[:split],
                batch.informative,
                denominator=1.0,
                aggregate=self.switches.sft.aggregate,
            )
            parts, of_pairs = [lm_sum, expert_sum], None
            if batch.num_pairs > 0:
                cdpo_sum, of_pairs = self._cdpo(
                    batch, hidden[split:], gold_logprobs[split:], scores[split:].detach()
                )
                parts.append(cdpo_sum)
            else:
                parts.append(lm_sum.new_zeros(()))
            if self.gate is not None:
                parts.append(self._gate_sum(self.gate, batch, hidden[:split], gold_logprobs[:split]))
            statistics = target_statistics(batch.tallies, scores.detach(), of_pairs)
        return PartSums(torch.stack(parts), statistics)

    @staticmethod
    def _gate_sum(gate: GateHead, batch: Batch, hidden: Tensor, router_gold: Tensor) -> Tensor:
        """Sum of L_gate over the targets of SFT rows; what the router itself says of them has no gradient."""
        of_experts, every = batch.gold_logprobs[: len(hidden)], torch.ones_like(router_gold, dtype=torch.bool)
        return gate_loss(gate(hidden), of_experts, router_gold, every, denominator=1.0)

    def _cdpo(
        self, batch: Batch, hidden: Tensor, gold_logprobs: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of L_CDPO over pairs and their statistics."""
        cdpo = self.switches.cdpo
        live = routes_of(scores)
        routes = live if cdpo.routes == "live" else batch.phase_one_routes
        margins = pair_margins(
            gold_logprobs,
            batch.reference_logprobs,
            logprobs_at(batch.gold_logprobs[batch.num_sft_targets :], routes),
            batch.owners,
            beta=cdpo.beta,
            bias_scale=cdpo.bias_scale,
            bias_reduction=cdpo.bias_reduction,
            log_partition=self._log_partition(batch, hidden, routes) if cdpo.policy == "normalised" else None,
        )
        flips = live != batch.phase_one_routes
        return cdpo_loss(margins, denominator=1.0), pair_statistics(margins, flips)

    def _log_partition(self, batch: Batch, hidden: Tensor, routes: Tensor) -> Tensor:
        num_sft_rows = len(batch.lengths) - 2 * batch.num_pairs
        cells = batch.cells[batch.num_sft_targets :] - num_sft_rows * batch.ids.shape[1]
        ids = batch.ids[num_sft_rows:]
        states = [_at(expert.hidden(ids), cells) for expert in self.switches.experts]
        heads = [expert.head for expert in self.switches.experts]
        return fused_log_partition(self._head, hidden, heads, states, routes, self._chunk_tokens)

    @torch.no_grad()
    def gold_logprobs_and_routes(self, rows: PaddedRows, chunk_tokens: int) -> tuple[Tensor, Tensor]:
        """``[t]`` float32 log-probability of each target and ``[t]`` the expert routed to, in evaluation mode."""
        training = self.training
        self.eval()
        try:
            with self._precision(self.device):
                ids = torch.from_numpy(rows.ids).to(self.device)
                hidden = _at(final_hidden(self.lm, ids), torch.from_numpy(rows.cells).to(self.device))
                gold = torch.from_numpy(rows.gold).to(self.device)
                return self._head.gold_logprobs(hidden, gold, chunk_tokens), routes_of(self._scores(hidden))
        finally:
            self.train(training)

    def _scores(self, hidden: Tensor) -> Tensor:
        """Routing scores ``[T, n]``, in float32 under autocast too: the argmax of close scores is a decision."""
        with torch.autocast(hidden.device.type, enabled=False):
            scores: Tensor = self.routing(hidden.float())
            return scores

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=self._autocasts)


def _at(hidden: Tensor, cells: Tensor) -> Tensor:
    """``[B, L, H]`` at the given cells: ``[T, H]``."""
    return hidden.reshape(-1, hidden.shape[-1])[cells]


def _load_lm(path_or_id: str) -> tuple[PreTrainedModel, torch.dtype]:
    """A causal LM in float32, and the dtype of the stored weights."""
    from transformers import AutoModelForCausalLM

    try:
        lm, info = AutoModelForCausalLM.from_pretrained(
            path_or_id,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelRejected(
            Reason.MODEL_BROKEN, f"{path_or_id!r} cannot be loaded: {first_line(error)}"
        ) from error
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise ModelRejected(Reason.MODEL_BROKEN, f"{path_or_id!r} lacks weights: {', '.join(lacking[:5])}")
    stored_dtype = lm.dtype
    return lm.float(), stored_dtype


def _checkpoint_gradients(lm: PreTrainedModel) -> None:
    settings = {"use_reentrant": False}
    if hasattr(lm, "activation_checkpointing_enable"):
        lm.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:  # the name of older releases, deprecated in newer ones
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _with_adapters(lm: PreTrainedModel, table: LoraTable, seed: int) -> PreTrainedModel:
    """The model with new adapters, the same in every process; all other weights are frozen."""
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise invalid("training.lora", table, "needs peft: install fusionroute[lora]") from None
    modules = table.target_modules
    config = LoraConfig(
        r=table.rank,
        lora_alpha=table.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=table.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by names it is about to drop
        torch.manual_seed(seed)
        return get_peft_model(lm, config)


def _routing_head(hidden_size: int, num_experts: int, values: tuple[Tensor, Tensor] | None) -> nn.Linear:
    head = nn.Linear(hidden_size, num_experts, dtype=torch.float32)
    with torch.no_grad():
        if values is None:
            head.weight.zero_()
            head.bias.zero_()
        else:
            head.weight.copy_(values[0])
            head.bias.copy_(values[1])
    return head
