"""Activation matrices: what a similar earlier request used is what this one will use (MoE-Infinity, 2401.14361).

A request's matrix counts [layers, experts] uses. Finished ones are kept; the stored matrix nearest by cosine to what
the request has done so far predicts what it will do. The nearest is sought once per step, not per layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class ActivationMatrix(Eviction):
    """score = (predicted share of the layer's uses + epsilon) * (1 - layers until the expert's layer / layers).

    `capacity` matrices are stored, the oldest goes (the authors cluster instead). Before one is stored a request
    predicts itself. With several requests in a batch predictions add up.
    """

    def __init__(self, capacity: int = 100) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 matrix, got {capacity}")
        super().__init__()
        self.capacity = capacity

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._running: dict[int, NDArray[np.float64]] = {}
        self._stored: list[NDArray[np.float64]] = []
        self._predicted = np.zeros_like(self.score)
        self._step = -1
        self._layer = np.arange(len(self.score))

    def request_begins(self, request: int) -> None:
        self._running[request] = np.zeros_like(self.score)

    def request_ends(self, request: int) -> None:
        self._stored.append(self._running.pop(request))
        del self._stored[: -self.capacity]

    def touch(self, routed: Routed) -> None:
        if routed.step != self._step:
            self._step = routed.step
            self._predicted = sum((self._nearest(m) for m in self._running.values()), np.zeros_like(self.score))
        if routed.requests is None:
            raise ValueError("activation-matrix was driven without requests")
        for row, request in enumerate(routed.requests.tolist()):
            ids = routed.ids[row]
            self._running[request][routed.layer, ids[ids < self.score.shape[1]]] += 1
        layers = len(self.score)
        nearness = 1 - ((self._layer - routed.layer) % layers) / layers
        np.multiply(self._predicted + 1e-6, nearness[:, None], out=self.score)

    def _nearest(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """The stored matrix most like `matrix`, each layer's uses divided by their sum."""
        best = matrix
        if self._stored:
            stored = np.stack(self._stored).reshape(len(self._stored), -1)
            norms = np.linalg.norm(stored, axis=1) + 1e-12
            best = self._stored[int(np.argmax(stored @ matrix.ravel() / norms))]
        return best / np.maximum(1, best.sum(axis=1, keepdims=True))

    def parameters(self) -> dict[str, Any]:
        return {"capacity": self.capacity}
