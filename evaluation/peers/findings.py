"""What a comparison with peers says: how many times as fast the served stack is, and whether the ids are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.bench_report import Bars, Finding, Report, Table, speed_table
from evaluation.bench_runs import Runs, Spread, ratio
from evaluation.peers.ways import Combination, Maker, Way, sessions

SUITE = "peers"
QUESTION = "How fast is the served stack beside what others offer for the same models?"
AIMS: Mapping[tuple[Maker, bool], float] = {
    (Maker.GENERATE, True): 1.0,
    (Maker.PROXY_LOOP, True): 0.9,
    (Maker.PROXY_LOOP, False): 1.0,
    (Maker.GENLM, True): 5.0,
    (Maker.GENLM, False): 5.0,
    (Maker.GENLM_TUNED, True): 5.0,
    (Maker.GENLM_TUNED, False): 5.0,
}
"""Least tokens per second of the served stack over those of a peer, for one session (True) and for several."""
NOTES = (
    "A ratio is of tokens per second, all sessions together: above 1 the served stack is faster. It is taken within"
    " each round; median, least and most are over the rounds.",
    "Peers that combine the router with the first expert are compared with the stack doing the same; all others with"
    " the stack following its routes.",
    "e: the expert's logits, r: the router's. One expert: the first of the checkpoint throughout.",
    "genlm-control as it comes waits 20 ms for further queries and keeps no keys and values; tuned, it waits for all"
    " sessions and keeps those of the prompts. Those of generated tokens it keeps in neither case.",
    "Ids are held against loops in this process, one prompt at a time. In 16-bit formats texts may differ by rounding.",
)
SERVED = (Maker.SERVED, Maker.SERVED_PLAIN)

Ids = Sequence[Sequence[int]]


def report(
    configuration: Mapping[str, Any],
    ways: Sequence[Way],
    runs: Mapping[str, Runs],
    written: Mapping[str, Ids],
    reference: Mapping[Combination, Ids],
    not_measured: Mapping[Maker, str],
) -> Report:
    """The findings of all runs.

    Args:
        ways: that were measured.
        runs: by the name of the way.
        written: ids of the last run, by the name of the way.
        reference: what ways of a combination shall write.
        not_measured: why, by who is missing.
    """
    missing = tuple(f"Not measured: {maker.value}: {reason}" for maker, reason in not_measured.items())
    shares = _shares(ways, written, reference)
    tables, panels = [], []
    for number in sorted({way.num_sessions for way in ways}):
        of_number = {way.title: runs[way.name] for way in ways if way.num_sessions == number}
        title = sessions(number)
        tables.append(speed_table(title, of_number))
        speeds = {name: Spread.of(each.tokens_per_second) for name, each in of_number.items()}
        panels.append(Bars(title, "tokens / s", speeds))
    return Report(
        SUITE,
        QUESTION,
        configuration,
        (*_ratios(ways, runs), *_same_ids(shares)),
        (*tables, _id_table(shares)),
        panels,
        (*missing, *NOTES),
        {"ways": dict(runs)},
    )


def _ratios(ways: Sequence[Way], runs: Mapping[str, Runs]) -> list[Finding]:
    served = {(way.combination, way.num_sessions): way for way in ways if way.maker is Maker.SERVED}
    found = []
    for peer in ways:
        alike = Combination.PAIR if peer.combination is Combination.PAIR else Combination.ROUTED
        ours = served.get((alike, peer.num_sessions))
        if peer.maker in SERVED or ours is None:
            continue
        value = ratio(runs[ours.name].tokens_per_second, runs[peer.name].tokens_per_second)
        aim = AIMS.get((peer.maker, peer.num_sessions == 1))
        found.append(Finding(f"tokens / s: served / {peer.name}", value, at_least=aim))
    return found


def _shares(
    ways: Sequence[Way], written: Mapping[str, Ids], reference: Mapping[Combination, Ids]
) -> dict[Way, float]:
    """How much of what each way wrote is as in the reference, of 1."""
    known = [way for way in ways if way.combination in reference]
    return {way: equal_share(written[way.name], reference[way.combination]) for way in known}


def _id_table(shares: Mapping[Way, float]) -> Table:
    return Table(
        "Ids as in the reference", ("way", "share"), [[way.name, share] for way, share in shares.items()]
    )


def _same_ids(shares: Mapping[Way, float]) -> list[Finding]:
    """The least share among ways that shall write the same."""
    alike: dict[tuple[Combination, int], list[float]] = {}
    for way, share in shares.items():
        alike.setdefault((way.combination, way.num_sessions), []).append(share)
    return [
        Finding(
            f"ids as in the reference, least of {len(each)} ways: {combination.value}, {sessions(number)}",
            Spread(min(each), min(each), max(each)),
            at_least=1.0,
            unit="share",
        )
        for (combination, number), each in alike.items()
    ]


def equal_share(written: Ids, expected: Ids) -> float:
    """How many of the ids are the expected ones, of 1; the first rows of `expected` count."""
    rows = zip(written, expected[: len(written)], strict=True)
    same = [a == b for row, wanted in rows for a, b in zip(row, wanted, strict=True)]
    return sum(same) / len(same)
