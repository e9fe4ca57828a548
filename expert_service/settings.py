"""Settings of the expert service."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fusionroute.settings import DaemonSettings, Port, Positive, Seconds

Address = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$")]
WILDCARD_HOSTS = ("0.0.0.0", "::", "[::]")  # noqa: S104 - recognised, not bound


class ExpertSettings(DaemonSettings):
    """One model behind one port."""

    table: ClassVar[str] = "expert"

    model: str = Field(min_length=1, description="Model to serve: a folder or a hub id.")
    slot: Annotated[str, Field(pattern=r"^([a-z0-9_-]{1,32})?$")] = Field(
        default="", description='Slot it fills in the router\'s checkpoint, for example "math".'
    )
    port: Port = Field(default=50061, description="Port to listen on; 0 = any free one.")
    router: Address | None = Field(
        default=None, description="HOST:PORT of a router to register with; absent = register nowhere."
    )
    advertise: Address | None = Field(
        default=None, description="HOST:PORT at which routers reach this expert; absent = where it listens."
    )
    device: Annotated[str, Field(pattern=r"^(cpu|mps|(cuda|xpu)(:[0-9]+)?)$")] = Field(
        default="cpu", description="Device of the model: cpu, cuda, cuda:1, ..."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Number format of the model; auto = that of its weights."
    )
    kv_tokens: Positive = Field(default=65536, description="Tokens for which there is key-value memory.")
    max_batch_tokens: Positive = Field(default=2048, description="Most tokens in one forward.")
    prefill_chunk_tokens: Positive = Field(
        default=512, description="Most tokens of one session in one forward."
    )
    max_queue: Positive = Field(default=256, description="Most steps waiting or running.")
    max_sessions: Positive = Field(default=4096, description="Most sessions cached at a time.")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="Threads of torch; 0 = its own choice.")
    refused_retry_seconds: Seconds = Field(
        default=30.0, description="Pause before registering again after the router refused this expert."
    )

    @model_validator(mode="after")
    def _can_register(self) -> Self:
        if self.router is None:
            return self
        if not self.slot:
            raise ValueError(
                "slot is missing: an expert that registers with a router names the slot it fills"
            )
        if self.advertise is None and self.host in WILDCARD_HOSTS:
            raise ValueError(f"advertise is missing: routers cannot reach host = {self.host!r}")
        return self
