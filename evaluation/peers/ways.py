"""The ways to decode that are compared, each as something to call."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from evaluation.bench_reference import CachedFusion
from evaluation.bench_served import ServedStack, request_for
from evaluation.peers.genlm import GenlmProduct
from evaluation.peers.in_process import LogitSum, Prompts, generate, load_for_generate
from fusionroute.v1.router_pb2 import Drafting

LOOKUP_TOKENS = 4


class Combination(Enum):
    """Which models write the text together. Ways with the same one write the same ids."""

    ONE = "e"
    ROUTED = "e + r, routed"
    PAIR = "e + r, one expert"
    PROXY = "base + e - anti"


class Maker(Enum):
    """Who decodes."""

    GENERATE = "HF generate"
    ASSISTED = "HF assisted by the router"
    LOOKUP = "HF prompt lookup"
    CACHED_LOOP = "in-process loop"
    PROXY_LOOP = "proxy-tuning loop"
    GENLM = "genlm-control"
    GENLM_TUNED = "genlm-control, tuned"
    SERVED = "served FusionRoute"
    SERVED_PLAIN = "served, no drafts"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode so many sessions.

    Attributes:
        write: gives the new ids of each session.
    """

    maker: Maker
    combination: Combination
    num_sessions: int
    write: Callable[[], Awaitable[list[list[int]]]]

    @property
    def title(self) -> str:
        """Who decodes what."""
        return f"{self.maker.value}: {self.combination.value}"

    @property
    def name(self) -> str:
        """The title with the number of sessions."""
        return f"{self.title}, {sessions(self.num_sessions)}"


def sessions(number: int) -> str:
    """In words."""
    return "1 session" if number == 1 else f"{number} sessions"


@dataclass(slots=True)
class InProcess:
    """The models in this process: what needs no service, and what the ids of the others are held against."""

    fusion: CachedFusion
    one: Any
    assistant: Any
    pair: LogitSum
    proxy: LogitSum

    @classmethod
    def load(cls, router: str, experts: Mapping[str, str]) -> InProcess:
        """Loads router and experts by slot, at least two; the same weights serve several ways."""
        fusion = CachedFusion.load(router, experts)
        first, second = (each.model for each in fusion.experts[:2])
        slots = list(experts)
        return cls(
            fusion,
            load_for_generate(experts[slots[0]]),
            load_for_generate(router),
            LogitSum((fusion.router.model, first), (1, 1)),
            LogitSum((fusion.router.model, first, second), (1, 1, -1)),
        )

    def ways(self, prompts: Prompts, num_sessions: int, num_tokens: int) -> list[Way]:
        """All of this process for the first so many prompts."""
        used = prompts[:num_sessions]

        def way(maker: Maker, combination: Combination, write: Callable[[], list[list[int]]]) -> Way:
            async def at_once() -> list[list[int]]:
                return write()

            return Way(maker, combination, num_sessions, at_once)

        made = [
            way(Maker.GENERATE, Combination.ONE, lambda: generate(self.one, used, num_tokens)),
            way(Maker.CACHED_LOOP, Combination.PAIR, lambda: self.pair.generate(used, num_tokens)),
            way(Maker.PROXY_LOOP, Combination.PROXY, lambda: self.proxy.generate(used, num_tokens)),
        ]
        if num_sessions == 1:
            helped = {
                Maker.ASSISTED: {"assistant_model": self.assistant},
                Maker.LOOKUP: {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
            }
            made += [
                way(maker, Combination.ONE, lambda by=by: generate(self.one, used, num_tokens, **by))  # type: ignore[misc]  # mypy infers no lambda with a default
                for maker, by in helped.items()
            ]
            made.append(
                way(
                    Maker.CACHED_LOOP,
                    Combination.ROUTED,
                    lambda: [self.fusion.generate(used[0], num_tokens)],
                )
            )
        return made

    def reference(self, prompts: Prompts, num_tokens: int) -> dict[Combination, list[list[int]]]:
        """What the ways shall write, one prompt at a time. Proxy tuning is nobody else's combination."""
        return {
            Combination.ONE: [generate(self.one, [each], num_tokens)[0] for each in prompts],
            Combination.ROUTED: [self.fusion.generate(each, num_tokens) for each in prompts],
            Combination.PAIR: [self.pair.generate([each], num_tokens)[0] for each in prompts],
        }


def genlm_ways(genlm: GenlmProduct, num_sessions: int, num_tokens: int) -> list[Way]:
    """The product of router and first expert, with its settings as they come and with the best for this work."""
    return [
        Way(
            maker,
            Combination.PAIR,
            num_sessions,
            partial(genlm.generate, num_sessions, num_tokens, is_tuned=is_tuned),
        )
        for maker, is_tuned in ((Maker.GENLM, False), (Maker.GENLM_TUNED, True))
    ]


def served_ways(stack: ServedStack, prompts: Prompts, num_sessions: int, num_tokens: int) -> list[Way]:
    """The running stack: by its routes, drafting where it pays and not at all, and with the first expert throughout."""
    first_slot = next(iter(stack.experts))

    def way(
        maker: Maker, combination: Combination, drafting: Drafting.ValueType, fixed_expert: str = ""
    ) -> Way:
        requests = [
            request_for(each, num_tokens, drafting=drafting, fixed_expert=fixed_expert)
            for each in prompts[:num_sessions]
        ]

        async def write() -> list[list[int]]:
            return [turn.ids for turn in await stack.turns(requests)]

        return Way(maker, combination, num_sessions, write)

    return [
        way(Maker.SERVED, Combination.ROUTED, Drafting.DRAFTING_AUTO),
        way(Maker.SERVED_PLAIN, Combination.ROUTED, Drafting.DRAFTING_OFF),
        way(Maker.SERVED, Combination.PAIR, Drafting.DRAFTING_AUTO, first_slot),
    ]
