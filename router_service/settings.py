"""Settings of the router service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr

from fusionroute.settings import DaemonSettings, Port, Positive, Seconds


class RouterSettings(DaemonSettings):
    """One router checkpoint, its sessions and its registry behind one port."""

    table: ClassVar[str] = "router"
    other_variables: ClassVar[Mapping[str, str]] = {"REDIS_URL": "redis_url"}

    checkpoint: str = Field(min_length=1, description="Folder of the router checkpoint.")
    port: Port = Field(50050, description="Port to listen on; 0 = any free one.")
    redis_url: SecretStr | None = Field(
        None,
        description="Redis for sessions and registry; also REDIS_URL. Absent = a private server is started.",
    )
    redis_data_dir: Path | None = Field(
        None, description="Where the private Redis keeps sessions across restarts; absent = it keeps nothing."
    )
    device: Annotated[str, Field(pattern=r"^(cpu|mps|(cuda|xpu)(:[0-9]+)?)$")] = Field(
        "cpu", description="Device of the router's model: cpu, cuda, cuda:1, ..."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Number format of the router's model; auto = that of its weights."
    )
    kv_tokens: Positive = Field(65536, description="Tokens for which there is key-value memory.")
    max_batch_tokens: Positive = Field(2048, description="Most tokens in one forward.")
    prefill_chunk_tokens: Positive = Field(512, description="Most tokens of one session in one forward.")
    max_queue: Positive = Field(256, description="Most steps of the router's model waiting or running.")
    max_sessions: Positive = Field(4096, description="Most sessions cached at a time.")
    max_running_turns: Positive = Field(256, description="Most turns written at a time.")
    threads: Annotated[int, Field(ge=0)] = Field(0, description="Threads of torch; 0 = its own choice.")
    expert_timeout_seconds: Seconds = Field(
        60.0, description="How long one row may take, waiting for a restarted expert included."
    )
    alone_seconds: Seconds = Field(
        30.0, description="A turn that nobody has followed for so long is put aside until it is resumed."
    )
    session_ttl_seconds: Seconds = Field(
        86_400.0, description="A session is forgotten so long after its last write."
    )
    session_lease_seconds: Seconds = Field(
        10.0, description="A router that is silent for so long may be replaced as a session's writer."
    )
    expert_lease_seconds: Seconds = Field(
        10.0, description="An expert that is silent for so long leaves the registry."
    )
