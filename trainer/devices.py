"""Which torch device a setting means."""

from __future__ import annotations


def device_of(setting: str) -> str:
    """The torch device of a `device` setting: "auto" takes the first accelerator there is."""
    if setting != "auto":
        return setting
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type
