"""Prefetch what a predictor says that later layers will need, a number of layers ahead."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .future import Future
from .predictor import Predicted as Said
from .prefetch import Prefetch, Proposal
from .routed import Routed, StepBegun


class Predicted(Prefetch):
    """Of every target up to `distance` layer-steps ahead the `width` experts (default top-k) most expected.

    A batch's expectation is the sum of its tokens' probabilities; one below `least` is not prefetched.
    """

    needs = ("predicted",)

    def __init__(self, distance: int = 1, width: int | None = None, least: float = 0.0) -> None:
        if distance < 1 or (width is not None and width < 1):
            raise ValueError(f"distance and width must be at least 1, got {distance} and {width}")
        self.distance, self.width, self.least = distance, width, float(least)

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._layers, self._experts = len(meta.model.moe_layers), meta.model.experts
        self._width = self.width or meta.model.top_k

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        return self._proposals(-1, begun.predicted)

    def propose(self, routed: Routed) -> list[Proposal]:
        return self._proposals(routed.layer, routed.predicted)

    def _proposals(self, layer: int, said: Said | None) -> list[Proposal]:
        if said is None:
            return []
        found = []
        for i, distance in enumerate(said.distances):
            if distance <= self.distance:
                wanted = expected(said.experts[:, i], said.probability[:, i], self._experts)
                best = np.argsort(-wanted, kind="stable")[: self._width]
                found.append(((layer + distance) % self._layers, best[wanted[best] > self.least].astype(np.int32)))
        return [proposal for proposal in found if len(proposal[1])]

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance, "width": self.width, "least": self.least}


def expected(experts: NDArray[Any], probability: NDArray[np.float16], count: int) -> NDArray[np.float64]:
    """[E]: tokens expected at each expert, from [T, M] ids and probabilities; ids >= E are absent."""
    flat = np.minimum(experts.ravel(), count)
    return np.asarray(np.bincount(flat, probability.ravel().astype(np.float64), count + 1)[:count], np.float64)
