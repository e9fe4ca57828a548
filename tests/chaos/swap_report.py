"""What swaps under load have shown: every token against the model of the epoch that it names, and the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import AutoModelForCausalLM

from fusionroute.fusion import SeenTokens
from tests.chaos.judge import Judgement
from tests.chaos.load import Stream
from tests.equivalence import FLOAT_MARGIN
from tests.reference import Reference
from tests.served_stack import SLOTS


@dataclass(slots=True)
class SwapsReport:
    """What has come out.

    Attributes:
        flips: for each swap: how many generations in flight had used the slot when the new expert took over.
        num_checked_tokens: of the slot, held against the model of their epoch.
        num_spanning: streams with tokens of more than one epoch of the slot.
    """

    judgement: Judgement
    new_weights: bool
    flips: list[int] = field(default_factory=list)
    num_checked_tokens: int = 0
    num_ties: int = 0
    num_spanning: int = 0
    left_behind: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Nothing is wrong."""
        return self.judgement.passed and not self.left_behind

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True)
class EpochCheck:
    """Holds tokens against the models of their epochs.

    Attributes:
        report: takes the findings.
        plain: the models of the slots that are not swapped.
        models: for each epoch of the slot the models with the one that served then.
        num_checked: most streams whose every token is computed again.
    """

    report: SwapsReport
    slot: str
    plain: Reference
    models: Mapping[int, Reference]
    num_checked: int

    def run(self, streams: Sequence[Stream]) -> None:
        """Every token of the slot is what the model of the epoch it names would choose after the tokens before it."""
        judgement = self.report.judgement
        epochs = {stream.session_id: self._epochs(stream) for stream in streams}
        spanning = [stream for stream in streams if len(epochs[stream.session_id]) > 1]
        self.report.num_spanning = len(spanning)
        if not spanning:
            judgement.fail("no generation was written by more than one epoch")
        if unknown := set[int]().union(*epochs.values()) - self.models.keys():
            judgement.fail(f"tokens name epochs that no swap has reported: {sorted(unknown)}")
        elif self.report.new_weights:
            others = [stream for stream in streams if stream not in spanning]
            for stream in [*spanning, *others][: self.num_checked]:
                self._check(stream)

    def _check(self, stream: Stream) -> None:
        case = stream.case
        tokens, seen = list(case.prompt), SeenTokens(case.prompt)
        for token in stream.tokens:
            models = self.models[token.expert_epoch] if token.expert == self.slot else self.plain
            wanted = models.next_token(tokens, case.rule, case.sampling, seen)
            self.report.num_checked_tokens += token.expert == self.slot
            if wanted.id != token.id and wanted.margin < FLOAT_MARGIN:
                self.report.num_ties += 1
            elif wanted.id != token.id or abs(wanted.logprob - token.logprob) > 1e-3:
                self.report.judgement.fail(
                    f"{stream.session_id}: token {token.index} is {token.id} ({token.logprob:.3f}), the model of"
                    f" epoch {token.expert_epoch} of {token.expert} says {wanted.id} ({wanted.logprob:.3f})"
                )
                return
            tokens.append(token.id)
            seen.add(token.id)

    def _epochs(self, stream: Stream) -> set[int]:
        return {token.expert_epoch for token in stream.tokens if token.expert == self.slot}


def with_expert(reference: Reference, slot: str, folder: str) -> Reference:
    """The same models with another one in a slot."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_attn_implementation("eager")
    place = SLOTS.index(slot)
    return replace(
        reference, experts=[*reference.experts[:place], model.eval(), *reference.experts[place + 1 :]]
    )


def summary(report: SwapsReport) -> Sequence[str]:
    """For people."""
    judgement, flips = report.judgement, report.flips
    lines = [
        f"{len(flips)} swaps with {'new' if report.new_weights else 'equal'} weights, at each"
        f" {min(flips, default=0)} to {max(flips, default=0)} generations in flight that had used the slot",
        f"{judgement.num_generations} generations: {judgement.num_complete} complete,"
        f" {judgement.num_broken} with missing or repeated tokens,"
        f" {judgement.num_epochs_back} with an epoch that went back, {report.num_spanning} written across a swap",
        f"longest pause {judgement.longest_pause_seconds:.2f} s, {judgement.num_replays} replays,"
        f" {report.seconds:.0f} s in all",
    ]
    if report.new_weights:
        lines.append(
            f"{report.num_checked_tokens} tokens of the slot were held against the model of their epoch,"
            f" {report.num_ties} float ties"
        )
    else:
        lines.append(f"{judgement.num_equal} with the undisturbed ids, {judgement.num_ties} float ties")
    lines += [f"problem: {problem}" for problem in judgement.problems[:10]]
    lines += [f"left behind: {remains}" for remains in report.left_behind]
    lines.append("passed" if report.passed else "FAILED")
    return lines
