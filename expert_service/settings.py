"""Settings of the expert service."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from fusionroute.model_settings import ModelSettings
from fusionroute.settings import Port, Seconds

_ADDRESS = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}"
Address = Annotated[str, Field(pattern=f"^{_ADDRESS}$")]
Addresses = Annotated[str, Field(pattern=f"^{_ADDRESS}(,{_ADDRESS})*$")]
WILDCARD_HOSTS = ("0.0.0.0", "::", "[::]")  # noqa: S104 - recognised, not bound


class ExpertSettings(ModelSettings):
    """One model behind one port."""

    table: ClassVar[str] = "expert"

    model: str = Field(min_length=1, description="Model to serve: a folder or a hub id.")
    slot: Annotated[str, Field(pattern=r"^([a-z0-9_-]{1,32})?$")] = Field(
        default="", description='Slot it fills in the router\'s checkpoint, for example "math".'
    )
    port: Port = Field(default=50061, description="Port to listen on; 0 = any free one.")
    router: Addresses | None = Field(
        default=None,
        description="HOST:PORT of a router to register with, or several of one registry with commas between them, "
        "of which one that answers is used; absent = register nowhere.",
    )
    advertise: Address | None = Field(
        default=None, description="HOST:PORT at which routers reach this expert; absent = where it listens."
    )
    refused_retry_seconds: Seconds = Field(
        default=30.0, description="Pause before registering again after the router refused this expert."
    )

    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1,
        description="Processes over which the model is split, each with a device of its own; torchrun starts so many.",
    )
    peer_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=60.0,
        description="With tensor_parallel: how long a forward may wait for one of the processes before all end.",
    )
    standby: bool = Field(default=False, description="Register without serving, and wait to be swapped in.")
    standby_seconds: Seconds = Field(
        default=900.0, description="An expert on standby that has not been swapped in for so long stops."
    )

    @property
    def is_reached_directly(self) -> bool:
        """Whether routers reach it where it listens, so that, as far as it knows, nothing stands between."""
        return self.advertise is None

    def router_addresses(self) -> tuple[str, ...]:
        """`router` one by one."""
        return tuple(self.router.split(",")) if self.router is not None else ()

    @model_validator(mode="after")
    def _can_be_split(self) -> Self:
        if self.tensor_parallel > 1 and self.device not in ("cpu", "cuda"):
            raise ValueError(
                f"device = {self.device!r} cannot be: with tensor_parallel = {self.tensor_parallel} each process"
                " takes the device of its own rank, so say cpu or cuda"
            )
        return self

    @model_validator(mode="after")
    def _can_register(self) -> Self:
        if self.router is None:
            if self.standby:
                raise ValueError(
                    "router is missing: an expert on standby is swapped in by a router's registry"
                )
            return self
        if not self.slot:
            raise ValueError(
                "slot is missing: an expert that registers with a router names the slot it fills"
            )
        if self.advertise is None and self.host in WILDCARD_HOSTS:
            raise ValueError(f"advertise is missing: routers cannot reach host = {self.host!r}")
        return self
