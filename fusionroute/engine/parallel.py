"""One model split over several processes, each with a device of its own, by transformers' tensor parallelism.

    process 0   engine -> LeadingModel.forward --+-- its part of the model --> rows
                                order, one frame |      | sums over all parts, inside the forward
    process 1   follow() <-----------------------+-- its part of the model

torchrun starts the processes. Process 0 serves and decides; the others repeat each of its forwards on their part of
the weights and of the caches. If one of them ends, or fails, the model is no more: all end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.kv_cache import KVCache, SessionCache
from fusionroute.engine.model import ForwardOutput, LoadedModel, load_weights, prepare_model
from fusionroute.engine.parallel_cache import NotedCache, repeat
from fusionroute.engine.parallel_link import SECRET_BYTES, FollowerEnd, LeadEnd, PeerLost
from fusionroute.engine.parallel_messages import ForwardOrder, SegmentPlace, pack, unpack
from fusionroute.errors import FusionRouteError, ModelRejected, Reason, Unavailable
from fusionroute.vocabulary import load_tokenizer

JOIN_SECONDS = 120.0
"""How long processes wait for each other to come."""


class LaunchedWrongly(Exception):
    """The processes were not started as `tensor_parallel` says; the text names both numbers."""


@dataclass(frozen=True, slots=True)
class Place:
    """This process among those that share the model, as torchrun has told it."""

    rank: int
    size: int
    local_rank: int
    lead_host: str


def place_from(environment: Mapping[str, str], size: int) -> Place:
    """Where this process stands.

    Args:
        environment: with what torchrun sets.
        size: processes over which the model is to be split.

    Raises:
        LaunchedWrongly: torchrun has started another number of processes, or has not started this one.
    """
    how = f"start it by `torchrun --nproc-per-node {size} --no-python expert-service ...`"
    if "WORLD_SIZE" not in environment:
        raise LaunchedWrongly(f"tensor_parallel = {size}, but torchrun has not started this process: {how}")
    if int(environment["WORLD_SIZE"]) != size:
        raise LaunchedWrongly(
            f"tensor_parallel = {size}, but torchrun has started {environment['WORLD_SIZE']} processes: {how}"
        )
    return Place(
        rank=int(environment["RANK"]),
        size=size,
        local_rank=int(environment["LOCAL_RANK"]),
        lead_host=environment["MASTER_ADDR"],
    )


def this_place(size: int) -> Place:
    """`place_from` of this process's environment."""
    return place_from(os.environ, size)


@contextmanager
def process_group(place: Place, device: str, timeout_seconds: float) -> Iterator[None]:
    """The processes joined for collective operations, gloo on CPUs and NCCL on GPUs.

    Args:
        timeout_seconds: how long one operation may wait for the other processes.

    Raises:
        PeerLost: they have not come.
    """
    kind = torch.device(device).type
    own_device = None
    if kind == "cuda":
        own_device = torch.device(kind, place.local_rank)
        torch.cuda.set_device(own_device)
    try:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            device_id=own_device,
        )
    except (RuntimeError, ValueError) as error:
        raise PeerLost(f"the {place.size} processes have not come together: {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def linked(place: Place, device: str) -> LeadEnd | FollowerEnd:
    """This process's end of the link, connected. Within `process_group`. Raises PeerLost."""
    invitation = torch.zeros(SECRET_BYTES + 4, dtype=torch.uint8)
    if place.rank == 0:
        lead = LeadEnd(place.lead_host, place.size - 1)
        invitation = torch.frombuffer(
            bytearray(lead.secret + lead.port.to_bytes(4, "big")), dtype=torch.uint8
        )
    invitation = invitation.to(torch.device(device).type)
    dist.broadcast(invitation, src=0)
    if place.rank == 0:
        lead.accept(JOIN_SECONDS)
        return lead
    data = invitation.cpu().numpy().tobytes()
    port = int.from_bytes(data[SECRET_BYTES:], "big")
    return FollowerEnd(place.lead_host, port, data[:SECRET_BYTES], place.rank, JOIN_SECONDS)


def load_part(
    path_or_id: str,
    place: Place,
    link: LeadEnd | FollowerEnd,
    *,
    dtype: str,
    device: str,
    timeout_seconds: float,
) -> LoadedModel:
    """This process's part of a model, checked together with the others.

    Args:
        path_or_id, dtype: as `load_model`.
        device: "cpu" or "cuda".
        timeout_seconds: how long the other processes may take to load theirs.

    Raises:
        ModelRejected: as `load_model`; MODEL_UNSUPPORTED also if the model cannot be split so.
        PeerLost: another process has failed.
    """
    model = load_weights(
        path_or_id, dtype, device, check_part=lambda config: check_splittable(config, place.size)
    )
    tokenizer = load_tokenizer(path_or_id)
    link.wait_until_ready(timeout_seconds)
    return prepare_model(model, tokenizer, name=path_or_id)


def check_splittable(config: Any, size: int) -> None:
    """Returns if every process gets whole heads.

    Raises:
        ModelRejected: MODEL_UNSUPPORTED, naming the number that does not fit.
    """
    if not getattr(config, "base_model_tp_plan", None):
        message = f"a model of family {config.model_type!r} has no plan for tensor parallelism"
        raise ModelRejected(Reason.MODEL_UNSUPPORTED, message)
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, field, None)
        if number is not None and number % size:
            message = f"{field} = {number} cannot be split over tensor_parallel = {size} processes"
            raise ModelRejected(Reason.MODEL_UNSUPPORTED, message)


class LeadingModel(LoadedModel):
    """The model as process 0 sees it: a forward here is a forward in every process.

    Args:
        part: this process's part of the model.
        link: to the others.
    """

    def __init__(self, part: LoadedModel, link: LeadEnd) -> None:
        self.model = part.model
        self.tokenizer = part.tokenizer
        self.facts = part.facts
        self.end_ids = part.end_ids
        self._part = part
        self._link = link
        self._caches: NotedCache | None = None

    @property
    def runs_in_any_thread(self) -> bool:
        """False: the others may take longer than what is measured here."""
        return False

    def kv_cache(self) -> KVCache:
        """The caches of the one engine that runs this model."""
        assert self._caches is None, "a split model serves one engine"
        self._caches = NotedCache()
        return self._caches

    def forward(
        self,
        batch: RaggedBatch,
        token_ids: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int],
        *,
        exact: bool = False,
    ) -> ForwardOutput:
        """As `LoadedModel.forward`.

        Raises:
            Unavailable: EXPERT_UNAVAILABLE, another process is gone or this one has failed within the forward; no
                later forward can succeed.
        """
        assert self._caches is not None
        places = [
            SegmentPlace(self._caches.session_of(s.cache), s.past, s.start, s.stop) for s in batch.segments
        ]
        order = ForwardOrder(self._caches.take_calls(), places, token_ids, positions, wanted, exact)
        try:
            self._link.send(pack(order))
            return self._part.forward(batch, token_ids, positions, wanted, exact=exact)
        except FusionRouteError:  # refused before anything was computed, and so by the others
            raise
        except Exception as error:
            self._link.lose(f"a forward has failed in process 0: {type(error).__name__}: {error}")
            raise Unavailable(Reason.EXPERT_UNAVAILABLE, self._link.lost or "") from error


@torch.inference_mode()
def follow(part: LoadedModel, link: FollowerEnd) -> None:
    """Repeats the forwards of process 0 until it says farewell.

    Raises:
        PeerLost: it has ended without one.
        Exception: a forward has failed here; the caller must end this process, and thereby the others.
    """
    caches = part.kv_cache()
    sessions: dict[str, SessionCache] = {}
    while (frame := link.receive()) is not None:
        order = unpack(frame)
        repeat(order.cache_calls, caches, sessions)
        segments = [Segment(sessions[s.session_id], s.past, s.start, s.stop) for s in order.segments]
        try:
            part.forward(
                RaggedBatch(segments), order.token_ids, order.positions, order.wanted, exact=order.exact
            )
        except FusionRouteError:
            continue  # process 0 was refused likewise, and answers so
