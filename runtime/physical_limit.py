"""What no policy can beat on this machine: everything computed, and the fewest copies made, as fast as the link goes.

    seconds >= max(seconds with everything resident, fewest copies * bytes / link rate)

The fewest copies are the clairvoyant optimum for the trace and as many slots (policies/fewest_copies.py), not a run's
own misses: a bad policy would lower its own limit by them. Both parts are measured here, on the machine at hand.
"""

from __future__ import annotations

import time

import torch

from ..policies.fewest_copies import fewest_copies_of
from ..traces.trace import Trace
from .backend import DeviceBackend

PROBE = 64 << 20  # bytes that a pass of the measurement copies: more than caches hold. Chosen here
PASSES = 5  # of which the best counts. Chosen here


def limit_seconds(
    trace: Trace, slots: int, row: int, link_bytes_per_s: float, resident_s: float | None
) -> tuple[float, int]:
    """(least seconds of the whole trace from a cold start, fewest copies of `row` bytes)."""
    copies = fewest_copies_of(trace, slots)
    return max(resident_s or 0.0, copies * row / link_bytes_per_s), copies


def link_rate(backend: DeviceBackend, row: int) -> float:
    """Bytes per second at which rows of `row` bytes come from host memory into slots, one after the other."""
    count = max(2, PROBE // row)
    source, slots = backend.host_rows(count, row), backend.rows(count, row)
    source.fill_(1)
    backend.pin(source)
    best = 0.0
    try:
        for _ in range(PASSES):
            if backend.device.type != "cpu":
                torch.accelerator.synchronize(backend.device)
            began = time.perf_counter()
            for mark in [backend.copy(slots[at], source[at], ()) for at in range(count)]:
                backend.join(mark)
            best = max(best, count * row / (time.perf_counter() - began))
    finally:
        backend.unpin(source)
    return best
