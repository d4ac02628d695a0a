"""Fixed placements, whose time is a sum: whole layers copied for each token, or computed by the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import PREFILL, Trace
from .batches import Steps
from .bounds import resident_steps, routed_work
from .cost import Batch, CostModel
from .device import Device

OFFLOAD_BATCH = 32  # llama.cpp: from this many tokens on, experts of host layers are copied, not computed (PR #15346)
BLOCK, LEAST_BLOCKS, DRAWS = 50, 5, 1000  # of the bootstrap


@dataclass(frozen=True)
class Timing:
    """One run's figures over S steps; memory in bytes. `bound`: tokens/s that no exact policy exceeds, or None."""

    decode_ps: NDArray[np.int64]  # [D] duration of each decode step
    tokens: NDArray[np.int64]  # [D]
    request: NDArray[np.int64]  # [D] of the step's first row
    ttft_s: float | None  # median over prompts; None where the trace has none
    wait_share: float
    hit: float
    device_bytes: int
    host_bytes: int
    bound: float | None = None

    @classmethod
    def of(
        cls, trace: Trace, steps: Steps, duration_ps: NDArray[np.int64], wait_ps: NDArray[np.int64], hit: float,
        device_bytes: int, host_bytes: int,
    ) -> Timing:  # fmt: skip
        decode = steps.decode
        first = steps.starts[:-1]
        prompts: dict[int, int] = {}
        for step in np.flatnonzero(~decode).tolist():
            for request in np.unique(trace.request[first[step] : steps.starts[step + 1]]).tolist():
                prompts[request] = prompts.get(request, 0) + int(duration_ps[step])
        ttft = float(np.median(list(prompts.values()))) / 1e12 if (trace.phase == PREFILL).any() else None
        share = int(wait_ps[decode].sum()) / max(1, int(duration_ps[decode].sum()))
        request = trace.request[first].astype(np.int64)[decode]
        return cls(
            duration_ps[decode], steps.tokens[decode], request, ttft, share, float(hit), device_bytes, host_bytes
        )

    def figures(self) -> dict[str, Any]:
        """What a plan says of one run."""
        return {
            "tokens_per_s": float(self.tokens.sum() / self.decode_ps.sum() * 1e12),
            "ttft_s": self.ttft_s,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "wait_share": self.wait_share,
            "hit": self.hit,
            "bound_tokens_per_s": self.bound,
        }

    def interval(self) -> list[float] | None:
        """95 % of tokens/s, bootstrap over requests, over blocks of 50 steps of fewer than 20; None if too short."""
        groups = np.unique(self.request, return_inverse=True)[1]
        if groups.max() < 19:
            groups = np.arange(len(self.decode_ps)) // BLOCK
        count = int(groups.max()) + 1
        if count < LEAST_BLOCKS:
            return None
        draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))
        times = np.bincount(groups, self.decode_ps)[draws].sum(1)
        rates = np.bincount(groups, self.tokens)[draws].sum(1) / times * 1e12
        low, high = np.percentile(rates, [2.5, 97.5])
        return [float(low), float(high)]


def layer_offload(
    trace: Trace, steps: Steps, cost: CostModel, slots: int, in_ram: int | None, fixed_bytes: int
) -> Timing:
    """Layers that do not fit are copied whole for each forward pass, through two layers' worth of slots.

    Perfectly overlapped from pinned memory (what vLLM's prefetch offloading aims at): a step lasts as long as the
    slowest of device, link and SSD. Synchronous hooks (accelerate) take their sum, from pageable memory.
    """
    model = cost.model
    layers = len(model.moe_layers)
    kept = max(0, (slots - 2 * model.experts) // model.experts)
    moved = (layers - kept) * model.experts
    link = (layers - kept) * cost.copy_alpha_ps + moved * cost.copy_ps
    read = 0 if in_ram is None else max(0, moved - in_ram) * cost.read_ps
    resident = resident_steps(trace, model, steps, cost)
    duration = np.maximum(resident, max(link, read))
    held = fixed_bytes + (kept + 2) * model.experts * model.bytes_per_expert
    return Timing.of(trace, steps, duration, duration - resident, kept / layers, held, _host_bytes(cost, moved, in_ram))


def cpu_layers(trace: Trace, steps: Steps, cost: CostModel, slots: int, in_ram: int | None, fixed_bytes: int) -> Timing:
    """Whole layers on the device, the first ones' experts on the host (llama.cpp's `-ncmoe`, KTransformers).

    A decode step's time does not depend on which experts it needs. Batches of 32 tokens and more copy the needed
    experts instead. The device idles while the host computes.
    """
    model = cost.model
    on_host = len(model.moe_layers) - slots // model.experts
    moved = on_host * model.experts
    missing = 0.0 if in_ram is None else max(0, moved - in_ram) / max(1, moved)
    distinct, assignments = routed_work(trace.experts, steps.starts, model.experts)
    duration, wait = np.zeros(len(steps), np.int64), np.zeros(len(steps), np.int64)
    for step, batch in enumerate(steps.batches):
        duration[step], wait[step] = _host_step(cost, batch, distinct[step], assignments[step], on_host, missing)
    decode = steps.decode
    hit = 1 - distinct[decode, :on_host].sum() / max(1, distinct[decode].sum())
    held = fixed_bytes + (len(model.moe_layers) - on_host) * model.experts * model.bytes_per_expert
    return Timing.of(trace, steps, duration, wait, float(hit), held, _host_bytes(cost, moved, in_ram))


def _host_bytes(cost: CostModel, experts: int, in_ram: int | None) -> int:
    return (experts if in_ram is None else min(experts, in_ram)) * cost.model.bytes_per_expert


def _host_step(
    cost: CostModel, batch: Batch, distinct: NDArray[np.int64], assignments: NDArray[np.int64], on_host: int,
    missing: float,
) -> tuple[int, int]:  # fmt: skip
    """(duration, exposed wait) of one step whose first `on_host` MoE layers' experts lie in host memory."""
    model, device, moe, wait = cost.model, Device(cost), 0, 0
    attention, router = cost.attention(batch), cost.router(batch)
    device.run(cost.embed(batch), "", "")
    for layer in range(model.layers):
        device.run(attention, "", "")
        if moe == len(model.moe_layers) or layer != model.moe_layers[moe]:
            device.run(cost.dense(batch), "", "")
            continue
        device.run(router, "", "")
        needed, pairs = int(distinct[moe]), int(assignments[moe])
        if moe < on_host:
            start = device.sync(cost.sync_ps) + cost.submit_ps
            device.host = start
        if model.shared_intermediate:
            device.run(cost.shared(batch), "", "")
        if moe >= on_host:
            if needed:
                device.run(cost.experts(needed, pairs), "", "")
        elif needed:
            read = round(missing * needed * cost.read_ps)
            if batch.tokens < OFFLOAD_BATCH:
                there, back = cost.activations(batch)
                took = needed * cost.host_expert(-(-pairs // needed))
                done = start + there + read + took
                wait += 0 if cost.graph else device.hold_up(done)  # as in `Places.layer`
                wait += device.run(cost.add(batch), "", "", done + back)
            else:
                copied = start + read + cost.copy_alpha_ps + needed * cost.copy_ps
                wait += device.run(cost.experts(needed, pairs), "", "", copied)
        moe += 1
    device.run(cost.head(batch), "", "")
    return device.sync(cost.sync_ps + cost.sample_ps), wait
