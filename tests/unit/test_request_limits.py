"""Every field of every request that could be arbitrarily long has a limit, and the refusal is short."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from expert_service import checks
from fusionroute.engine import ModelFacts
from fusionroute.errors import FusionRouteError, InvalidRequest, Reason, StatusCode, invalid
from fusionroute.local_line import LineRefused, check_address
from fusionroute.private_redis import connect
from fusionroute.shared_memory import MemoryRefused, open_memory
from fusionroute.v1 import common_pb2, expert_pb2, registry_pb2, router_pb2, trainer_pb2
from router_service.prompt_scoring import as_turn, read_ways
from router_service.registry_servicer import RegistryServicer
from router_service.registry_store import RegistryStore
from router_service.request_limits import CHARACTERS_PER_TOKEN, MAX_MESSAGES
from router_service.session_store import SessionStore
from router_service.turn_request import read_turn
from tests.unit.test_turn_request import OFFER
from trainer.checkpoint_rpcs import CheckpointRpcs
from trainer.checkpoint_store import CheckpointStore
from trainer.jobs.job_rpcs import JobRpcs
from trainer.jobs.store import JobStore

LONG = "x" * 1_000_000
MANY = 2_000_000
NOBODY = "redis://127.0.0.1:1/0"
"""No limit may be left to Redis: whoever asks it fails."""

CONTEXT = OFFER.max_context_tokens
FACTS = ModelFacts(
    name="m", family="llama", weights_fingerprint="w", tokenizer_fingerprint="t", logits_width=64,
    dtype="float32", max_context_tokens=CONTEXT, epoch=1,
)  # fmt: skip

Call = Callable[[Any], Any]


def generate(request: router_pb2.GenerateRequest) -> None:
    read_turn(request, OFFER)


def score_prompt(request: router_pb2.ScorePromptRequest) -> None:
    read_turn(as_turn(request), OFFER)


def ways(request: router_pb2.ScorePromptRequest) -> None:
    read_ways(request, OFFER)


async def session(request: Any) -> None:
    store = SessionStore(connect(NOBODY), ttl_seconds=1, lease_seconds=1)
    await store.get(request.session_id)


async def delete(request: Any) -> None:
    store = SessionStore(connect(NOBODY), ttl_seconds=1, lease_seconds=1)
    await store.delete(request.session_id)


def registry(method: str) -> Call:
    async def call(request: Any) -> None:
        servicer = RegistryServicer(RegistryStore(connect(NOBODY), lease_seconds=1), lambda slot, model: None)
        await getattr(servicer, method)(request, None)

    return call


def jobs(method: str) -> Call:
    async def call(request: Any) -> None:
        rpcs = JobRpcs(JobStore(connect(NOBODY)), lambda checkpoint_id: pytest.fail("not asked"))
        answer = getattr(rpcs, method)(request, None)
        if hasattr(answer, "__aiter__"):
            await anext(answer)
        else:
            await answer

    return call


def checkpoints(method: str) -> Call:
    async def call(request: Any) -> None:
        store: Any = CheckpointStore(Path("/nowhere"))
        nothing: Any = None
        await getattr(CheckpointRpcs(store, nothing, nothing), method)(request, None)

    return call


def step(request: expert_pb2.StepRequest) -> None:
    checks.check_step(request, FACTS)


def offer(request: expert_pb2.SharedMemoryOffer) -> None:
    """A memory that is refused is no error: rows come in messages."""
    with pytest.raises(MemoryRefused) as refused:
        open_memory(request.name, request.num_bytes, request.proof)
    raise invalid("shared_memory", "", str(refused.value))


def line_address(request: expert_pb2.SharedMemoryOffer) -> None:
    """An address that is refused is no error either."""
    with pytest.raises(LineRefused) as refused:
        check_address(request.line_address)
    raise invalid("line_address", "", str(refused.value))


def score(request: expert_pb2.ScoreRequest) -> None:
    checks.check_score(request, FACTS)


def close(request: expert_pb2.CloseSessionRequest) -> None:
    checks.check_session_id(request.session_id)


def a_registration(**changes: Any) -> registry_pb2.RegisterExpertRequest:
    model = changes.pop("model", common_pb2.ModelIdentity())
    right = {"instance_id": "i", "slot": "math", "address": "h:1", **changes}
    return registry_pb2.RegisterExpertRequest(model=model, **right)


def a_model(**changes: Any) -> registry_pb2.RegisterExpertRequest:
    return a_registration(model=common_pb2.ModelIdentity(**changes))


def sampling(**changes: Any) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(text="w5", sampling=router_pb2.SamplingParameters(**changes))


def constrained(**changes: Any) -> router_pb2.GenerateRequest:
    return sampling(constraint=router_pb2.Constraint(**changes))


def chat(*messages: router_pb2.ChatMessage) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(messages=router_pb2.ChatMessages(messages=messages))


E, R, G, T = expert_pb2, router_pb2, registry_pb2, trainer_pb2
TOO_MUCH: dict[str, tuple[Call, Any]] = {
    "StepRequest.session_id": (step, E.StepRequest(session_id=LONG)),
    "StepRequest.token_ids": (step, E.StepRequest(session_id="s", token_ids=[1] * (CONTEXT + 1))),
    "StepBatchRequest.steps": (
        checks.check_batch,
        E.StepBatchRequest(steps=[E.StepRequest(session_id=str(n)) for n in range(257)]),
    ),
    "DraftChoice.end_ids": (
        step, E.StepRequest(session_id="s", token_ids=[1], draft_tokens=1, draft_choice={"end_ids": range(MANY)})
    ),
    "StepRequest.row_indices": (step, E.StepRequest(session_id="s", token_ids=[1], row_indices=range(MANY))),
    "StepStreamRequest.steps": (
        checks.check_streamed, E.StepStreamRequest(steps=[E.StreamedStep(id=n) for n in range(257)])
    ),
    "StepStreamRequest.cancelled": (
        checks.check_streamed, E.StepStreamRequest(cancelled=range(MANY))
    ),
    "StepStreamRequest.closings": (
        checks.check_streamed, E.StepStreamRequest(closings=[E.CloseSessionRequest(session_id="s")] * 5000)
    ),
    "StreamedStep.request_id": (checks.check_streamed_step, E.StreamedStep(request_id=LONG)),
    "StreamedStep.traceparent": (checks.check_streamed_step, E.StreamedStep(traceparent=LONG)),
    "SharedMemoryOffer.line_address": (line_address, E.SharedMemoryOffer(line_address=LONG)),
    "SharedMemoryOffer.name": (offer, E.SharedMemoryOffer(name=LONG, num_bytes=4096, proof=bytes(32))),
    "SharedMemoryOffer.proof": (
        offer, E.SharedMemoryOffer(name="fusionroute-rows-" + "0" * 32, num_bytes=4096, proof=bytes(MANY))
    ),
    "CloseSessionRequest.session_id": (close, E.CloseSessionRequest(session_id=LONG)),
    "ScoreRequest.sequences": (score, E.ScoreRequest(sequences=[E.TokenSequence()] * 257)),
    "TokenSequence.token_ids": (
        score, E.ScoreRequest(sequences=[E.TokenSequence(token_ids=[1] * (CONTEXT + 2))])
    ),
    "GenerateRequest.session_id": (generate, R.GenerateRequest(text="w5", session_id=LONG)),
    "GenerateRequest.request_id": (generate, R.GenerateRequest(text="w5", request_id=LONG)),
    "GenerateRequest.fixed_expert": (generate, R.GenerateRequest(text="w5", fixed_expert=LONG)),
    "GenerateRequest.text": (generate, R.GenerateRequest(text="x" * (CHARACTERS_PER_TOKEN * CONTEXT + 1))),
    "TokenIds.ids": (generate, R.GenerateRequest(token_ids=R.TokenIds(ids=[1] * MANY))),
    "ChatMessages.messages": (generate, chat(*[R.ChatMessage(role="user")] * (MAX_MESSAGES + 1))),
    "ChatMessage.role": (generate, chat(R.ChatMessage(role=LONG))),
    "ChatMessage.content": (generate, chat(R.ChatMessage(role="user", content=LONG))),
    "SamplingParameters.logit_bias": (generate, sampling(logit_bias=dict.fromkeys(range(2000), 1.0))),
    "SamplingParameters.stop": (generate, sampling(stop=[LONG])),
    "Constraint.json_schema": (generate, constrained(json_schema=LONG)),
    "Constraint.regex": (generate, constrained(regex=LONG)),
    "Constraint.grammar": (generate, constrained(grammar=LONG)),
    "ScorePromptRequest.text": (score_prompt, R.ScorePromptRequest(text="x" * (CHARACTERS_PER_TOKEN * CONTEXT + 1))),
    "ScorePromptRequest.ways": (ways, R.ScorePromptRequest(text="w5", ways=[R.ScoringWay()] * 1000)),
    "ScoringWay.fixed_expert": (ways, R.ScorePromptRequest(text="w5", ways=[R.ScoringWay(fixed_expert=LONG)])),
    "ScorePromptRequest.fixed_expert": (score_prompt, R.ScorePromptRequest(text="w5", fixed_expert=LONG)),
    "ResumeRequest.session_id": (session, R.ResumeRequest(session_id=LONG)),
    "CancelRequest.session_id": (session, R.CancelRequest(session_id=LONG)),
    "GetSessionRequest.session_id": (session, R.GetSessionRequest(session_id=LONG)),
    "DeleteSessionRequest.session_id": (delete, R.DeleteSessionRequest(session_id=LONG)),
    "RegisterExpertRequest.instance_id": (registry("RegisterExpert"), a_registration(instance_id=LONG)),
    "RegisterExpertRequest.slot": (registry("RegisterExpert"), a_registration(slot=LONG)),
    "RegisterExpertRequest.address": (registry("RegisterExpert"), a_registration(address=LONG + ":1")),
    "ModelIdentity.name": (registry("RegisterExpert"), a_model(name=LONG)),
    "ModelIdentity.weights_fingerprint": (registry("RegisterExpert"), a_model(weights_fingerprint=LONG)),
    "ModelIdentity.tokenizer_fingerprint": (registry("RegisterExpert"), a_model(tokenizer_fingerprint=LONG)),
    "ModelIdentity.family": (registry("RegisterExpert"), a_model(family=LONG)),
    "HeartbeatRequest.instance_id": (registry("Heartbeat"), G.HeartbeatRequest(instance_id=LONG)),
    "DeregisterExpertRequest.instance_id": (
        registry("DeregisterExpert"), G.DeregisterExpertRequest(instance_id=LONG)
    ),
    "DrainExpertRequest.instance_id": (registry("DrainExpert"), G.DrainExpertRequest(instance_id=LONG)),
    "SwapExpertsRequest.slot": (registry("SwapExperts"), G.SwapExpertsRequest(slot=LONG)),
    "SwapExpertsRequest.instance_ids": (
        registry("SwapExperts"), G.SwapExpertsRequest(slot="math", instance_ids=["i"] * 1000)
    ),
    "RollbackSwapRequest.slot": (registry("RollbackSwap"), G.RollbackSwapRequest(slot=LONG)),
    "SubmitJobRequest.config": (
        jobs("SubmitJob"), T.SubmitJobRequest(kind=T.JOB_KIND_SFT, config="[" * 1_000_001, idempotency_key="k")
    ),
    "SubmitJobRequest.idempotency_key": (
        jobs("SubmitJob"),
        T.SubmitJobRequest(kind=T.JOB_KIND_PAIRS, config="{}", idempotency_key=LONG),
    ),
    "GetJobRequest.job_id": (jobs("GetJob"), T.GetJobRequest(job_id=LONG)),
    "WatchJobRequest.job_id": (jobs("WatchJob"), T.WatchJobRequest(job_id=LONG)),
    "CancelJobRequest.job_id": (jobs("CancelJob"), T.CancelJobRequest(job_id=LONG)),
    "ResumeJobRequest.job_id": (jobs("ResumeJob"), T.ResumeJobRequest(job_id=LONG)),
    "ReadJobLogRequest.job_id": (jobs("ReadJobLog"), T.ReadJobLogRequest(job_id=LONG)),
    "GetCheckpointRequest.checkpoint_id": (
        checkpoints("GetCheckpoint"), T.GetCheckpointRequest(checkpoint_id=LONG)
    ),
    "PromoteCheckpointRequest.checkpoint_id": (
        checkpoints("PromoteCheckpoint"), T.PromoteCheckpointRequest(checkpoint_id=LONG)
    ),
}  # fmt: skip
"""Field -> who checks it, and a request in which it holds too much."""


def unbounded_fields() -> Iterator[str]:
    """Fields of any size in the requests of all services."""
    seen: set[str] = set()
    waiting: list[Descriptor] = [
        method.input_type
        for module in (expert_pb2, router_pb2, registry_pb2, trainer_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    while waiting:
        message = waiting.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        for field in message.fields:
            is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
            if field.message_type is not None and not is_map:
                waiting.append(field.message_type)
            of_any_size = field.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
            if of_any_size or field.is_repeated:
                yield f"{message.name}.{field.name}"


def test_every_field_of_any_size_is_in_the_table() -> None:
    assert set(unbounded_fields()) == set(TOO_MUCH)


@pytest.mark.parametrize("field", TOO_MUCH)
async def test_too_much_is_refused_shortly_before_anything_is_done_with_it(field: str) -> None:
    call, request = TOO_MUCH[field]
    with pytest.raises(FusionRouteError) as caught:
        answer = call(request)
        if hasattr(answer, "__await__"):
            await answer
    error = caught.value
    assert error.code in (StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE, StatusCode.NOT_FOUND)
    assert error.reason in (Reason.INVALID_FIELD, Reason.CONTEXT_FULL, Reason.JOB_UNKNOWN)
    assert len(error.message) < 1500
    assert sum(len(value) for value in error.metadata.values()) < 1000


@pytest.mark.parametrize("prompt", ["text", "messages"])
def test_the_longest_prompt_that_may_be_tokenised_passes(prompt: str) -> None:
    longest = "x" * (CHARACTERS_PER_TOKEN * CONTEXT)
    generate(
        router_pb2.GenerateRequest(text=longest)
        if prompt == "text"
        else chat(router_pb2.ChatMessage(role="user", content=longest))
    )


def test_nested_brackets_are_the_callers_mistake() -> None:
    from trainer.config import JOBS, JobKind

    with pytest.raises(InvalidRequest, match="config is not valid JSON"):
        JOBS[JobKind.SFT].from_json("[" * 100_000)


def test_what_was_sent_is_not_sent_back() -> None:
    error = invalid("field", LONG, "short")
    assert len(error.message) < 300 and "(1000000 characters)" in error.message
    assert len(invalid("field", [LONG], "short").message) < 500
