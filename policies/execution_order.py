"""Prefetch whole predicted paths in execution order: the earliest layer's experts first, down to the last slot that can
be had; the rest waits until a finished layer frees slots (ExpertFlow, 2410.17954, section on the expert cache engine).

Every layer's gate is a chance to plan again what is still to come, which is how the queue is served here: the paper
serves it the moment a layer ends, this one when the next layer has been routed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .future import Future
from .predicted import expected
from .predictor import Predicted
from .prefetch import Prefetch, Proposal
from .routed import Routed, StepBegun


class ExecutionOrder(Prefetch):
    """Of each token the `width` experts (default top-k) predicted for every later layer; per layer most expected first.

    An expert with an expectation (probabilities summed over the batch) of `least` or lower is left to demand, and so is
    what lies more than `reach` layers ahead (default: nothing does). Both are chosen here; the paper loads all.
    """

    needs = ("predicted",)

    def __init__(self, width: int | None = None, least: float = 0.0, reach: int | None = None) -> None:
        if (width is not None and width < 1) or (reach is not None and reach < 1):
            raise ValueError(f"width and reach must be at least 1, got {width} and {reach}")
        self.width, self.least, self.reach = width, float(least), reach

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._layers, self._experts = len(meta.model.moe_layers), meta.model.experts
        self._width = self.width or meta.model.top_k
        self._reach = self.reach or self._layers
        self._wanted: dict[int, Proposal] = {}  # by layers still to come in this step

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        self._wanted.clear()
        return self._queue(-1, begun.predicted)

    def propose(self, routed: Routed) -> list[Proposal]:
        return self._queue(routed.layer, routed.predicted)

    def _queue(self, layer: int, said: Predicted | None) -> list[Proposal]:
        self._wanted.pop(layer, None)
        for i, distance in enumerate(said.distances if said is not None else ()):
            target = layer + distance
            if said is not None and target < self._layers:
                width = self._width
                wanted = expected(said.experts[:, i, :width], said.probability[:, i, :width], self._experts)
                best = np.argsort(-wanted, kind="stable")
                self._wanted[target] = (target, best[wanted[best] > self.least].astype(np.int32))
        near = range(layer + 1, min(self._layers, layer + 1 + self._reach))
        return [self._wanted[target] for target in near if target in self._wanted]

    def parameters(self) -> dict[str, Any]:
        return {"width": self.width, "least": self.least, "reach": self.reach}
