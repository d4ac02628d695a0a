"""The situations that anchors need, each replayed with moeflow's simulator; rates are decode tokens per second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from moeflow.hwprofiles.profile import Hardware, load_hardware
from moeflow.sim.batches import recorded_steps
from moeflow.sim.bounds import resident_steps
from moeflow.sim.cost import CostModel
from moeflow.sim.placements import cpu_layers
from moeflow.sim.run import simulate
from moeflow.sim.surrogate import Locality, localities, surrogate
from moeflow.traces.model_spec import ModelSpec
from moeflow.traces.trace import Trace

HERE = Path(__file__).parent
PROMPT, ANSWER = 512, 192  # tokens; `sim plan` simulates as many for 48 layers
SETTLED = 128  # decode steps at the end of a run of SETTLING over which a placement is measured
SETTLING = 512
NEAR = 0.002  # a hit rate this close to the one asked for is that one

LOW, MIDDLE, HIGH = localities()


@dataclass(frozen=True)
class Rate:
    """Decode tokens/s at middle locality, and over the three localities where they matter; hit likewise."""

    middle: float
    interval: tuple[float, float] | None = None
    hit: float | None = None
    hits: tuple[float, float] | None = None


def machine(name: str) -> Hardware:
    """A machine of this folder, else a bundled one."""
    own = HERE / f"{name}.yaml"
    return load_hardware(str(own) if own.is_file() else name)


@lru_cache(maxsize=4)
def routing(model: ModelSpec, locality: str = "middle", answer: int = ANSWER) -> Trace:
    """Surrogate routing of one request."""
    of: Locality = {"low": LOW, "middle": MIDDLE, "high": HIGH}[locality]
    return surrogate(model, of, PROMPT, answer)


def all_resident(hardware: Hardware, model: ModelSpec) -> Rate:
    """Every expert on the device, nothing read back."""
    trace = routing(model)
    steps = recorded_steps(trace)
    duration = resident_steps(trace, model, steps, CostModel(hardware, model))
    return Rate(float(1e12 / duration[steps.decode].mean()))


def host_layers(hardware: Hardware, model: ModelSpec, on_host: int) -> Rate:
    """The first `on_host` layers' experts on the host's cores, the others on the device."""
    trace = routing(model)
    slots = (len(model.moe_layers) - on_host) * model.experts
    timing = cpu_layers(trace, recorded_steps(trace), CostModel(hardware, model), slots, None, 0)
    return Rate(timing.figures()["tokens_per_s"], hit=timing.hit)


def spread(hardware: Hardware, model: ModelSpec, share: float) -> Rate:
    """`share` of every layer's experts on the device whatever they are, the others on the host's cores."""
    if not share:
        return host_layers(hardware, model, len(model.moe_layers))
    policy = {"cache": {"evict": "placed:Placed"}, "miss": {"kind": "cpu", "promote": model.experts}}
    result = simulate(routing(model, answer=SETTLING), hardware, policy, share, model=model)
    steps = result.measurements.steps
    durations = (steps["end_ps"] - steps["start_ps"])[-SETTLED:]
    hits, needed = int((steps["hit"] + steps["late"])[-SETTLED:].sum()), int(steps["needed"][-SETTLED:].sum())
    return Rate(float(1e12 / durations.mean()), hit=hits / needed)


def cache(
    hardware: Hardware, model: ModelSpec, policy: dict[str, Any], *, slots: int | None = None, context: int = 8192
) -> Rate:
    """A cache of so many slots, or of all that the device has left beside `context` tokens, at three localities."""
    size: dict[str, Any] = {"budget": slots} if slots is not None else {"vram": "auto", "max_context": context}
    results = {
        name: simulate(routing(model, name), hardware, policy, model=model, **size)
        for name in ("low", "middle", "high")
    }
    rates = [result["tokens_per_s"] for result in results.values()]
    hits = [result["hit"] for result in results.values()]
    return Rate(
        results["middle"]["tokens_per_s"], (min(rates), max(rates)), results["middle"]["hit"], (min(hits), max(hits))
    )


def cache_at_hit(
    hardware: Hardware, model: ModelSpec, policy: dict[str, Any], hit: float, locality: str = "middle"
) -> Rate:
    """The same cache, as large as it takes to reach this hit rate: what is left to predict is the time."""
    trace = routing(model, locality)
    total = len(model.moe_layers) * model.experts
    low, high = 0, total  # slots that hit too little, slots that hit enough
    roomy = with_memory(hardware, model)
    while True:
        result = simulate(trace, roomy, policy, (low + high) // 2, model=model)
        if abs(result["hit"] - hit) < NEAR or high - low < 2:
            return Rate(result["tokens_per_s"], hit=result["hit"])
        low, high = ((low + high) // 2, high) if result["hit"] < hit else (low, (low + high) // 2)


def with_memory(hardware: Hardware, model: ModelSpec) -> Hardware:
    """The same machine with room for everything: whether a hit rate's slots fit is not the question then."""
    from dataclasses import replace

    room = hardware.device.memory_bytes + model.routed_bytes + model.dense_bytes
    return replace(hardware, device=replace(hardware.device, memory_bytes=room))


def coverage(popularity: np.ndarray, share: float) -> float:
    return float(np.interp(share, np.linspace(0, 1, len(popularity)), popularity))
