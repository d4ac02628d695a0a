"""LRFU: every past use counts, halved with age (Lee et al. 2001, IEEE Transactions on Computers 50:12).

The baseline to beat on MoE traces once its half-life is tuned (2608.07911 calls a relative of it LFRU).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .compiled import compiled
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class LRFU(Eviction):
    """score = log2 of sum over past uses of 2^(-age / half_life), plus now / half_life, so that it need not decay.

    `half_life` is in steps; 0.01 behaves like LRU, a million like LFU.
    """

    def __init__(self, half_life: float = 16.0) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life must be above 0 steps, got {half_life}")
        super().__init__()
        self.half_life = float(half_life)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self.score[:] = -np.inf

    def touch(self, routed: Routed) -> None:
        _touch(self.score[routed.layer], routed.needed, self._now(routed.event))

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return float(_with_use(self.score[layer, expert], self._now(event)))

    def _now(self, event: int) -> float:
        return event / self.score.shape[0] / self.half_life

    def parameters(self) -> dict[str, Any]:
        return {"half_life": self.half_life}


@compiled
def _with_use(score, now):  # type: ignore[no-untyped-def]
    """log2(2^score + 2^now), without overflow."""
    high, low = max(score, now), min(score, now)
    return high + np.log1p(2.0 ** (low - high)) / np.log(2.0)


@compiled
def _touch(score, needed, now):  # type: ignore[no-untyped-def]
    for expert in needed:
        score[expert] = _with_use(score[expert], now)
