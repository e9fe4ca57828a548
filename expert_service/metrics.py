"""What an expert counts and measures. Values of labels are few: never an id of a session, request or instance."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from fusionroute.metrics import LATENCY_BUCKETS, NotingHistogram

PREFIX = "fusionroute_expert"
REGISTRY = CollectorRegistry()
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

STEPS = Counter(
    f"{PREFIX}_steps",
    "Steps, by outcome: ok, or the reason of the error.",
    ["outcome"],
    registry=REGISTRY,
)
STEPS_OK = STEPS.labels(outcome="ok")
STEP_QUEUE_SECONDS = NotingHistogram(
    f"{PREFIX}_step_queue_seconds",
    "From a step's arrival to its first forward.",
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
STEP_FORWARD_SECONDS = NotingHistogram(
    f"{PREFIX}_step_forward_seconds",
    "What a step spent within forwards.",
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
STEP_BATCH_SESSIONS = NotingHistogram(
    f"{PREFIX}_step_batch_sessions",
    "Most sessions that shared a forward with a step, itself included.",
    buckets=BATCH_BUCKETS,
    registry=REGISTRY,
)
TOKENS = Counter(
    f"{PREFIX}_tokens",
    "Tokens of steps, by kind: computed, or cached (sent although they were known already).",
    ["kind"],
    registry=REGISTRY,
)
COMPUTED_TOKENS = TOKENS.labels(kind="computed")
CACHED_TOKENS = TOKENS.labels(kind="cached")
SCORED_TOKENS = Counter(f"{PREFIX}_scored_tokens", "Tokens of sequences scored.", registry=REGISTRY)
for _outcome in ("QUEUE_FULL", "KV_MEMORY_FULL"):
    STEPS.labels(_outcome)  # seldom; begun at zero so that a rate is seen from the first time on
RELOADS = Counter(
    f"{PREFIX}_reloads", "Reloads of the model, by outcome: done, or why not.", ["outcome"], registry=REGISTRY
)
REGISTRATIONS = Counter(
    f"{PREFIX}_registrations",
    "Attempts to register with a router, by outcome: ok, or the reason of the error.",
    ["outcome"],
    registry=REGISTRY,
)
HEARTBEATS = Counter(
    f"{PREFIX}_heartbeats",
    "Renewals of the lease, by outcome: ok, or the reason of the error.",
    ["outcome"],
    registry=REGISTRY,
)
