"""What an offloaded model did: needs, bytes, waits, and what the host spent on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..policies.residency import CPU, KIND, STREAM
from .transfers import Traffic

if TYPE_CHECKING:
    from .decisions import Decision
    from .serving import Serving


@dataclass
class Statistics:
    """Counters since the model was offloaded. Needs are counted per layer-step, of live tokens only."""

    traffic: Traffic
    passes: int = 0
    layers: int = 0  # layer-steps computed
    hit: int = 0
    late: int = 0
    miss: int = 0
    streamed: int = 0  # of the misses
    on_host: int = 0  # of the misses
    waves: float = 0.0  # in which a layer's experts were computed
    syncs: int = 0  # points at which the host waited for the device to say what was routed
    exposed_ns: int = 0  # the device waited for experts
    sync_ns: int = 0
    decide_ns: int = 0
    compute_ns: int = 0

    def count(self, hits: int, late: int, decision: Decision) -> None:
        """What a layer's live tokens needed."""
        if decision.routed is None:
            return
        kinds = decision.plan[:, KIND]
        self.hit += hits
        self.late += late
        self.miss += int((~decision.routed.held).sum())
        self.streamed += int(np.count_nonzero(kinds == STREAM))
        self.on_host += int(np.count_nonzero(kinds == CPU))

    def layer(self, serving: Serving, sync_ns: int, decide_ns: int, compute_ns: int) -> None:
        """How long one layer kept the host, and in how many waves it was computed."""
        self.layers += 1
        self.waves += serving.waves_served / max(1, serving.rounds)
        self.sync_ns += sync_ns
        self.decide_ns += decide_ns
        self.compute_ns += compute_ns

    def report(self) -> dict[str, Any]:
        """Plain values with stable names: fractions of needed experts, bytes by kind, host time per layer."""
        needs, layers = max(1, self.hit + self.late + self.miss), max(1, self.layers)
        return {
            "passes": self.passes,
            "layers": self.layers,
            "hit": self.hit / needs,
            "late": self.late / needs,
            "miss": self.miss / needs,
            "needs": self.hit + self.late + self.miss,
            "streamed": self.streamed,
            "on_host": self.on_host,
            "bytes": asdict(self.traffic),
            "exposed_wait_s": self.exposed_ns / 1e9,
            "waves_per_layer": self.waves / layers,
            "syncs_per_layer": self.syncs / layers,
            "sync_us_per_layer": self.sync_ns / layers / 1e3,
            "decide_us_per_layer": self.decide_ns / layers / 1e3,
            "compute_us_per_layer": self.compute_ns / layers / 1e3,
        }
