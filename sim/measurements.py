"""What an engine measures while it runs, before anybody turns it into metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .device import Span

STEP_FIELDS = (
    "start_ps", "end_ps", "wait_ps", "busy_ps", "peer_ps",
    "needed", "hit", "late", "miss", "demand", "stream", "prefetch", "wasted", "low_bit", "on_host", "skipped", "near",
)  # fmt: skip


@dataclass
class DeviceMeasurements:
    """One device of several, over the whole run; times in picoseconds, experts per layer-step."""

    needed: int = 0
    hit: int = 0
    late: int = 0
    miss: int = 0
    compute_busy_ps: int = 0
    link_busy_ps: int = 0


@dataclass
class Measurements:
    """`steps[name]` [S]: per step; times in picoseconds, traffic in chunks. `layers[name]` [L]: summed over steps.

    With several devices `busy_ps` of a step counts those that run whole layers, `peer_ps` the time that these idle
    for hidden states or sums of other devices beyond what those waited for experts; the busy times of the whole run
    are sums over devices.
    """

    steps: dict[str, NDArray[np.int64]]
    layers: dict[str, NDArray[np.int64]]
    chunks_per_expert: int
    compute_busy_ps: int = 0
    link_busy_ps: int = 0
    ssd_reads: int = 0
    most_keys: int = 0  # cached tokens on the device at their most; in continuous batching only
    ssd_low_bit_reads: int = 0
    tiers: dict[str, tuple[int, int]] = field(default_factory=dict)  # experts that rest there, times one was wanted
    decision_log_sha256: str = ""
    spans: list[Span] = field(default_factory=list)
    devices: list[DeviceMeasurements] = field(default_factory=list)

    @classmethod
    def empty(cls, steps: int, layers: int, chunks_per_expert: int) -> Measurements:
        return cls(
            {name: np.zeros(steps, np.int64) for name in STEP_FIELDS},
            {name: np.zeros(layers, np.int64) for name in ("needed", "hit", "late", "miss")},
            chunks_per_expert,
        )

    def count(
        self, step: int, layer: int, held: NDArray[np.bool_], hit: NDArray[np.bool_], device: DeviceMeasurements
    ) -> None:
        """One layer-step's needed experts: held and complete, held and still on the way, or missing."""
        needed, present, complete = len(held), int(held.sum()), int(hit.sum())
        for name, value in zip(
            ("needed", "hit", "late", "miss"),
            (needed, complete, present - complete, needed - present),
            strict=True,
        ):
            self.steps[name][step] += value
            self.layers[name][layer] += value
            setattr(device, name, getattr(device, name) + value)
