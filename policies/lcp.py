"""LCP: least cache priority, frequency times exponential recency (MoEpic, 2509.08342)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class LCP(Eviction):
    """priority = uses * decay^((now - last use) / window), in steps.

    Kept as a logarithm that need not decay: log(uses) - (last use / window) * log(decay).
    `window` 128 and `decay` 0.25 are the paper's.
    """

    def __init__(self, window: float = 128.0, decay: float = 0.25) -> None:
        if not window > 0 or not 0 < decay < 1:
            raise ValueError(f"window must be above 0 and decay between 0 and 1, got {window} and {decay}")
        super().__init__()
        self.window, self.decay = float(window), float(decay)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._uses = np.zeros_like(self.score)
        self.score[:] = -np.inf

    def touch(self, routed: Routed) -> None:
        layer, needed = routed.layer, routed.needed
        self._uses[layer, needed] += 1
        self.score[layer, needed] = np.log(self._uses[layer, needed]) + self._recency(routed.step)

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return float(np.log(self._uses[layer, expert] + 1) + self._recency(event // self.score.shape[0]))

    def _recency(self, step: int) -> float:
        return -step / self.window * float(np.log(self.decay))

    def parameters(self) -> dict[str, Any]:
        return {"window": self.window, "decay": self.decay}
