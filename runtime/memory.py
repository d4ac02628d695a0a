"""How many experts fit: `budget=`, `vram=` and `ram=` as slots and rows."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from ..policies.budget import parse_bytes, slots_for_budget
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..traces.model_spec import ModelSpec
from .backend import DeviceBackend

WORKSPACE = 1 << 30  # bytes of a device left to activations and to what torch itself takes. Chosen here
CONTEXT = 4096  # tokens of KV cache that `auto` leaves room for when the caller says nothing. Chosen here


def dense_bytes(model: Any) -> int:
    """Bytes of everything in memory that is not an expert."""
    held = [*model.parameters(), *model.buffers()]
    return sum(one.numel() * one.element_size() for one in held if one.device.type != "meta")


def slots_for(
    budget: Any, vram: str | None, max_context: int | None, policy: Policy, spec: ModelSpec, row: int,
    backend: DeviceBackend, dense: int, taken: int,
) -> Slots:  # fmt: skip
    """Slots of `row` bytes on a device with `dense` bytes of weights, whose free memory will lose `taken` bytes.

    budget: as in the simulator, or "auto" for the device's free memory; vram: the whole device, less dense weights.
    Both leave room for workspace and KV cache. Raises InputError for what cannot be.
    """
    if vram is not None and budget != "auto":
        raise InputError("budget= and vram= say the same thing twice: give one of them")
    if vram is None and budget != "auto":
        if max_context is not None:
            raise InputError("max_context= reserves KV cache inside vram= or budget='auto'; leave it out with a budget")
        return slots_for_budget(budget, spec, policy.scope, policy.scratch, row)
    fixed = WORKSPACE + (CONTEXT if max_context is None else max_context) * spec.kv_bytes_per_token
    if vram is None:
        whole, used = backend.free_bytes(), fixed + taken
    else:
        whole, used = parse_bytes(str(vram), "vram="), fixed + dense
    left = whole - used
    if left < 0:
        raise InputError(
            f"{spec.name} needs {used / 2**30:.2f} GiB before any expert, and there are {whole / 2**30:.2f} GiB: "
            "choose a larger device, a smaller max_context=, or ram= to leave experts on disk"
        )
    return slots_for_budget(f"{left}B", spec, policy.scope, policy.scratch, row)


def rows_in_ram(ram: str | None, slots: Slots, spec: ModelSpec, row: int, device: torch.device) -> int | None:
    """Rows of host memory before experts on disk; None: memory holds them all. On a CPU slots are part of `ram`.

    Raises InputError when not even one row fits.
    """
    if ram is None:
        return None
    capacity = parse_bytes(str(ram), "ram=") - (slots.total * row if device.type == "cpu" else 0)
    rows, experts = capacity // row, len(spec.moe_layers) * spec.experts
    if rows >= experts:
        return None
    if rows < 1:
        raise InputError(
            f"ram={ram!r}: not even one expert of {spec.name} ({row} bytes) fits"
            f"{' beside the slots' if device.type == 'cpu' else ''}; give more, or a smaller budget="
        )
    return int(rows)
