"""The host's cores and memory: experts computed there, alone and beside copies, and the time a policy takes."""

from __future__ import annotations

import time

import numpy as np

from ..policies.policy import Policy
from ..policies.residency import Slots
from ..traces.bundled import BUNDLED_TRACE
from ..traces.reader import load_trace
from .calibrate_fit import Roofline, roofline
from .calibrate_number import Number, Numbers, fitted, timed
from .calibrate_subject import Subject, total_ram
from .calibrate_timing import Effort, Timing, repeated

POLICY = "lru"  # what policy_s is measured with, holding a quarter of the experts


def host(subject: Subject) -> Numbers:
    """Rates of the host's cores and memory."""
    fit, timings = host_experts(subject)
    return {
        "host.memory_bytes": Number(total_ram(), "all RAM, as the system reports it"),
        "host.memory_bandwidth": beside_copies(subject, fit),
        "host.cpu_flops": fitted(fit.rate, fit, timings, "experts in bfloat16 on the host's cores"),
    }


def host_experts(subject: Subject) -> tuple[Roofline, list[Timing]]:
    """One expert on the host's cores, by rows. The simulator charges it no latency: what it has is in the rates."""
    rows = subject.effort.host_rows
    calls = [subject.host_expert(count) for count in rows]
    timings = [repeated(lambda call=call: subject.host_seconds(call), subject.effort) for call in calls]  # type: ignore[misc]
    seconds = [timing.seconds for timing in timings]
    moved = [subject.expert_bytes] * len(rows)
    return roofline(moved, [count * subject.expert_operations for count in rows], seconds, False), timings


def beside_copies(subject: Subject, alone: Roofline) -> Number:
    """Bytes per second that the cores' experts and copies to the device take together from host memory."""
    call = subject.host_expert(1)
    with subject.copying() as copies:
        timing = repeated(lambda: subject.host_seconds(call), subject.effort)
    experts = min(alone.bandwidth, subject.expert_bytes / timing.seconds)
    copied = copies.bytes / copies.seconds
    note = (
        f"experts alone reached {alone.bandwidth / 1e9:.4g} GB/s; beside copies {experts / 1e9:.4g}, "
        f"the copies then {copied / 1e9:.4g}"
    )
    how = f"experts of one row on the host's cores beside pinned copies, the bytes of both, {timing}"
    return Number(max(alone.bandwidth, experts + copied), how, note=note, scatter=timing.spread)


def policy_time(effort: Effort) -> Numbers:
    """A policy's decisions for one layer, on the bundled recording's decode steps, one step a repetition."""
    trace, policy = load_trace(BUNDLED_TRACE), Policy.load(POLICY)
    spec = trace.meta.model
    layers, held = trace.experts.shape[1], spec.experts // 4
    residency = policy.live_residency(trace.meta, Slots((held,) * layers), ())
    rows = iter(np.flatnonzero(trace.phase == 1).tolist())
    residency.request_begins(0)

    def once() -> float:
        row = next(rows)
        began = time.perf_counter_ns()
        residency.step_begins(row)
        for layer in range(layers):
            residency.routed(layer, trace.experts[row : row + 1, layer])
            residency.fetch_plan(layer)
            residency.layer_done(layer)
        return (time.perf_counter_ns() - began) / 1e9

    what = f"policy {POLICY} of {spec.experts} experts, top-{spec.top_k}, on recorded decode steps"
    return {"host.policy_s": timed(repeated(once, effort), what, layers)}
