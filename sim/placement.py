"""Which of several devices does what: where each layer and each expert is at home, and what each device must hold.

*Layer split*: the layers are cut into contiguous runs, one per device; the cut is the one whose largest run has the
fewest bytes, experts, embedding and LM head included. *Expert parallel*: everything but routed experts is on device
0; expert e of every layer is on device e mod D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..hwprofiles.profile import Hardware
from ..policies.miss_service import MissService
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..traces.model_spec import ModelSpec

PARALLEL = ("layer", "expert")


@dataclass(frozen=True)
class Placement:
    """`home[l]`: device of model layer l. `owner` [MoE layers, experts]: device that computes each expert."""

    devices: int
    home: tuple[int, ...]
    owner: NDArray[np.int64]

    def here(self, device: int) -> NDArray[np.bool_] | None:
        """[MoE layers, experts]: the experts of `device`; None where there is no other device."""
        return None if self.devices == 1 else self.owner == device

    def dense_bytes(self, device: int, model: ModelSpec) -> int:
        """Bytes of what `device` always holds: its layers without routed experts, embedding (first), head (last)."""
        if self.devices == 1:
            return model.dense_bytes
        layers = sum(model.layer_dense_bytes(layer) for layer in range(model.layers) if self.home[layer] == device)
        first, last = device == self.home[0], device == self.home[-1]
        both = first and last and not model.tied_embeddings
        return layers + model.head_bytes * (2 if both else int(first or last))

    def kv_bytes_per_token(self, device: int, model: ModelSpec) -> int:
        """Bytes of KV cache that one token adds on `device`, rounded up."""
        return -(-model.kv_bytes_per_token * self.home.count(device) // model.layers)

    def fixed_bytes(self, device: int, model: ModelSpec, hardware: Hardware, context: int) -> int:
        """Bytes of `device` that no expert may take: workspace, dense weights and the KV cache of `context` tokens."""
        kv = context * self.kv_bytes_per_token(device, model)
        return hardware.device.reserve_bytes + self.dense_bytes(device, model) + kv


def one_device(model: ModelSpec) -> Placement:
    """Everything on device 0."""
    return Placement(1, (0,) * model.layers, np.zeros((len(model.moe_layers), model.experts), np.int64))


def place(model: ModelSpec, devices: int, parallel: str | None) -> Placement:
    """Raises InputError for a way to share that is not known, or for more devices than there is to share."""
    if devices < 1:
        raise InputError(f"--devices {devices}: a run needs at least one device")
    if parallel is not None and parallel not in PARALLEL:
        raise InputError(f"--parallel {parallel!r}: expected {' or '.join(PARALLEL)}")
    if devices == 1:
        if parallel is not None:
            raise InputError(f"--parallel {parallel}: one device shares nothing; give --devices 2 or more")
        return one_device(model)
    moe = len(model.moe_layers)
    if parallel == "expert":
        if devices > model.experts:
            raise InputError(f"--devices {devices}: {model.name} has {model.experts} experts in a layer, one for each")
        return Placement(devices, (0,) * model.layers, np.tile(np.arange(model.experts) % devices, (moe, 1)))
    if devices > moe:
        raise InputError(f"--devices {devices}: {model.name} has {moe} layers with experts, at least one for each")
    home = _cut(model, devices)
    owner = np.array([home[layer] for layer in model.moe_layers], np.int64)
    return Placement(devices, home, np.repeat(owner[:, None], model.experts, axis=1))


def _cut(model: ModelSpec, devices: int) -> tuple[int, ...]:
    """Home of each layer. Runs have at least one MoE layer each; of equally good cuts the earliest is taken."""
    size = [model.layer_dense_bytes(layer) for layer in range(model.layers)]
    for layer in model.moe_layers:
        size[layer] += model.experts * model.bytes_per_expert
    size[0] += model.head_bytes
    size[-1] += model.head_bytes  # tied weights are on both devices
    before = np.concatenate(([0], np.cumsum(size)))
    has_experts = np.concatenate(([0], np.cumsum(np.isin(np.arange(model.layers), model.moe_layers))))
    # largest[n][stop]: bytes of the largest of n runs over the layers before `stop`; and where its last run begins
    largest = [[0 if stop == 0 else np.inf for stop in range(model.layers + 1)]]
    begins: list[list[int]] = [[]]
    for _ in range(devices):
        row, begin = [np.inf] * (model.layers + 1), [0] * (model.layers + 1)
        for stop in range(1, model.layers + 1):
            for start in range(stop):
                if has_experts[stop] > has_experts[start]:
                    worst = max(largest[-1][start], before[stop] - before[start])
                    if worst < row[stop]:
                        row[stop], begin[stop] = worst, start
        largest.append(row)
        begins.append(begin)
    home, stop = [0] * model.layers, model.layers
    for device in range(devices - 1, -1, -1):
        start = begins[device + 1][stop]
        home[start:stop] = [device] * (stop - start)
        stop = start
    return tuple(home)


def part(placement: Placement, device: int, model: ModelSpec) -> ModelSpec:
    """A model with as many MoE layers and experts as `device` has: what its budget is a share of."""
    mine = placement.owner == device
    layers, experts = int(mine.any(axis=1).sum()), int(mine.any(axis=0).sum())
    top_k = min(model.top_k, experts)
    return replace(model, moe_layers=model.moe_layers[:layers], experts=experts, top_k=top_k)


def on_device(placement: Placement, device: int, slots: Slots, scope: str) -> Slots:
    """The slots of a `part` as those of the whole model: none in layers that are another device's."""
    if scope == "global":
        return slots
    mine = (placement.owner == device).any(axis=1)
    shares = np.zeros(len(mine), np.int64)
    shares[mine] = slots.per_scope
    return Slots(tuple(shares.tolist()), slots.scratch)


def device_notes(placement: Placement, model: ModelSpec, hardware: Hardware, given: str) -> list[str]:
    """What a reader must know of a run on several devices."""
    if placement.devices == 1:
        return []
    counts = [int((placement.owner == device).sum()) for device in range(placement.devices)]
    if len(set(placement.home)) == 1:
        how = f"experts dealt out ({', '.join(map(str, counts))}), everything else on device 0"
    else:
        layers = [placement.home.count(device) for device in range(placement.devices)]
        how = f"layers in runs of {', '.join(map(str, layers))}, one batch at a time, so devices take turns"
    path = "device to device" if hardware.link.peer else "through host memory"
    return [f"{placement.devices} devices: {how}; budget {given} on each; hidden states pass {path}"]


def refuse_alone(policy: Policy, hardware: Hardware, devices: int, batching: str = "recorded") -> None:
    """Raises InputError for what only one device can do."""
    if devices == 1:
        return
    if batching == "continuous":
        raise InputError(
            f"--devices {devices}: --batching continuous keeps every request's KV cache on one device; "
            "use one device or recorded steps"
        )
    for asked, why in _alone(policy, hardware):
        if asked:
            raise InputError(f"--devices {devices}: {why}; use one device")


def _alone(policy: Policy, hardware: Hardware) -> list[tuple[Any, str]]:
    service, kind = policy.miss_service(), policy.document["miss"]["kind"]
    return [
        (hardware.device.unified_memory, f"{hardware.name} has one memory for host and device"),
        (hardware.near_memory, "how devices share a near-memory unit is not modelled"),
        (
            policy.document["miss"]["prefill"] != "select",
            f"miss.prefill {policy.document['miss']['prefill']} streams layers to one device",
        ),
        (policy.schedule(), f"a schedule (policy {policy.name}) moves KV caches between batches of one device"),
        (policy.split != "uniform", f"cache.split {policy.split} shares out the slots of one device"),
        (
            type(service).reroute is not MissService.reroute,
            f"miss.kind {kind} changes routing by what one device holds",
        ),
    ]
