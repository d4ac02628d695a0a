"""From measurements to the figures that every run reports (DESIGN section 3). SI units, stable names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.future import future_of
from ..policies.residency import Residency, Slots
from ..traces.trace import REJECTED, Trace
from .batches import Steps
from .bounds import clairvoyant, resident_steps
from .cost import CostModel, seconds
from .device_bounds import clairvoyant_on, resident_steps_on
from .events import Setup
from .measurements import Measurements
from .per_request import first_tokens, per_request
from .placement import Placement, one_device
from .serving import served
from .tiers import TIERS

RESULT_FORMAT = 1


@dataclass(frozen=True)
class Result:
    """One run. `values` is `result.json`; top-level rates are of decode steps (prefill where there are none)."""

    values: dict[str, Any]
    measurements: Measurements
    steps: Steps
    resident_ps: NDArray[np.int64] = field(repr=False)  # [S]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def to_json(self) -> str:
        """Pretty JSON, the same bytes for the same run; the per-request table has a line per column."""
        columns = {name: f"\0{name}\0" for name in self.values["per_request"]}
        text = json.dumps({**self.values, "per_request": columns}, indent=2, ensure_ascii=False)
        for name, values in self.values["per_request"].items():
            text = text.replace(json.dumps(columns[name]), json.dumps(values))
        return text + "\n"


def make_result(setup: Setup, steps: Steps, cost: CostModel, measured: Measurements, labels: dict[str, Any]) -> Result:
    """`labels` are the fields that say what was run; they come first, in their order."""
    trace, placement = setup.trace, setup.placement or one_device(setup.model)
    several = placement.devices > 1
    slots = [residency.slots.held for residency in setup.residencies]
    duration = measured.steps["end_ps"] - measured.steps["start_ps"]
    service = setup.residency.miss_service
    spared = service.on_host or service.near_memory
    if several:
        resident = resident_steps_on(placement, trace, setup.model, steps, cost, spared)
    else:
        resident = resident_steps(trace, setup.model, steps, cost, spared)
    continuous = setup.token_budget is not None
    regrouped = continuous or setup.regrouped is not None
    future, bounded = future_of(trace), service.exactness != "lossy" and not regrouped
    bits = getattr(service, "bits", None)
    figures = _Figures(setup, steps, measured, duration, 0 if bits is None else cost.low_bit_bytes(bits))
    used = [tier for tier, name in enumerate(TIERS) if measured.tiers[name][0]]
    phases: dict[str, dict[str, Any]] = {}
    counted_steps = [("decode", steps.decode), ("prefill", ~steps.decode)]
    if continuous:  # steps mix prompts and decode
        counted_steps = [("every", np.ones(len(steps), np.bool_))]
    for name, counted in counted_steps:
        if counted.any():
            phases[name] = figures.phase(counted) | {"bounds": None}
            if not bounded:
                continue
            least = cost.least_service_ps(service.on_host, used, service.near_memory)
            if several:
                best = clairvoyant_on(placement, trace, steps, counted, resident, slots, least)
            else:
                best = [clairvoyant(trace, future, steps, counted, resident, slots[0], least)]
            copies = sum(int(bound.copies.sum()) for bound in best)
            wait = max(bound.wait_ps(duration, measured.steps["wait_ps"]) for bound in best)
            tokens = steps.tokens[counted].sum()
            phases[name]["bounds"] = {
                "resident": {"tpot_s": float((steps.tokens * resident)[counted].sum()) / tokens / 1e12},
                "clairvoyant": {
                    "tpot_s": max(bound.token_time_ps for bound in best) / tokens / 1e12,
                    "wait_s_per_token": seconds(wait) / tokens,
                    "hit": 1 - copies / max(1, int(measured.steps["needed"][counted].sum())),
                },
            }
    main = phases.get("every") or phases.get("decode") or phases.get("prefill") or {}
    if continuous:
        main = main | served(trace, steps, measured)
    ttft, notes = _first_tokens(trace, steps, measured)
    busy = int(measured.steps["end_ps"][-1]) if len(steps) else 0
    peaks = _peak_bytes(setup, placement, measured.most_keys if continuous else most_cached(steps))
    values = {
        **labels,
        "notes": labels["notes"] + notes,
        "requests": len(np.unique(trace.request)),
        "ttft_s": ttft,
        "queue_s": None,
        **main,
        "link_utilisation": measured.link_busy_ps / max(1, busy) / placement.devices,
        "compute_utilisation": measured.compute_busy_ps / max(1, busy) / placement.devices,
        "peak_bytes": max(peaks),
        "duration_s": seconds(busy),
        "ssd_bytes": measured.ssd_reads * setup.model.bytes_per_expert
        + measured.ssd_low_bit_reads * figures.low_bit_bytes,
        "tiers": {
            name: {"experts": resting, "wanted": wanted}
            for name, (resting, wanted) in measured.tiers.items()
            if resting
        },
        "prefill": phases.get("prefill") if "decode" in phases else None,
        **({"devices": _devices(setup, placement, measured, busy, peaks)} if several else {}),
        "layers": figures.layers(),
        "per_request": per_request(trace, steps, measured),
        "schedule": _schedule(setup),
        "decision_log_sha256": measured.decision_log_sha256,
    }
    return Result(values, measured, steps, resident)


@dataclass(frozen=True)
class _Figures:
    setup: Setup
    steps: Steps
    measured: Measurements
    duration_ps: NDArray[np.int64]
    low_bit_bytes: int  # of one copy at few bits

    def phase(self, counted: NDArray[np.bool_]) -> dict[str, Any]:
        """The figures of the steps marked in `counted` [S]; a step's duration counts once for each of its tokens."""
        sums = {name: int(values[counted].sum()) for name, values in self.measured.steps.items()}
        rows, needed = int(self.steps.tokens[counted].sum()), max(1, sums["needed"])
        output = int(self._output_rows()[counted].sum())
        total = int(self.duration_ps[counted].sum())
        chunk = self.setup.model.bytes_per_expert / self.measured.chunks_per_expert
        return {
            "tokens": output,
            "steps": int(counted.sum()),
            "tpot_s": _quantiles(self.duration_ps[counted], self.steps.tokens[counted]),
            "tokens_per_s": output / max(seconds(total), 1e-12),
            "wait_s_per_token": seconds(sums["wait_ps"]) / rows,
            "time_share": {
                "compute": sums["busy_ps"] / max(1, total),
                "wait": sums["wait_ps"] / max(1, total),
                **({"other_devices": sums["peer_ps"] / max(1, total)} if self.setup.others else {}),
                "overhead": 1 - (sums["busy_ps"] + sums["wait_ps"] + sums["peer_ps"]) / max(1, total),
            },
            "hit": sums["hit"] / needed,
            "late": sums["late"] / needed,
            "miss": sums["miss"] / needed,
            "bytes_per_token": {name: sums[name] * chunk / rows for name in ("demand", "stream", "prefetch", "wasted")}
            | {"low_bit": sums["low_bit"] * self.low_bit_bytes / rows},
            "on_host": sums["on_host"] / needed,
            "near": sums["near"] / needed,
            "skipped": sums["skipped"] / needed,
        }

    def _output_rows(self) -> NDArray[np.int64]:
        kept = (self.setup.trace.flags & REJECTED) == 0
        return np.add.reduceat(kept.astype(np.int64), self.steps.starts[:-1])

    def layers(self) -> dict[str, list[float]]:
        """Per MoE layer: hit, late and miss fractions, and the mean union over the layer's share of the slots."""
        layers, slots = self.measured.layers, all_slots(self.setup.residencies)
        needed = np.maximum(1, layers["needed"])
        shares = np.array(slots.per_scope) if len(slots.per_scope) > 1 else np.array([slots.held / len(needed)])
        union = layers["needed"] / max(1, len(self.steps)) / shares
        fractions = {name: (layers[name] / needed).tolist() for name in ("hit", "late", "miss")}
        return {**fractions, "union_over_capacity": union.tolist()}


def _schedule(setup: Setup) -> dict[str, float] | None:
    """What forming other batches took; None where the trace's own were kept."""
    formed = setup.regrouped
    if formed is None:
        return None
    size = setup.model.kv_bytes_per_token
    return {
        "splits": int(np.count_nonzero(formed.seconds)),
        "host_s": float(formed.seconds.sum()),
        "moved_sequences": int(formed.moved.sum()),
        "moved_kv_bytes": int(formed.moved_tokens.sum()) * size,
        "copied_kv_bytes": int(formed.copied_tokens.sum()) * size,
    }


def _quantiles(duration_ps: NDArray[np.int64], tokens: NDArray[np.int64]) -> dict[str, float]:
    each = np.repeat(duration_ps, tokens)
    p50, p90, p99 = np.percentile(each, [50, 90, 99], method="inverted_cdf")
    return {"mean": seconds(int(each.sum())) / len(each), "p50": p50 / 1e12, "p90": p90 / 1e12, "p99": p99 / 1e12}


def _first_tokens(trace: Trace, steps: Steps, measured: Measurements) -> tuple[dict[str, float] | None, list[str]]:
    """Time from arrival (or from the start of its first step) to the end of a request's last prefill step."""
    requests, times = first_tokens(trace, steps, measured)
    if not len(requests):
        return None, ["ttft_s is null: the trace holds decode rows only"]
    p50, p90, p99 = np.percentile(times, [50, 90, 99], method="inverted_cdf")
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}, []


def most_cached(steps: Steps) -> int:
    """Tokens of KV cache that the fullest of recorded steps reads."""
    return max((batch.cached for batch in steps.batches), default=0)


def all_slots(residencies: tuple[Residency, ...]) -> Slots:
    """The slots of every device together, scope by scope."""
    if len(residencies) == 1:
        return residencies[0].slots
    per_scope = np.sum([residency.slots.per_scope for residency in residencies], axis=0)
    return Slots(tuple(per_scope.tolist()), sum(residency.slots.scratch for residency in residencies))


def _peak_bytes(setup: Setup, placement: Placement, cached: int) -> list[int]:
    """Each device's memory at its fullest: workspace, dense weights, every slot, and `cached` tokens of KV cache."""
    return [
        placement.fixed_bytes(device, setup.model, setup.hardware, cached)
        + residency.slots.total * setup.model.bytes_per_expert
        for device, residency in enumerate(setup.residencies)
    ]


def _devices(
    setup: Setup, placement: Placement, measured: Measurements, busy_ps: int, peaks: list[int]
) -> list[dict[str, Any]]:
    """One entry per device, over the whole run."""
    return [
        {
            "layers": placement.home.count(device),
            "experts": int((placement.owner == device).sum()),
            "slots": {"held": residency.slots.held, "scratch": residency.slots.scratch},
            "needed": own.needed,
            **{name: getattr(own, name) / max(1, own.needed) for name in ("hit", "late", "miss")},
            "link_utilisation": own.link_busy_ps / max(1, busy_ps),
            "compute_utilisation": own.compute_busy_ps / max(1, busy_ps),
            "peak_bytes": peak,
        }
        for device, (residency, own, peak) in enumerate(zip(setup.residencies, measured.devices, peaks, strict=True))
    ]
