"""HOBBIT's multi-dimensional cache: recency, frequency, high-precision frequency, layer distance (2411.01433).

The paper adds the four ranks with weights; which weights it uses was not found, so they are parameters here, equal by
default. "High precision" are the uses whose gate weight reaches `threshold` of the token's largest one: those are what
HOBBIT never serves from its low-bit copies (its T1 = 0.6).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class Hobbit(Eviction):
    """score = w . (last use / now, uses / now, important uses / now, 1 - layers until the expert's layer / layers)."""

    needs = ("weights",)

    def __init__(
        self,
        recency: float = 0.25,
        frequency: float = 0.25,
        precision: float = 0.25,
        distance: float = 0.25,
        threshold: float = 0.6,
    ) -> None:
        super().__init__()
        self._parameters = {
            "recency": recency, "frequency": frequency, "precision": precision, "distance": distance,
            "threshold": threshold,
        }  # fmt: skip
        if min(self._parameters.values()) < 0:
            raise ValueError("weights and threshold must not be negative")

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._last, self._uses, self._important = (np.zeros_like(self.score) for _ in range(3))
        self._layer = np.arange(len(self.score))

    def touch(self, routed: Routed) -> None:
        p, layer, needed = self._parameters, routed.layer, routed.needed
        if routed.weights is None:
            raise ValueError("hobbit was driven without the weights column")
        self._last[layer, needed] = routed.step + 1
        self._uses[layer, needed] += 1
        strongest = routed.weights.max(axis=1, keepdims=True)
        important = np.unique(routed.ids[routed.weights >= p["threshold"] * strongest])
        self._important[layer, important[important < self.score.shape[1]]] += 1
        now, layers = routed.step + 1, len(self.score)
        ahead = (self._layer - layer) % layers
        seen = p["recency"] * self._last + p["frequency"] * self._uses + p["precision"] * self._important
        np.add(seen / now, p["distance"] * (1 - ahead[:, None] / layers), out=self.score)

    def parameters(self) -> dict[str, Any]:
        return dict(self._parameters)
