"""What the router counts and measures. Values of labels are few: never an id of a session, request or instance."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from fusionroute.metrics import LATENCY_BUCKETS, NotingHistogram

PREFIX = "fusionroute_router"
REGISTRY = CollectorRegistry()
ROUTER_ITSELF = ""
"""The `slot` of what concerns the router's own model instead of an expert."""

# --- tokens ------------------------------------------------------------------------------------------------------

TOKEN_SECONDS = NotingHistogram(
    f"{PREFIX}_token_seconds",
    "What a token's time goes into: router_forward (the router's own row, its queue included), expert_wait (network,"
    " queue and retries of the expert), expert_forward, fuse, store_wait.",
    ["part"],
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
ROUTER_FORWARD_SECONDS = TOKEN_SECONDS.labels(part="router_forward")
EXPERT_WAIT_SECONDS = TOKEN_SECONDS.labels(part="expert_wait")
EXPERT_FORWARD_SECONDS = TOKEN_SECONDS.labels(part="expert_forward")
FUSE_SECONDS = TOKEN_SECONDS.labels(part="fuse")
STORE_WAIT_SECONDS = TOKEN_SECONDS.labels(part="store_wait")
FIRST_TOKEN_SECONDS = Histogram(
    f"{PREFIX}_first_token_seconds",
    "From the beginning of writing a turn to its first token.",
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)
TOKENS = Counter(
    f"{PREFIX}_tokens",
    "Tokens written, by source (expert, router, ensemble) and the slot of the expert that took part.",
    ["source", "slot"],
    registry=REGISTRY,
)
DEGRADED_TOKENS = Counter(
    f"{PREFIX}_degraded_tokens",
    "Tokens written without the expert that was chosen for them, by its slot and what was done instead"
    " (next_best, router_only).",
    ["slot", "policy"],
    registry=REGISTRY,
)

DRAFTED_TOKENS = Counter(
    f"{PREFIX}_drafted_tokens",
    "Tokens proposed in advance, by drafter (router, expert, lookup) and outcome (accepted, rejected).",
    ["drafter", "outcome"],
    registry=REGISTRY,
)
DRAFT_ROUNDS = Counter(
    f"{PREFIX}_draft_rounds",
    "Times that proposed tokens were checked, by drafter.",
    ["drafter"],
    registry=REGISTRY,
)
EARLY_ASKS = Counter(
    f"{PREFIX}_early_asks",
    "Tokens for which an expert was asked before the router had routed, by outcome (hit, miss).",
    ["outcome"],
    registry=REGISTRY,
)


SHORT_REPLIES = Counter(
    f"{PREFIX}_short_replies",
    "Tokens for which an expert sent its highest logits only, by outcome (certain, whole_row: had to be asked for).",
    ["outcome"],
    registry=REGISTRY,
)


def note_draft(drafter: str, num_drafted: int, num_accepted: int) -> None:
    """A draft was checked."""
    DRAFT_ROUNDS.labels(drafter).inc()
    DRAFTED_TOKENS.labels(drafter, "accepted").inc(num_accepted)
    DRAFTED_TOKENS.labels(drafter, "rejected").inc(num_drafted - num_accepted)


# --- turns -------------------------------------------------------------------------------------------------------

TURNS = Counter(
    f"{PREFIX}_turns",
    "Turns written here that ended here, by outcome (finished, broke_off) and why: finish reason or error's reason.",
    ["outcome", "reason", "rule"],
    registry=REGISTRY,
)
REJECTIONS = Counter(
    f"{PREFIX}_rejections", "Requests refused before anything was written.", ["reason"], registry=REGISTRY
)
TAKEOVERS = Counter(
    f"{PREFIX}_takeovers",
    "Turns that another router had begun and this one went on writing, or tried to.",
    ["outcome"],
    registry=REGISTRY,
)
FOLLOWED_TURNS = Counter(
    f"{PREFIX}_followed_turns",
    "Turns of another router whose stored tokens were streamed from here.",
    registry=REGISTRY,
)

HTTP_SECONDS = Histogram(
    f"{PREFIX}_http_seconds",
    "How long HTTP requests took, streams to their end, by route (other: there is none) and status (499: the client"
    " left).",
    ["route", "status"],
    buckets=LATENCY_BUCKETS,
    registry=REGISTRY,
)

# --- experts -----------------------------------------------------------------------------------------------------

RETRIES = Counter(
    f"{PREFIX}_retries",
    "Rows asked for again, by slot (empty = the router's own model) and why.",
    ["slot", "reason"],
    registry=REGISTRY,
)
REPLAYS = Counter(
    f"{PREFIX}_replays",
    "Sessions sent again because a model's cache was lost, by slot.",
    ["slot"],
    registry=REGISTRY,
)
HEDGES = Counter(
    f"{PREFIX}_hedges",
    "Second replicas asked because the first one was slow, by which one answered first.",
    ["slot", "outcome"],
    registry=REGISTRY,
)
RETRY_BUDGET_EXHAUSTED = Counter(
    f"{PREFIX}_retry_budget_exhausted",
    "Retries put off because the budget of the slot was used up.",
    ["slot"],
    registry=REGISTRY,
)
BREAKER_TRANSITIONS = Counter(
    f"{PREFIX}_breaker_transitions",
    "Changes of an expert instance's circuit breaker, by slot and new state.",
    ["slot", "state"],
    registry=REGISTRY,
)

# --- store and checkpoints ---------------------------------------------------------------------------------------

STORE_RESTORES = Counter(
    f"{PREFIX}_store_restores",
    "Sessions put back into a Redis that had lost them, by outcome.",
    ["outcome"],
    registry=REGISTRY,
)
PROMOTIONS = Counter(
    f"{PREFIX}_promotions",
    "Promoted checkpoints taken up, by outcome (served, refused, failed).",
    ["outcome"],
    registry=REGISTRY,
)


def know(slots: Iterable[str]) -> None:
    """Begins at zero what may happen seldom, so that a rate is seen from the first time on.

    Args:
        slots: of a checkpoint that is served.
    """
    for outcome in ("taken", "forestalled", "failed"):
        TAKEOVERS.labels(outcome)
    for outcome in ("served", "refused", "failed"):
        PROMOTIONS.labels(outcome)
    for reason in ("QUEUE_FULL", "KV_MEMORY_FULL", "DRAINING"):
        REJECTIONS.labels(reason)
    STORE_RESTORES.labels("restored")
    TOKENS.labels("router", ROUTER_ITSELF)
    REPLAYS.labels(ROUTER_ITSELF)
    for slot in slots:
        TOKENS.labels("expert", slot)
        REPLAYS.labels(slot)
        RETRY_BUDGET_EXHAUSTED.labels(slot)
        RETRIES.labels(slot, "EXPERT_UNAVAILABLE")
        for which in ("first", "second"):
            HEDGES.labels(slot, which)
        for policy in ("next_best", "router_only"):
            DEGRADED_TOKENS.labels(slot, policy)
        for state in ("open", "half_open", "closed"):
            BREAKER_TRANSITIONS.labels(slot, state)
