"""Results brought from the device to the host's memory."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopies:
    """Copies from one device; on CUDA into pinned memory, on a stream of their own.

    A copy then waits for the forward that made its source and for nothing that was queued later, and runs at the full
    speed of the link. Elsewhere it is torch's plain copy, and of what is on the host already, none.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def take(self, *sources: Tensor) -> list[Tensor]:
        """The tensors on the host, complete when this returns."""
        if self._stream is None:
            return [source.to("cpu") for source in sources]
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            copies = [self._started(source) for source in sources]
        self._stream.synchronize()
        return copies

    def _started(self, source: Tensor) -> Tensor:
        assert self._stream is not None
        copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        copy.copy_(source, non_blocking=True)
        source.record_stream(self._stream)
        return copy
