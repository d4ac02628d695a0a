"""Cross-layer transitions: which experts of a later layer follow this layer's choice, counted while running.

A first-order Markov chain over layers, the non-neural reference that learned predictors are compared with (the
"path" features of DuoServe, 2509.07379, and the affinity of ExFlow, 2401.08383).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .future import Future
from .prefetch import Prefetch, Proposal, ranked
from .routed import Routed


class Transition(Prefetch):
    """`width` experts of the layer `distance` ahead; counts start empty and only ever see what has been routed.

    votes(e') = sum over needed e of tokens(e) * P(e' | e), with P from token-level co-occurrence counts.
    """

    def __init__(self, distance: int = 1, width: int | None = None) -> None:
        if distance < 1 or (width is not None and width < 1):
            raise ValueError(f"distance and width must be at least 1, got {distance} and {width}")
        self.distance, self.width = distance, width

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._layers, self._experts = len(meta.model.moe_layers), meta.model.experts
        self._width = self.width or meta.model.top_k
        pairs = max(0, self._layers - self.distance)
        self._counts = np.zeros((pairs, self._experts, self._experts), np.int64)
        self._routed: dict[int, Routed] = {}

    def propose(self, routed: Routed) -> list[Proposal]:
        layer, target = routed.layer, routed.layer + self.distance
        earlier = self._routed.get(layer - self.distance)
        if earlier is not None and earlier.step == routed.step:
            self._learn(earlier, routed)
        self._routed[layer] = routed
        if target >= self._layers:
            return []
        seen = self._counts[layer, routed.needed]
        total = np.maximum(1, seen.sum(axis=1, keepdims=True))
        votes = (routed.tokens[:, None] * seen * 2**20 // total).sum(axis=0)
        return [(target, ranked(votes)[: self._width])]

    def _learn(self, earlier: Routed, routed: Routed) -> None:
        counts = self._counts[earlier.layer]
        for before, after in zip(earlier.ids.tolist(), routed.ids.tolist(), strict=True):
            for source in before:
                if source < self._experts:
                    for chosen in after:
                        if chosen < self._experts:
                            counts[source, chosen] += 1

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance, "width": self.width}
