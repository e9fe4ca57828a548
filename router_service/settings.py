"""Settings of the router service."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr

from fusionroute.model_settings import ModelSettings
from fusionroute.settings import Port, Positive, Seconds


class RouterSettings(ModelSettings):
    """One router checkpoint, its sessions and its registry behind one port."""

    table: ClassVar[str] = "router"
    other_variables: ClassVar[Mapping[str, str]] = {"REDIS_URL": "redis_url"}

    checkpoint: str = Field(min_length=1, description="Folder of the router checkpoint.")
    checkpoints_dir: Path | None = Field(
        None, description="Folder of published checkpoints; absent = promotions are not followed."
    )
    promotion_poll_seconds: Seconds = Field(
        2.0, description="How often to look which checkpoint is promoted."
    )
    max_checkpoints: Annotated[int, Field(ge=2)] = Field(
        3, description="Most checkpoints in memory: the current one and those with unfinished turns."
    )
    spare_slots: str = Field(
        "",
        pattern=r"^([a-z0-9_-]{1,32}(,[a-z0-9_-]{1,32})*)?$",
        description="Slots, with commas between them, that experts may fill for a checkpoint to come.",
    )
    base_slot: str = Field(
        "",
        pattern=r"^([a-z0-9_-]{1,32})?$",
        description="Slot in which a base model is served beside the experts, for the rule proxy; empty = none.",
    )
    port: Port = Field(50050, description="Port to listen on; 0 = any free one.")
    http_port: Port | None = Field(
        None,
        description="Port for the OpenAI and TGI APIs and the playground; 0 = any free one; absent = none.",
    )
    http_host: str = Field("127.0.0.1", min_length=1, description="Address on which http_port listens.")
    http_max_body_bytes: Annotated[int, Field(ge=1024)] = Field(
        8 * 2**20, description="Largest body of an HTTP request, bytes."
    )
    http_max_new_tokens: Positive = Field(
        2048,
        description="New tokens of a chat request that names no limit; the context's end is one in any case.",
    )
    http_origins: str = Field(
        "",
        pattern=r"^((https?://[^\s,/]+|\*)(,(https?://[^\s,/]+|\*))*)?$",
        description="Origins, with commas between them, whose pages may call HTTP from browsers; * = all.",
    )
    served_name: str = Field(
        "fusionroute",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name of the model in HTTP APIs; SERVED_NAME/SLOT is one expert, SERVED_NAME/router the router.",
    )
    redis_url: SecretStr | None = Field(
        None,
        description="Redis for sessions and registry; also REDIS_URL. Absent = a private server is started.",
    )
    redis_data_dir: Path | None = Field(
        None, description="Where the private Redis keeps sessions across restarts; absent = it keeps nothing."
    )
    max_running_turns: Positive = Field(256, description="Most turns written at a time.")
    max_token_seconds: Seconds | None = Field(
        None,
        description="New turns are refused while the slowest 5 % of tokens take longer; absent = no such limit.",
    )
    kv_overcommit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0,
        description="Turns may reserve so many times the key-value memory; what does not fit is evicted and replayed.",
    )
    expert_timeout_seconds: Seconds = Field(
        60.0, description="How long one row may take, waiting for a restarted expert included."
    )
    expert_attempt_seconds: Seconds = Field(
        5.0,
        description="How long an expert may take to answer a call with one token before the call is made again,"
        " of another instance where there is one; each further token adds 0.02 s.",
    )
    on_expert_unavailable: Literal["wait", "next_best", "router_only", "fail"] = Field(
        "wait", description="What is done while a picked expert is not there, when a request does not say."
    )
    degrade_after_seconds: Seconds = Field(
        1.0,
        description="How long a picked expert may be missed, or silent, before that is done; wait does not use it.",
    )
    hedge_after_seconds: Seconds | None = Field(
        None,
        description="A replica is asked as well when an expert has not answered for so long; absent = never.",
    )
    drafting: Literal["auto", "off", "router", "expert", "lookup"] = Field(
        "auto",
        description="Who proposes tokens for router and experts to check, when a request does not say; auto = whoever"
        " pays, off = nobody. The text does not depend on it.",
    )
    early_asks: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether the last token's expert is asked before the router has routed; auto = where it pays.",
    )
    in_groups: bool = Field(
        True,
        description="Where it is faster, turns go in two groups: the router's forward of one while the experts have the"
        " other.",
    )
    draft_up_to_turns: Annotated[int, Field(ge=0)] = Field(
        64,
        description="With more turns than these at a time, auto drafts nothing and asks nobody early; with fewer it"
        " does where all of them together are measured to be faster.",
    )
    shared_memory_bytes: Annotated[int, Field(ge=0)] = Field(
        32 * 2**20,
        description="Memory in /dev/shm for rows from each expert of the same host and user; 0 = rows come in"
        " messages.",
    )
    local_sockets: bool = Field(
        True,
        description="Where memory is shared, steps and answers go over a Unix socket too, past whatever stands between"
        " router and expert on the network; not to an expert that advertises another address than it listens at.",
    )
    top_logits: Annotated[int, Field(ge=0, le=1024)] = Field(
        0,
        description="Experts of other hosts send so many of a row's highest logits first, and the whole row only where"
        " these leave the token open; 0 = whole rows. The text stays the same, its log-probabilities are not known.",
    )
    alone_seconds: Seconds = Field(
        30.0, description="A turn that nobody has followed for so long is put aside until it is resumed."
    )
    session_ttl_seconds: Seconds = Field(
        86_400.0, description="A session is forgotten so long after its last write."
    )
    one_off_ttl_seconds: Seconds = Field(
        600.0,
        description="The same for a session of which a request has said that no further turn follows: for so long its"
        " answer can be resumed.",
    )
    store_patience_seconds: Seconds = Field(
        60.0, description="How long Redis may be away before running turns break off; they can be resumed."
    )
    session_lease_seconds: Seconds = Field(
        10.0, description="A router that is silent for so long may be replaced as a session's writer."
    )
    expert_lease_seconds: Seconds = Field(
        10.0, description="An expert that is silent for so long leaves the registry."
    )

    def http_origin_names(self) -> tuple[str, ...]:
        """`http_origins` one by one."""
        return tuple(self.http_origins.split(",")) if self.http_origins else ()

    def listening_hosts(self) -> tuple[str, ...]:
        """As of every daemon, and that of HTTP."""
        return (self.host,) if self.http_port is None else (self.host, self.http_host)

    def asks_early(self) -> bool | None:
        """`early_asks`; None = where it pays."""
        return {"auto": None, "on": True, "off": False}[self.early_asks]

    def spare_slot_names(self) -> tuple[str, ...]:
        """`spare_slots` one by one."""
        return tuple(self.spare_slots.split(",")) if self.spare_slots else ()
