"""The key-value memory behind this router: its own engine's and that of the experts that serve."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from router_service.experts import Directory
from router_service.turn_admission import KvBudget


def kv_budget(router_tokens: int, slots: Sequence[str], directory: Directory, overcommit: float) -> KvBudget:
    """What turns may reserve, counting every turn in every model, since any token may be routed to any expert.

    Args:
        router_tokens: for which the router's engine has memory.
        slots: of the checkpoint. One that nobody serves, or whose load is not known yet, does not limit.
        overcommit: reservations may be so many times the memory; what does not fit is evicted and replayed.
    """
    together: defaultdict[str, int] = defaultdict(int)
    largest: defaultdict[str, int] = defaultdict(int)
    for instance in directory.instances.values():
        slot, limit = instance.entry.slot, instance.entry.load.kv_tokens_limit
        if slot in slots and instance.is_ready and limit:
            together[slot] += limit
            largest[slot] = max(largest[slot], limit)
    tokens = min([router_tokens, *together.values()])
    return KvBudget(int(tokens * overcommit), min([router_tokens, *largest.values()]))
