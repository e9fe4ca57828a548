"""A whole stack in one process, over real gRPC and a real Redis: experts can be stopped and started again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from expert_service.bootstrap import running_expert
from expert_service.settings import ExpertSettings
from fusionroute import __version__
from fusionroute.client import RouterClient
from fusionroute.engine import Engine, load_model
from fusionroute.router_model import ExpertRecord, Heads, Manifest, load_checkpoint, save_checkpoint
from fusionroute.v1.router_pb2 import Finished, GenerateRequest, GenerationEvent, Started, Token
from router_service.bootstrap import RunningRouter, load_first, running_router
from router_service.settings import RouterSettings
from tests.chaos.link import Link
from tests.reference import Reference
from tests.tiny_models import WIDTH, save_tiny_model, tiny_model, word_tokenizer

SLOTS = ("math", "strings", "format")


@dataclass(frozen=True)
class Family:
    """Tiny experts and a router checkpoint on disk, with random weights."""

    router: Path
    experts: dict[str, Path]

    def reference(self) -> Reference:
        """The same models as plain Hugging Face models."""
        models = [
            AutoModelForCausalLM.from_pretrained(path) for path in (self.router, *self.experts.values())
        ]
        for model in models:
            model.set_attn_implementation("eager")
        return Reference(models[0].eval(), load_checkpoint(self.router).heads, [m.eval() for m in models[1:]])


def make_family(
    folder: Path,
    slots: tuple[str, ...] = SLOTS,
    *,
    gates: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Family:
    """Experts of three families and a Llama router whose heads switch experts often; by default they know words."""
    families = ("llama", "qwen2", "gemma2")
    experts = {
        slot: save_tiny_model(folder / slot, families[index % 3], seed=10 + index, tokenizer=tokenizer)
        for index, slot in enumerate(slots)
    }
    records = tuple(record_of(slot, path) for slot, path in experts.items())
    return Family(save_router(folder / "router", records, gates=gates, tokenizer=tokenizer), experts)


def record_of(slot: str, path: Path) -> ExpertRecord:
    """An expert as a manifest knows it."""
    facts = load_model(str(path)).facts
    return ExpertRecord(
        slot, slot, facts.tokenizer_fingerprint, facts.logits_width, facts.weights_fingerprint
    )


def save_router(
    folder: Path,
    records: tuple[ExpertRecord, ...],
    *,
    seed: int = 1,
    gates: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **changes: Any,
) -> Path:
    """Writes a router checkpoint with random weights for these experts; `changes` are of its manifest."""
    router, tokenizer = tiny_model("llama", seed=seed), tokenizer or word_tokenizer()
    torch.manual_seed(seed + 4)
    hidden, num_experts = router.config.hidden_size, len(records)
    heads = Heads(torch.randn(num_experts, hidden), torch.zeros(num_experts))
    if gates:
        heads = Heads(
            heads.routing_weight,
            heads.routing_bias,
            torch.randn(num_experts + 1, hidden),
            torch.zeros(num_experts + 1),
            torch.randn(1, hidden) * 0.3,
            torch.zeros(1),
        )
    manifest = Manifest(
        experts=records,
        combine="sum",
        tokenizer_fingerprint=records[0].tokenizer_fingerprint,
        logits_width=WIDTH,
        code_version=__version__,
    )
    save_checkpoint(folder, router, tokenizer, heads, replace(manifest, **changes))
    return folder


@dataclass
class Answer:
    """What a stream brought."""

    started: Started
    tokens: list[Token] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def ids(self) -> list[int]:
        """The generated ids."""
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        """The whole text."""
        assert self.finished is not None
        return "".join(token.text for token in self.tokens) + self.finished.text

    @classmethod
    async def read(cls, events: AsyncIterator[GenerationEvent]) -> Answer:
        """Reads a stream to its end and checks its form."""
        answer: Answer | None = None
        async for event in events:
            match event.WhichOneof("event"):
                case "started":
                    assert answer is None
                    answer = cls(event.started)
                case "token":
                    assert answer is not None and answer.finished is None
                    if answer.tokens:
                        assert event.token.index == answer.tokens[-1].index + 1
                    answer.tokens.append(event.token)
                case "finished":
                    assert answer is not None and answer.finished is None
                    answer.finished = event.finished
        assert answer is not None and answer.finished is not None
        return answer


@dataclass
class Stack:
    """Services that run, and a client."""

    router: RunningRouter
    client: RouterClient
    family: Family
    engines: dict[str, Engine] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)
    _stops: dict[str, AsyncExitStack] = field(default_factory=dict)

    async def start_expert(
        self, slot: str, name: str | None = None, *, linked: bool = False, **changes: Any
    ) -> None:
        """Starts an expert on a free port and waits until the router knows it.

        Args:
            slot: that it fills.
            name: tells several instances of a slot apart; the slot where there is one.
            linked: whether the router reaches it over `links[name]`, which can be slowed and cut.
            changes: of its settings.
        """
        name, serving = name or slot, list[str]()
        stop = AsyncExitStack()
        if linked:
            link = Link(name, lambda: serving[0] if serving else None)
            self.links[name] = await stop.enter_async_context(link)
            changes["advertise"] = link.address
        facts: dict[str, Any] = {
            "model": str(self.family.experts[slot]),
            "slot": slot,
            "port": 0,
            "router": self.router.server.address,
        }
        settings = ExpertSettings(**(facts | changes))
        model = await asyncio.to_thread(load_model, settings.model)
        running = await stop.enter_async_context(running_expert(settings, model))
        serving.append(running.server.address)
        self._stops[name] = stop
        self.engines[name] = running.engine
        async with asyncio.timeout(20):
            while not self._knows(settings.advertise or running.server.address):
                await asyncio.sleep(0.02)

    async def stop_expert(self, name: str) -> None:
        """Stops an expert with its cache."""
        del self.engines[name]
        self.links.pop(name, None)
        await self._stops.pop(name).aclose()

    async def close(self) -> None:
        for name in list(self._stops):
            await self.stop_expert(name)

    async def answer(self, request: GenerateRequest) -> Answer:
        """The whole answer to a request."""
        async with aclosing(self.client.generate(request, 120)) as events:
            return await Answer.read(events)

    async def resume(self, session_id: str, from_token: int = 0) -> Answer:
        """The rest of a session's latest turn."""
        async with aclosing(self.client.resume(session_id, from_token, 120)) as events:
            return await Answer.read(events)

    def _knows(self, address: str) -> bool:
        instances = self.router.directory.instances.values()
        return any(each.entry.address == address and each.gone_since is None for each in instances)


@asynccontextmanager
async def served(
    family: Family, *, experts: dict[str, Any] | None = None, start: bool = True, **router: Any
) -> AsyncIterator[Stack]:
    """A router and its experts within the context.

    Args:
        experts: settings of the experts.
        start: whether the experts are started.
        router: settings of the router.
    """
    settings = RouterSettings(checkpoint=str(family.router), port=0, **router)
    first = await asyncio.to_thread(load_first, settings)
    async with (
        running_router(settings, first) as running,
        RouterClient.open(running.server.address) as client,
    ):
        stack = Stack(running, client, family)
        try:
            if start:
                for slot in family.experts:
                    await stack.start_expert(slot, **(experts or {}))
            yield stack
        finally:
            await stack.close()
