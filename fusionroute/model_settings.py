"""What every daemon that runs a model has: settings of its engine, and torch made ready for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fusionroute.settings import DaemonSettings, Positive

if TYPE_CHECKING:
    from fusionroute.engine import EngineLimits


class ModelSettings(DaemonSettings):
    """A daemon with one model behind one engine."""

    device: Annotated[str, Field(pattern=r"^(cpu|mps|(cuda|xpu)(:[0-9]+)?)$")] = Field(
        "cpu", description="Device of the model: cpu, cuda, cuda:1, ..."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="Number format of the model; auto = that of its weights."
    )
    kv_tokens: Positive = Field(65536, description="Tokens for which there is key-value memory.")
    max_batch_tokens: Positive = Field(2048, description="Most tokens in one forward.")
    prefill_chunk_tokens: Positive = Field(512, description="Most tokens of one session in one forward.")
    mixed_forward_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        0.05, description="How long a forward may take, roughly, that prefills share with decoding sessions."
    )
    max_queue: Positive = Field(256, description="Most steps waiting or running.")
    max_sessions: Positive = Field(4096, description="Most sessions cached at a time.")
    share_prefixes: bool = Field(
        True,
        description="Sessions that begin alike share memory and work of what they have in common. The time to a first"
        " token then tells whether somebody has used the same beginning.",
    )
    await_others: bool = Field(
        True,
        description="A forward is put off for a moment when sessions that were just answered are about to step again.",
    )
    threads: Annotated[int, Field(ge=0)] = Field(0, description="Threads of torch; 0 = its own choice.")

    def engine_limits(self) -> EngineLimits:
        """What the engine may use."""
        from fusionroute.engine import EngineLimits

        return EngineLimits(
            kv_tokens=self.kv_tokens,
            max_batch_tokens=self.max_batch_tokens,
            prefill_chunk_tokens=self.prefill_chunk_tokens,
            mixed_forward_seconds=self.mixed_forward_seconds,
            max_queue=self.max_queue,
            max_sessions=self.max_sessions,
            share_prefixes=self.share_prefixes,
            await_others=self.await_others,
        )


class DeviceMissing(Exception):
    """The device cannot be used; the message names it."""


def prepare_torch(settings: ModelSettings) -> None:
    """Sets torch's threads and tries the device, before anything slow is done.

    Raises:
        DeviceMissing: naming the device.
    """
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, depending on how it was built
        raise DeviceMissing(f"device = {settings.device!r} cannot be used: {error}") from error
