"""A histogram that counts when somebody looks tells what one tells that counts at once."""

from __future__ import annotations

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from fusionroute.metrics import LATENCY_BUCKETS, MOST_NOTED, NotingHistogram


def test_every_look_tells_what_a_plain_histogram_tells() -> None:
    rng = random.Random(5)
    seen: list[bytes] = []
    of_plain, of_noting = CollectorRegistry(), CollectorRegistry()
    plain = Histogram("seconds", "Some.", ["part"], buckets=LATENCY_BUCKETS, registry=of_plain)
    noting = NotingHistogram("seconds", "Some.", ["part"], buckets=LATENCY_BUCKETS, registry=of_noting)
    for count in (0, 1, 7, MOST_NOTED, 3 * MOST_NOTED + 5):
        for _ in range(count):
            part, seconds = rng.choice(["a", "b"]), rng.choice([0.0, 0.001, 99.0, rng.random()])
            plain.labels(part).observe(seconds)
            noting.labels(part=part).observe(seconds)
        seen.append(_without_time(generate_latest(of_noting)))
        assert seen[-1] == _without_time(generate_latest(of_plain))
    assert len(set(seen)) == len(seen)
    assert of_noting.get_sample_value("seconds_count", {"part": "a"}) == of_plain.get_sample_value(
        "seconds_count", {"part": "a"}
    )


def test_no_more_than_a_few_observations_wait_to_be_counted() -> None:
    noting = NotingHistogram("seconds", "Some.", buckets=LATENCY_BUCKETS, registry=CollectorRegistry())
    for _ in range(10 * MOST_NOTED):
        noting.observe(0.5)
        assert len(noting._noted) < MOST_NOTED


def _without_time(text: bytes) -> bytes:
    return b"\n".join(line for line in text.splitlines() if b"_created" not in line)
