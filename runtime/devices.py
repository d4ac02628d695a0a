"""Which backend a device gets."""

from __future__ import annotations

import torch

from ..errors import InputError
from .backend import DeviceBackend, HostBackend


def default_device() -> torch.device:
    """The accelerator, if this machine has one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def backend_for(device: torch.device) -> DeviceBackend:
    """Raises InputError for a device that nothing can be copied to."""
    if device.type == "cpu":
        return HostBackend()
    if device.type == "meta":
        raise InputError("the model's experts are on the meta device, without contents: load the model first")
    from .accelerator import AcceleratorBackend
    from .cuda import CudaBackend

    if device.type == "cuda":
        return CudaBackend(device)
    return AcceleratorBackend(device)
