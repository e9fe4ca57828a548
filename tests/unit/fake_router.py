"""A router whose every answer is known beforehand: it writes "[8; febj]" and notes what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from fusionroute.v1 import registry_pb2, registry_pb2_grpc, router_pb2, router_pb2_grpc
from fusionroute.v1.registry_pb2 import ExpertEntry, ExpertState
from fusionroute.v1.router_pb2 import CombineRule, FinishReason, GenerationEvent

ANSWER = (("[", "format"), ("8", "math"), ("; ", "format"), ("febj", "strings"), ("]", "format"))
SLOTS = ("math", "strings", "format")


class FakeRouter(router_pb2_grpc.RouterServiceServicer, registry_pb2_grpc.RegistryServiceServicer):
    """Answers as scripted.

    Attributes:
        requests: every Generate request.
        cancelled: sessions for which Cancel was called.
        hold: when set, an answer stops after its second token until the call ends.
        missing: slots that nobody serves.
    """

    def __init__(self) -> None:
        self.requests: list[router_pb2.GenerateRequest] = []
        self.cancelled: list[str] = []
        self.hold = False
        self.holding = threading.Event()
        self.missing: set[str] = set()

    def Generate(  # noqa: N802
        self, request: router_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[router_pb2.GenerateResponse]:
        self.requests.append(request)
        if request.text == "refuse me":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "text = 'refuse me' is not allowed")
        for event in self._events(request):
            yield router_pb2.GenerateResponse(event=event)
            if self.hold and event.token.index == 1:
                self.holding.set()
                ended = threading.Event()
                context.add_callback(ended.set)
                ended.wait(20.0)
                return

    def _events(self, request: router_pb2.GenerateRequest) -> Iterator[GenerationEvent]:
        session_id = request.session_id or "drawn"
        combine = request.combine or CombineRule.COMBINE_RULE_SUM
        yield GenerationEvent(
            started=router_pb2.Started(session_id=session_id, num_prompt_tokens=4, seed=9, combine=combine)
        )
        for index, (text, expert) in enumerate(ANSWER):
            token = router_pb2.Token(index=index, id=index + 10, text=text, expert=expert, logprob=-0.25)
            if request.return_routing_weights:
                token.routing_weights.extend(float(slot == expert) for slot in SLOTS)
            yield GenerationEvent(token=token)
        yield GenerationEvent(
            finished=router_pb2.Finished(
                reason=FinishReason.FINISH_REASON_EOS, num_prompt_tokens=4, num_generated_tokens=len(ANSWER)
            )
        )

    def Cancel(self, request: router_pb2.CancelRequest, context: Any) -> router_pb2.CancelResponse:  # noqa: N802
        self.cancelled.append(request.session_id)
        return router_pb2.CancelResponse(was_running=True)

    def GetRouterInfo(self, request: Any, context: Any) -> router_pb2.GetRouterInfoResponse:  # noqa: N802
        slots = [router_pb2.ExpertSlot(slot=slot, ready=slot not in self.missing) for slot in SLOTS]
        return router_pb2.GetRouterInfoResponse(slots=slots, checkpoint="abc")

    def ListExperts(self, request: Any, context: Any) -> registry_pb2.ListExpertsResponse:  # noqa: N802
        ready = ExpertState.EXPERT_STATE_READY
        entries = [
            ExpertEntry(instance_id=slot, slot=slot, address="127.0.0.1:1", state=ready)
            for slot in SLOTS
            if slot not in self.missing
        ]
        for entry in entries:
            entry.model.epoch = 5
            entry.load.kv_tokens_used, entry.load.kv_tokens_limit = 12, 100
        return registry_pb2.ListExpertsResponse(experts=entries, revision=1)


@contextmanager
def serving(router: FakeRouter) -> Iterator[str]:
    """Serves the fake on a free port; gives host:port."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    router_pb2_grpc.add_RouterServiceServicer_to_server(router, server)
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait(5.0)
