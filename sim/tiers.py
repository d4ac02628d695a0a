"""Where experts rest while no slot holds them: pinned host memory, pageable host memory, SSD.

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

PINNED, PAGEABLE, SSD = range(3)
TIERS = ("pinned", "pageable", "ssd")


def tiers_of(layers: int, experts: int, pinned: int | None, in_ram: int | None) -> NDArray[np.int8]:
    """[layers * experts]: the tier of each. `in_ram` experts rest in host memory (None: all), the first `pinned` of
    them (None: all of them) in pinned memory."""
    tiers = np.full((layers, experts), PINNED, np.int8)
    for tier, first in ((PAGEABLE, pinned), (SSD, in_ram)):
        if first is not None:
            each, extra = divmod(first, layers)
            for layer in range(layers):
                tiers[layer, each + (layer < extra) :] = tier
    return tiers.ravel()


def host_tiers(
    ram: str | None, pinned: str | None, host_memory: str, model: ModelSpec, hardware: Hardware
) -> tuple[int | None, int | None]:
    """(experts in pinned memory, experts in host memory) as `tiers_of` wants them. Raises InputError."""
    if host_memory not in ("pinned", "pageable"):
        raise InputError(f"--host-memory {host_memory!r}: expected pinned or pageable")
    in_ram = _in_ram(ram, model, hardware)
    if pinned is None:
        in_pinned = 0 if host_memory == "pageable" else None
        given = f"--host-memory {host_memory}"
    else:
        if host_memory == "pageable":
            raise InputError(f"--pinned {pinned}: --host-memory pageable pins nothing; give one of them")
        capacity, given = parse_bytes(pinned, "--pinned"), f"--pinned {pinned}"
        memory = hardware.host.memory_bytes if ram is None else parse_bytes(ram, "--ram")
        if capacity > memory:
            raise InputError(f"{given}: more than the {memory / 2**30:.2f} GiB of host memory for experts; lower it")
        in_pinned = None if capacity >= model.routed_bytes else capacity // model.bytes_per_expert
    rest = len(model.moe_layers) * model.experts if in_ram is None else in_ram
    if in_pinned is not None and in_pinned < rest and not hardware.link.h2d.pageable_bandwidth:
        raise InputError(f"{given}: link {hardware.link.name} has no h2d.pageable_bandwidth; add it")
    return in_pinned, in_ram


def _in_ram(ram: str | None, model: ModelSpec, hardware: Hardware) -> int | None:
    """How many experts host memory holds; None for all."""
    capacity = hardware.host.memory_bytes if ram is None else parse_bytes(ram, "--ram")
    experts = capacity // model.bytes_per_expert
    if ram is not None and experts < 1:
        raise InputError(f"--ram {ram}: not even one expert of {model.name} ({model.bytes_per_expert} bytes) fits")
    return None if capacity >= model.routed_bytes else experts
