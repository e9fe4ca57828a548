"""The lab's systems: what each makes of every question of a seed, from what routers and models were heard to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.findings import SystemNote
from evaluation.judged import JudgedText, best_expert_each_token, first_choice, some_expert
from evaluation.lab.collab import COLLAB
from evaluation.lab.collab import NOTE as COLLAB_NOTE
from evaluation.lab.plan import CDPO, SFT
from evaluation.questions import Answer, Outcome, Question, Verdict
from evaluation.systems.ways import GATED, ROUTING_ONLY, SUM, Way, expert_ways

Judged = Mapping[str, JudgedText]
"""By question id."""

FUSIONROUTE = f"{CDPO}/{SUM.name}"
"""What the paper proposes: the plain sum after both phases."""

LABELS = {
    SFT: "after SFT",
    CDPO: "after CDPO",
    "sft_continued": "after more SFT, no pairs",
    "cdpo_bias0": "after plain DPO (bias 0)",
    "cdpo_normalised": "after CDPO, reading B",
    "cdpo_mean_bias": "after CDPO, bias per token",
    "cdpo_frozen_routes": "after CDPO, routes frozen",
    "cdpo_pairs_only": "after CDPO, pairs alone",
    "cdpo_expert_pairs": "after CDPO, pairs from experts",
    "sft_all_gold": "after SFT on all gold answers",
    "sft_all_tokens": "after SFT, routing loss on all tokens",
    "sft_from_base": "after SFT from the base",
    "merge_average": "merged: weight average",
    "merge_task_0.5": "merged: task arithmetic 0.5",
    "merge_task_1.0": "merged: task arithmetic 1.0",
    "merge_dare": "merged: DARE, drop 0.5, scale 0.5",
    "merge_ties": "merged: TIES, density 0.2",
    "single_dpo": "fine-tuned single model, then DPO",
}
SINGLE_NOTE = "the same gold answers as the router, no experts; knows what its start knows"


@dataclass(frozen=True, slots=True)
class SeedRecords:
    """What was heard of one seed's models.

    Attributes:
        routers: what each router checkpoint's ways say, by the checkpoint's name, then by question.
        models: the same of models that were asked alone.
        written: answers that were really written, by system, then by question.
        entropies: of the routing weights at each of their tokens, in nats; empty where nothing was routed.
        slots: of the experts.
        unjudged: answers of systems that only write, by system, then by question.
    """

    seed: int
    slots: tuple[str, ...]
    routers: Mapping[str, Judged]
    models: Mapping[str, Judged] = field(default_factory=dict)
    written: Mapping[str, Mapping[str, tuple[Answer, Verdict]]] = field(default_factory=dict)
    entropies: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    unjudged: Mapping[str, Mapping[str, tuple[Answer, Verdict]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SystemAnswers:
    """A system with its answers of one seed, by question id."""

    note: SystemNote
    answers: Mapping[str, tuple[Answer, Verdict]]

    def outcomes(self, questions: Mapping[str, Question], seed: int) -> Iterator[Outcome]:
        """One for each of its answers."""
        for id_, (answer, verdict) in self.answers.items():
            yield Outcome(questions[id_], self.note.name, seed, answer, verdict)


def systems_of(records: SeedRecords, questions: Mapping[str, Question]) -> Iterator[SystemAnswers]:
    """Every system of one seed, in the order of the tables."""
    experts = expert_ways(records.slots)
    by_slot = dict(zip(records.slots, experts, strict=True))
    first = records.routers[SFT]
    names = {way.name for way in experts}
    for way in experts:
        yield _of_way(first, way, questions)
    yield from _selections(records, experts, by_slot)
    if COLLAB in records.unjudged:
        yield SystemAnswers(COLLAB_NOTE, records.unjudged[COLLAB])
    for checkpoint, judged in records.routers.items():
        heard = next(iter(judged.values())).opinions
        for name in heard:
            if name not in names:
                yield _of_way(judged, _way(name).of(checkpoint, LABELS[checkpoint]), questions, name)
    for name, judged in records.models.items():
        yield _of_model(name, judged, questions)


def _selections(
    records: SeedRecords, experts: Sequence[Way], by_slot: Mapping[str, Way]
) -> Iterator[SystemAnswers]:
    judged = records.routers[SFT]

    def chosen(name: str, label: str, note: str, verdicts: Mapping[str, Verdict]) -> SystemAnswers:
        kind = "forced" if name == "oracle/token" else "selection"
        answers = {id_: (Answer("", verdict.is_right), verdict) for id_, verdict in verdicts.items()}
        return SystemAnswers(SystemNote(name, label, kind, note), answers)

    yield chosen(
        "select/first",
        "whole answers: router's first choice",
        "the expert that the router of phase I picks for the first token writes all of the answer",
        {id_: first_choice(each, ROUTING_ONLY, by_slot) for id_, each in judged.items()},
    )
    likely = _by_likelihood(records, experts)
    if likely:
        yield chosen(
            "select/likelihood",
            "whole answers: most likely one",
            "of the experts' own answers the one with the highest mean log-probability; fewer questions",
            likely,
        )
    yield chosen(
        "select/oracle",
        "whole answers: oracle",
        "right if any expert alone is right",
        {id_: some_expert(each, experts) for id_, each in judged.items()},
    )
    yield chosen(
        "oracle/token",
        "oracle routing, token by token",
        "at each token of the gold answer the expert that finds it most probable; right if that writes it",
        {id_: best_expert_each_token(each, experts) for id_, each in judged.items()},
    )


def _by_likelihood(records: SeedRecords, experts: Sequence[Way]) -> dict[str, Verdict]:
    answers = [records.written.get(way.name, {}) for way in experts]
    found = {}
    for id_ in answers[0]:
        candidates = [each[id_] for each in answers if id_ in each]
        if len(candidates) == len(experts):
            found[id_] = max(candidates, key=lambda each: _mean_logprob(each[0]))[1]
    return found


def _mean_logprob(answer: Answer) -> float:
    return -float("inf") if answer.logprob is None else answer.logprob / max(1, answer.num_tokens)


def _of_way(
    judged: Judged, way: Way, questions: Mapping[str, Question], name: str | None = None
) -> SystemAnswers:
    heard = name or way.name
    answers = {
        id_: (each.answer(heard, questions[id_].reference), each.verdict(heard))
        for id_, each in judged.items()
    }
    return SystemAnswers(way.system(), answers)


def _of_model(name: str, judged: Judged, questions: Mapping[str, Question]) -> SystemAnswers:
    start = name.rpartition("_from_")[2]
    if name.startswith("single_all_gold_from_"):
        label, note = f"fine-tuned single model from {start}, all gold", SINGLE_NOTE
    elif name.startswith("single_from_"):
        label, note = f"fine-tuned single model from {start}", SINGLE_NOTE
    else:
        label, note = LABELS[name], ""
    answers = {
        id_: (each.answer(name, questions[id_].reference), each.verdict(name)) for id_, each in judged.items()
    }
    return SystemAnswers(SystemNote(name, label, "model", note), answers)


_PLAIN = {way.name: way for way in (ROUTING_ONLY, SUM, *GATED)}


def _way(name: str) -> Way:
    from evaluation.systems.ways import ENSEMBLE, PROXY, RANDOM, ROUTER_ALONE, fixed_ways

    known = _PLAIN | {way.name: way for way in (ENSEMBLE, PROXY, RANDOM, ROUTER_ALONE)}
    if name in known:
        return known[name]
    slot = name.removeprefix("fixed/")
    return fixed_ways([slot])[0]
