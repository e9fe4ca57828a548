"""Which services are fuzzed, and requests that each of them would serve."""

from __future__ import annotations

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message

from fusionroute.v1 import common_pb2, expert_pb2, registry_pb2, router_pb2

SERVICES: dict[str, ServiceDescriptor] = {
    "router": router_pb2.DESCRIPTOR.services_by_name["RouterService"],
    "registry": registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
    "expert": expert_pb2.DESCRIPTOR.services_by_name["ExpertService"],
}


def valid_requests(service: str, model: common_pb2.ModelIdentity) -> dict[str, Message]:
    """Requests by method. Those of the registry speak of an instance that does not exist."""
    match service:
        case "router":
            prompt = router_pb2.TokenIds(ids=[5, 6, 7])
            sampling = router_pb2.SamplingParameters(max_tokens=4, temperature=0.5, seed=3)
            session = "fuzzed-session"
            return {
                "Generate": router_pb2.GenerateRequest(token_ids=prompt, sampling=sampling),
                "Resume": router_pb2.ResumeRequest(session_id=session),
                "Cancel": router_pb2.CancelRequest(session_id=session),
                "GetSession": router_pb2.GetSessionRequest(session_id=session),
                "DeleteSession": router_pb2.DeleteSessionRequest(session_id=session),
            }
        case "registry":
            ghost, load = "ghost-instance", common_pb2.Load(kv_tokens_limit=100, queue_limit=4)
            return {
                "RegisterExpert": registry_pb2.RegisterExpertRequest(
                    instance_id=ghost, slot="math", address="127.0.0.1:9", model=model, standby=True
                ),
                "Heartbeat": registry_pb2.HeartbeatRequest(instance_id=ghost, load=load),
                "DeregisterExpert": registry_pb2.DeregisterExpertRequest(instance_id=ghost),
                "DrainExpert": registry_pb2.DrainExpertRequest(instance_id=ghost),
            }
    step = expert_pb2.StepRequest(session_id="fuzzed-session", token_ids=[5, 6, 7], num_rows=1)
    drafting = expert_pb2.StepRequest(
        session_id="fuzzed-draft", token_ids=[5, 6], row_indices=[0], draft_tokens=2, top_logits=3,
        draft_choice=expert_pb2.DraftChoice(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=3),
    )  # fmt: skip
    return {
        "Step": step,
        "StepBatch": expert_pb2.StepBatchRequest(steps=[step, step]),
        "StepStream": expert_pb2.StepStreamRequest(
            steps=[
                expert_pb2.StreamedStep(
                    id=number, step=each, timeout_seconds=1.0, shared_offset=64, shared_bytes=64
                )
                for number, each in enumerate((step, drafting))
            ],
            cancelled=[7],
            shared_memory=expert_pb2.SharedMemoryOffer(
                name="fusionroute-rows-" + "0" * 32, num_bytes=4096, proof=bytes(32)
            ),
        ),
        "CloseSession": expert_pb2.CloseSessionRequest(session_id="fuzzed-session"),
        "ListSessions": expert_pb2.ListSessionsRequest(),
        "Score": expert_pb2.ScoreRequest(sequences=[expert_pb2.TokenSequence(token_ids=[5, 6, 7, 8])]),
    }
