"""`plan`: will expert offloading work for this model on this machine, how, and how far is that from the limit?

Six ways to serve the experts, each with the same device memory. Those whose time depends on which experts a cache
holds are simulated; the others are sums of `sim/cost.py` (`sim/placements.py`). docs/plan.md explains each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..hwprofiles.profile import Hardware, load_hardware
from ..traces.model_spec import ModelSpec
from ..traces.models import load_model_spec
from ..traces.reader import load_trace
from ..traces.trace import DECODE, PREFILL, Trace
from .batches import recorded_steps
from .bounds import resident_steps
from .budget import parse_bytes
from .cost import CostModel
from .placements import Timing, cpu_layers, layer_offload
from .run import price, simulate
from .surrogate import Locality, localities, surrogate

PLAN_FORMAT = 1
PROMPT, ANSWER = 512, 256  # tokens of the surrogate request, chosen here
MOST_LAYER_STEPS = 9216  # decode steps times MoE layers that are simulated per run: seconds, not minutes
RECORDED_ROWS = 1000  # a longer recording contributes its first whole requests
HOPELESS = 1.0  # tokens per second: slower than anybody reads, chosen here
GIB = 2**30

CACHES = {
    "lru": "LRU expert cache",
    "moeflow": "moeflow's cache",
    "split": "split: link + CPU",
}
WAYS = {"resident": "all resident", "layers": "layer offload", "cpu": "CPU experts", **CACHES}


@dataclass(frozen=True)
class Box:
    """What is asked about: a model on a machine with `memory` bytes of device and `ram` of host memory."""

    model: ModelSpec
    hardware: Hardware  # its device has `memory` bytes
    ram: int
    context: int

    @property
    def kv_bytes(self) -> int:
        return self.context * self.model.kv_bytes_per_token

    @property
    def fixed_bytes(self) -> int:
        """Dense weights, workspace and KV cache: what the device holds before any expert."""
        return self.hardware.device.reserve_bytes + self.model.dense_bytes + self.kv_bytes

    @property
    def slots(self) -> int:
        """Experts that fit into what is left, at most all there are."""
        left = self.hardware.device.memory_bytes - self.fixed_bytes
        return min(self.experts, left // self.model.bytes_per_expert)

    @property
    def experts(self) -> int:
        return len(self.model.moe_layers) * self.model.experts

    @property
    def in_ram(self) -> int | None:
        """Experts that host memory holds; None for all."""
        return None if self.ram >= self.model.routed_bytes else self.ram // self.model.bytes_per_expert


@dataclass(frozen=True)
class Plan:
    """`values` is `plan.json`; `box` is what it is about."""

    values: dict[str, Any]
    box: Box

    def row(self, way: str) -> dict[str, Any]:
        """The figures of one way to serve the experts (a key of `WAYS`)."""
        return next(row for row in self.values["rows"] if row["way"] == way)


def make_plan(
    model: ModelSpec | str,
    hw: Hardware | str,
    *,
    vram: str | None = None,
    ram: str | None = None,
    context: int = 8192,
    trace: Trace | str | Path | None = None,
    link: str | None = None,
    storage: str | None = None,
    routing: tuple[Locality, ...] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Plan:
    """Compare every way to serve `model`'s experts on `hw`; what `sim plan` does.

    vram, ram: device and host memory ("24GiB") in place of the profile's. context: tokens of KV cache kept free.
    trace: routing recorded from the model; without one, surrogate routing at three localities, or at those of
    `routing`. progress: told what is being simulated. Raises InputError for anything that cannot be.
    """
    box = _box(model, hw, vram, ram, context, link, storage)
    if trace is None:
        cases = {of.name: _surrogate(box, of) for of in (localities() if routing is None else routing)}
        said = _surrogate_label(cases, localities() if routing is None else routing)
    else:
        recording, said = _recording(box, trace)
        cases = {"recorded": recording}
    rows = [_row(box, way, cases, progress) for way in WAYS]
    values: dict[str, Any] = {
        "format": PLAN_FORMAT,
        "model": box.model.name,
        "hardware": {
            "name": box.hardware.name,
            "link": box.hardware.link.name,
            "storage": box.hardware.storage.name,
            "calibrated": box.hardware.calibrated,
        },
        "routing": said,
        "memory": _memory(box),
        "resident_tokens_per_s": _resident(box, cases.get("middle") or next(iter(cases.values()))),
        "rows": rows,
    }
    runs = [row for row in rows if row["refused"] is None]
    if not runs:
        raise InputError(
            f"no way to serve {box.model.name} on {box.hardware.name} fits: "
            + "; ".join(f"{row['title']}: {row['refused']}" for row in rows)
        )
    values["best"] = max(runs, key=lambda row: row["tokens_per_s"])["way"]
    return Plan(values, box)


def _box(
    model: ModelSpec | str, hw: Hardware | str, vram: str | None, ram: str | None, context: int,
    link: str | None, storage: str | None,
) -> Box:  # fmt: skip
    spec = model if isinstance(model, ModelSpec) else load_model_spec(model)
    hardware = hw if isinstance(hw, Hardware) else load_hardware(hw, link, storage)
    hardware = replace(hardware, near_memory=None)  # no runtime that a plan compares computes there
    if context < 2:
        raise InputError(f"--context {context}: a prompt and an answer take 2 tokens at least; give more, such as 8192")
    if vram is not None:
        hardware = replace(hardware, device=replace(hardware.device, memory_bytes=parse_bytes(vram, "--vram")))
    host = hardware.host.memory_bytes if ram is None else parse_bytes(_with_unit(ram), "--ram")
    box = Box(spec, hardware, host, context)
    if host < spec.bytes_per_expert:
        raise InputError(
            f"--ram {ram if ram is not None else host}: not even one expert of {spec.name} "
            f"({spec.bytes_per_expert / 2**20:.1f} MiB) fits; give the host memory that experts may take, such as 64GiB"
        )
    left = hardware.device.memory_bytes - box.fixed_bytes
    if left < 0:
        raise InputError(
            f"--vram {hardware.device.memory_bytes / GIB:.2f}GiB: {spec.name} needs {box.fixed_bytes / GIB:.2f} GiB "
            f"before any expert (dense weights {spec.dense_bytes / GIB:.2f}, workspace "
            f"{hardware.device.reserve_bytes / GIB:.2f}, KV cache for {context} tokens {box.kv_bytes / GIB:.2f}): "
            "choose a larger device or a smaller --context"
        )
    return box


def _with_unit(size: str) -> str:
    return "0B" if size.strip() == "0" else size


def _surrogate(box: Box, locality: Locality) -> Trace:
    prompt = max(1, min(PROMPT, box.context // 2))
    answer = min(ANSWER, box.context - prompt, max(32, MOST_LAYER_STEPS // len(box.model.moe_layers)))
    return surrogate(box.model, locality, prompt, answer)


def _surrogate_label(cases: dict[str, Trace], chosen: tuple[Locality, ...]) -> dict[str, Any]:
    trace = next(iter(cases.values()))
    prompt = int((trace.phase == PREFILL).sum())
    return {
        "kind": "surrogate",
        "localities": {locality.name: list(locality.sources) for locality in chosen},
        "prompt_tokens": prompt,
        "answer_tokens": trace.rows - prompt,
        "interval": "over three localities measured on recordings of other models; not over the hardware's numbers",
    }


def _recording(box: Box, trace: Trace | str | Path) -> tuple[Trace, dict[str, Any]]:
    loaded = trace if isinstance(trace, Trace) else load_trace(trace)
    name = "in memory" if isinstance(trace, Trace) else Path(trace).name
    price(loaded, box.model, name)
    requests, sizes = np.unique(loaded.request, return_counts=True)
    kept = max(1, int(np.searchsorted(np.cumsum(sizes), RECORDED_ROWS, side="right")))
    part = loaded if kept >= len(requests) else loaded.of_requests(requests[:kept].tolist())
    if not (part.phase == DECODE).any():
        raise InputError(f"trace {name}: its first requests hold no decode rows; a plan is about decoding")
    longest = int(part.position.max()) + 1
    if longest > box.context:
        raise InputError(f"--context {box.context}: trace {name} reaches {longest} tokens; give at least as many")
    prompts = int((part.phase == PREFILL).sum())
    return part, {
        "kind": "recorded",
        "trace": name,
        "recorded_model": loaded.meta.model.name,
        "requests": min(kept, len(requests)),
        "of_requests": len(requests),
        "prompt_tokens": prompts // min(kept, len(requests)),
        "answer_tokens": part.rows - prompts,
        "interval": "95 %, bootstrap over requests or blocks of 50 tokens of this recording; not over the hardware's "
        "numbers",
    }


def _memory(box: Box) -> dict[str, Any]:
    device, model = box.hardware.device, box.model
    return {
        "device_bytes": device.memory_bytes,
        "dense_bytes": model.dense_bytes,
        "kv_bytes": box.kv_bytes,
        "context": box.context,
        "workspace_bytes": device.reserve_bytes,
        "slots": box.slots,
        "experts": box.experts,
        "bytes_per_expert": model.bytes_per_expert,
        "routed_bytes": model.routed_bytes,
        "ram_bytes": box.ram,
        "on_ssd": 0 if box.in_ram is None else box.experts - box.in_ram,
    }


def _row(box: Box, way: str, cases: dict[str, Trace], progress: Callable[[str], None]) -> dict[str, Any]:
    row: dict[str, Any] = {"way": way, "title": WAYS[way], "refused": _refusal(box, way)}
    if row["refused"] is not None:
        return row
    timings = {}
    for case, trace in cases.items():
        progress(f"{WAYS[way]}, {case} locality" if len(cases) > 1 else WAYS[way])
        try:
            timings[case] = _timing(box, way, trace)
        except InputError as error:
            return {**row, "refused": str(error)}
    middle = timings.get("middle") or next(iter(timings.values()))
    row |= middle.figures()
    rates = [timing.figures()["tokens_per_s"] for timing in timings.values()]
    row["interval"] = middle.interval() if "recorded" in timings else [min(rates), max(rates)]
    row["cases"] = {case: timing.figures() for case, timing in timings.items()}
    return row


def _refusal(box: Box, way: str) -> str | None:
    """Why a way is out of the question before anything is simulated."""
    size = box.model.bytes_per_expert
    if way == "resident" and box.slots < box.experts:
        return f"{box.model.routed_bytes / GIB:.1f} GiB of experts, room for {box.slots * size / GIB:.1f}"
    if way != "resident" and box.slots == box.experts:
        return "not needed, all experts fit"
    ring = 2 * box.model.experts
    if way == "layers" and box.slots < ring:
        return f"two layers' experts take {ring * size / GIB:.1f} GiB, room for {box.slots * size / GIB:.1f}"
    return None


def _timing(box: Box, way: str, trace: Trace) -> Timing:
    if way in CACHES:
        return _simulated(box, way, trace)
    if way == "resident":
        return _all_resident(box, trace)
    placed = layer_offload if way == "layers" else cpu_layers
    cost = CostModel(box.hardware, box.model)
    return placed(trace, recorded_steps(trace), cost, box.slots, box.in_ram, box.fixed_bytes)


def _all_resident(box: Box, trace: Trace) -> Timing:
    steps, cost = recorded_steps(trace), CostModel(box.hardware, box.model)
    duration = resident_steps(trace, box.model, steps, cost)
    total = box.fixed_bytes + box.model.routed_bytes
    return Timing.of(trace, steps, duration, np.zeros_like(duration), 1.0, total, 0)


def _resident(box: Box, trace: Trace) -> float:
    """Tokens/s with every expert resident, whether or not they fit."""
    return float(_all_resident(box, trace).figures()["tokens_per_s"])


def _simulated(box: Box, way: str, trace: Trace) -> Timing:
    result = simulate(trace, box.hardware, way, box.slots, ram=f"{box.ram}B", model=box.model)
    measured = result.measurements.steps
    duration: NDArray[np.int64] = measured["end_ps"] - measured["start_ps"]
    slots = result["slots"]["held"] + result["slots"]["scratch"]
    timing = Timing.of(
        trace, result.steps, duration, measured["wait_ps"], result["hit"],
        box.fixed_bytes + slots * box.model.bytes_per_expert, min(box.ram, box.model.routed_bytes),
    )  # fmt: skip
    bounds = result["bounds"]
    return replace(timing, bound=float(1 / bounds["clairvoyant"]["tpot_s"]))
