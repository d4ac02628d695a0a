"""The situations that anchors need, each replayed with moeflow's simulator; rates are decoded tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from moeflow.sim.surrogate import GRID, localities, surrogate
from moeflow.traces.model_spec import ModelSpec
from moeflow.traces.trace import Trace

HERE = Path(__file__).parent
PROMPT, ANSWER = 512, 192  # tokens of the made-up request, as `sim plan` has it for 48 layers
SETTLING, SETTLED = 512, 128  # a placement fills in answers this long and is measured over the last steps
NEAR = 0.002  # a hit rate this close to the one asked for is that one
CONTEXT = 8192  # tokens of KV cache kept free, the default of `sim plan`

LOCALITIES = {locality.name: locality for locality in localities()}


@dataclass(frozen=True)
class Predicted:
    """A figure, over the localities or recordings that it depends on where there are several; or why there is none."""

    value: float | None
    interval: tuple[float, float] | None = None
    hit: float | None = None
    slots: int | None = None
    why_not: str = ""

    @classmethod
    def none(cls, why: str) -> Predicted:
        return cls(None, why_not=why)

    @classmethod
    def over(cls, middle: float, all_of: Sequence[float]) -> Predicted:
        return cls(middle, (min(all_of), max(all_of)))


def machine(name: str) -> Hardware:
    """A machine of this folder, else a bundled one."""
    own = HERE / f"{name}.yaml"
    return load_hardware(str(own) if own.is_file() else name)


@lru_cache(maxsize=4)
def routing(model: ModelSpec, locality: str = "middle", answer: int = ANSWER) -> Trace:
    """Surrogate routing of one request; `locality` is low, middle or high."""
    return surrogate(model, LOCALITIES[locality], PROMPT, answer)


def all_resident(hardware: Hardware, model: ModelSpec) -> Predicted:
    """Every expert on the device, nothing read back."""
    trace = routing(model)
    steps = recorded_steps(trace)
    duration = resident_steps(trace, model, steps, CostModel(hardware, model))
    return Predicted(float(1e12 / duration[steps.decode].mean()))


def host_layers(hardware: Hardware, model: ModelSpec, on_host: int) -> Predicted:
    """The first `on_host` layers' experts on the host's cores, the others on the device."""
    trace = routing(model)
    slots = (len(model.moe_layers) - on_host) * model.experts
    timing = cpu_layers(trace, recorded_steps(trace), CostModel(hardware, model), slots, None, 0)
    return Predicted(timing.figures()["tokens_per_s"], hit=timing.hit)


def spread(hardware: Hardware, model: ModelSpec, share: float) -> Predicted:
    """`share` of every layer's experts on the device whatever they are, the others on the host's cores."""
    if not share:
        return host_layers(hardware, model, len(model.moe_layers))
    policy = {"cache": {"evict": "placed:Placed"}, "miss": {"kind": "cpu", "promote": model.experts}}
    result = simulate(routing(model, answer=SETTLING), hardware, policy, share, model=model)
    steps = result.measurements.steps
    durations = (steps["end_ps"] - steps["start_ps"])[-SETTLED:]
    held, needed = int((steps["hit"] + steps["late"])[-SETTLED:].sum()), int(steps["needed"][-SETTLED:].sum())
    return Predicted(float(1e12 / durations.mean()), hit=held / needed)


def cache(
    hardware: Hardware, model: ModelSpec, policy: dict[str, Any], slots: int | None = None
) -> tuple[Predicted, Predicted]:
    """Tokens/s and hit rate in % of a cache of so many slots, else of all that the device has room for."""
    size: dict[str, Any] = {"vram": "auto", "max_context": CONTEXT} if slots is None else {"budget": slots}
    results = {name: simulate(routing(model, name), hardware, policy, model=model, **size) for name in LOCALITIES}
    rates = [result["tokens_per_s"] for result in results.values()]
    hits = [100 * result["hit"] for result in results.values()]
    middle = results["middle"]
    return Predicted.over(middle["tokens_per_s"], rates), Predicted.over(100 * middle["hit"], hits)


def cache_at_hit(
    hardware: Hardware, model: ModelSpec, policy: dict[str, Any], hit: float, locality: str = "middle"
) -> Predicted:
    """A cache as large as it takes to reach this hit rate: what is left to predict is the time."""
    trace, curve = routing(model, locality), LOCALITIES[locality].hits
    total = len(model.moe_layers) * model.experts
    about = total * float(np.interp(hit, curve / curve[-1], GRID))
    few, many = int(0.7 * about), min(total, int(1.4 * about))  # slots that hit too little, slots that hit enough
    slots = int(about)
    while many - few > 1:
        result = cached(hardware, model, policy, slots, trace)
        if abs(result["hit"] - hit) < NEAR:
            return Predicted(result["tokens_per_s"], hit=result["hit"], slots=slots)
        few, many = (slots, many) if result["hit"] < hit else (few, slots)
        slots = (few + many) // 2
    raise ValueError(f"no number of slots between {few} and {many} hits {hit:.1%} on {locality} locality")


def cached(hardware: Hardware, model: ModelSpec, policy: dict[str, Any], slots: int, trace: Trace, **more: Any) -> Any:
    """One run with so many slots, on the same machine with memory for any number of them."""
    room = hardware.device.memory_bytes + model.routed_bytes
    roomy = replace(hardware, device=replace(hardware.device, memory_bytes=room))
    return simulate(trace, roomy, policy, slots, model=model, **more)
