"""Two LRU lists: what is in use or predicted goes last (the cache of ExpertFlow, 2510.26730).

High holds what an expert's layer used when it was last routed, and what is predicted for the layers in the window
ahead; Low holds the rest. The victim is the least recently used of Low, then of High. The window is whatever the
prefetch policy now proposes, so that it moves with an adaptive step size and cannot disagree with it; without a
prefetch policy the order is that of LRU. Read from notes on the paper, which publishes no code. Chosen here: "used
recently" is the last time that the expert's layer was routed; a newly predicted expert counts as used now; one that was
predicted and not needed falls to Low at the place of its own last use.
"""

from __future__ import annotations

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .prefetch import Proposal
from .residency import Slots
from .routed import Routed

HIGH = 2.0**40  # more layer-steps than any run has; sums with it are exact


class TwoLevel(Eviction):
    """score = layer-step of the last use or prediction, plus `HIGH` for experts in the upper list."""

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._last = np.full_like(self.score, -1)
        self._visited = np.zeros(len(self.score))  # layer-step at which each layer was last routed
        self.score[:] = -1

    def touch(self, routed: Routed) -> None:
        self._last[routed.layer, routed.needed] = self._visited[routed.layer] = routed.event
        self._withdraw(routed.layer)

    def proposed(self, event: int, proposals: list[Proposal]) -> None:
        """A new proposal for a layer takes the place of an older one; both lapse when the layer is routed."""
        for layer in {layer for layer, _ in proposals}:
            self._withdraw(layer)
        for layer, experts in proposals:
            self.score[layer, experts] = HIGH + event

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return HIGH + event

    def _withdraw(self, layer: int) -> None:
        """Forget what was predicted for `layer`."""
        last = self._last[layer]
        self.score[layer] = last + HIGH * (last >= self._visited[layer])
