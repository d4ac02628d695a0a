"""Where experts rest while no slot holds them: near memory, pinned host memory, pageable host memory, SSD.

How fast an expert can be copied depends on it. What rests where is fixed for a run: the same number of experts in
every layer, lowest ids first in the fastest tier, because nothing is known of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..hwprofiles.profile import Hardware
from ..traces.model_spec import ModelSpec
from .budget import parse_bytes

PINNED, PAGEABLE, SSD, NEAR = range(4)
TIERS = ("pinned", "pageable", "ssd", "near")


def tiers_of(
    layers: int, experts: int, pinned: int | None = None, in_ram: int | None = None, near: int = 0
) -> NDArray[np.int8]:
    """[layers * experts]: the tier of each. The first `near` experts rest in near memory, `in_ram` of the others in
    host memory (None: all), the first `pinned` of those in pinned memory (None: all of them)."""
    tiers = np.full((layers, experts), NEAR, np.int8)
    after = {PINNED: 0, PAGEABLE: pinned, SSD: in_ram}
    for tier, first in after.items():
        if first is not None:
            each, extra = divmod(near + first, layers)
            for layer in range(layers):
                tiers[layer, each + (layer < extra) :] = tier
    return tiers.ravel()


def near_experts(model: ModelSpec, hardware: Hardware) -> int:
    """How many experts the machine's near-memory unit holds; 0 without one."""
    if hardware.near_memory is None:
        return 0
    return min(len(model.moe_layers) * model.experts, hardware.near_memory.capacity_bytes // model.bytes_per_expert)


def host_tiers(
    ram: str | None, pinned: str | None, host_memory: str, model: ModelSpec, hardware: Hardware
) -> tuple[int | None, int | None]:
    """(experts in pinned memory, experts in host memory) as `tiers_of` wants them. Raises InputError."""
    if host_memory not in ("pinned", "pageable"):
        raise InputError(f"--host-memory {host_memory!r}: expected pinned or pageable")
    memory = hardware.host.memory_bytes if ram is None else parse_bytes(ram, "--ram")
    if ram is not None and memory < model.bytes_per_expert:
        raise InputError(f"--ram {ram}: not even one expert of {model.name} ({model.bytes_per_expert} bytes) fits")
    rest = len(model.moe_layers) * model.experts - near_experts(model, hardware)
    in_ram = min(rest, memory // model.bytes_per_expert)
    if pinned is None:
        in_pinned, given = 0 if host_memory == "pageable" else in_ram, f"--host-memory {host_memory}"
    else:
        if host_memory == "pageable":
            raise InputError(f"--pinned {pinned}: --host-memory pageable pins nothing; give one of them")
        capacity, given = parse_bytes(pinned, "--pinned"), f"--pinned {pinned}"
        if capacity > memory:
            raise InputError(f"{given}: more than the {memory / 2**30:.2f} GiB of host memory for experts; lower it")
        in_pinned = min(in_ram, capacity // model.bytes_per_expert)
    if in_pinned < in_ram and not hardware.link.h2d.pageable_bandwidth:
        raise InputError(f"{given}: link {hardware.link.name} has no h2d.pageable_bandwidth; add it")
    return None if in_pinned == in_ram else in_pinned, None if in_ram == rest else in_ram
