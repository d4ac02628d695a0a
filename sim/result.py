"""From measurements to the figures that every run reports (DESIGN section 3). SI units, stable names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.future import Future
from ..traces.trace import PREFILL, REJECTED, Trace
from .batches import Steps
from .bounds import clairvoyant, resident_steps
from .cost import CostModel, seconds
from .events import Setup
from .measurements import Measurements
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
        """Pretty JSON, the same bytes for the same run."""
        return json.dumps(self.values, indent=2, ensure_ascii=False) + "\n"


def make_result(setup: Setup, steps: Steps, cost: CostModel, measured: Measurements, labels: dict[str, Any]) -> Result:
    """`labels` are the fields that say what was run; they come first, in their order."""
    trace, slots = setup.trace, setup.residency.slots
    duration = measured.steps["end_ps"] - measured.steps["start_ps"]
    service = setup.residency.miss_service
    resident = resident_steps(trace, setup.model, steps, cost, service.on_host or service.near_memory)
    future, bounded = Future(trace), service.exactness != "lossy" and setup.regrouped is None
    bits = getattr(service, "bits", None)
    figures = _Figures(setup, steps, measured, duration, 0 if bits is None else cost.low_bit_bytes(bits))
    used = [tier for tier, name in enumerate(TIERS) if measured.tiers[name][0]]
    phases: dict[str, dict[str, Any]] = {}
    for name, counted in (("decode", steps.decode), ("prefill", ~steps.decode)):
        if counted.any():
            phases[name] = figures.phase(counted) | {"bounds": None}
            if not bounded:
                continue
            least = cost.least_service_ps(service.on_host, used, service.near_memory)
            best = clairvoyant(trace, future, steps, counted, resident, slots.held, least)
            tokens = steps.tokens[counted].sum()
            phases[name]["bounds"] = {
                "resident": {"tpot_s": float((steps.tokens * resident)[counted].sum()) / tokens / 1e12},
                "clairvoyant": {
                    "tpot_s": best.token_time_ps / tokens / 1e12,
                    "wait_s_per_token": seconds(best.wait_ps(duration, measured.steps["wait_ps"])) / tokens,
                    "hit": 1 - int(best.copies.sum()) / max(1, int(measured.steps["needed"][counted].sum())),
                },
            }
    main = phases.get("decode") or phases.get("prefill") or {}
    ttft, notes = _first_tokens(trace, steps, measured)
    busy = int(measured.steps["end_ps"][-1]) if len(steps) else 0
    values = {
        **labels,
        "notes": labels["notes"] + notes,
        "requests": len(np.unique(trace.request)),
        "ttft_s": ttft,
        **main,
        "link_utilisation": measured.link_busy_ps / max(1, busy),
        "compute_utilisation": measured.compute_busy_ps / max(1, busy),
        "peak_bytes": _peak_bytes(setup, trace, steps),
        "duration_s": seconds(busy),
        "ssd_bytes": measured.ssd_reads * setup.model.bytes_per_expert
        + measured.ssd_low_bit_reads * figures.low_bit_bytes,
        "tiers": {
            name: {"experts": resting, "wanted": wanted}
            for name, (resting, wanted) in measured.tiers.items()
            if resting
        },
        "prefill": phases.get("prefill") if "decode" in phases else None,
        "layers": figures.layers(),
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
                "overhead": 1 - (sums["busy_ps"] + sums["wait_ps"]) / max(1, total),
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
        layers, slots = self.measured.layers, self.setup.residency.slots
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
    prefill = np.flatnonzero(trace.phase == PREFILL)
    if not len(prefill):
        return None, ["ttft_s is null: the trace holds decode rows only"]
    step = np.repeat(np.arange(len(steps)), steps.tokens)[prefill]
    requests, index = np.unique(trace.request[prefill], return_inverse=True)
    began, ended = np.full(len(requests), np.inf), np.zeros(len(requests))
    np.minimum.at(began, index, measured.steps["start_ps"][step] / 1e12)
    np.maximum.at(ended, index, measured.steps["end_ps"][step] / 1e12)
    arrival = {r.id: r.arrival_s for r in trace.meta.requests if r.arrival_s is not None}
    times = ended - [arrival.get(int(r), start) for r, start in zip(requests, began, strict=True)]
    p50, p90, p99 = np.percentile(times, [50, 90, 99], method="inverted_cdf")
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99)}, []


def _peak_bytes(setup: Setup, trace: Trace, steps: Steps) -> int:
    """Device memory at its fullest: workspace, dense weights, every slot, and the KV cache of a step's requests."""
    model, slots = setup.model, setup.residency.slots
    cached = max((batch.cached for batch in steps.batches), default=0)
    fixed = setup.hardware.device.reserve_bytes + model.dense_bytes
    return int(fixed + slots.total * model.bytes_per_expert + cached * model.kv_bytes_per_token)
