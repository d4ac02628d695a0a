"""Least-Stale: what the running forward pass has not touched goes first (SpecMD, 2602.03921).

A pass visits layers in order, so an expert it has touched belongs to a layer behind it, and one it has not is either
unwanted or still to come. Within both classes the order is first in, first out.
"""

from __future__ import annotations

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed

FRESH = 2.0**40  # above every event, so that a fresh expert outranks every stale one


class LeastStale(Eviction):
    """score = event of admission, plus FRESH when the running step has used the expert."""

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._admitted = np.zeros_like(self.score)
        self._step = -1

    def touch(self, routed: Routed) -> None:
        if routed.step != self._step:
            self._step = routed.step
            np.copyto(self.score, self._admitted)
        self.score[routed.layer, routed.needed] = self._admitted[routed.layer, routed.needed] + FRESH

    def admitted(self, event: int, layer: int, expert: int) -> None:
        fresh = self.score[layer, expert] >= FRESH
        self._admitted[layer, expert] = event
        self.score[layer, expert] = event + FRESH if fresh else event

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return float(event)
