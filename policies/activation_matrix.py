"""Activation matrices: what a similar earlier request used is what this one will use (MoE-Infinity, 2401.14361).

A request's matrix counts [layers, experts] uses. Finished ones are kept; the stored matrix nearest by cosine to what
the request has done so far predicts what it will do. The nearest is sought once per step, not per layer.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .prefetch import Prefetch, Proposal
from .residency import Slots
from .routed import Routed


class Matrices:
    """The matrices of running requests, those of finished ones, and what they predict. [L, E] each."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 matrix, got {capacity}")
        self.capacity = capacity

    def start(self, meta: TraceMeta) -> None:
        self._shape = len(meta.model.moe_layers), meta.model.experts
        self._running: dict[int, NDArray[np.float64]] = {}
        self._stored: list[NDArray[np.float64]] = []
        self._step = -1
        self.predicted = np.zeros(self._shape)  # shares of each layer's uses, summed over requests

    def request_begins(self, request: int) -> None:
        self._running[request] = np.zeros(self._shape)

    def request_ends(self, request: int) -> None:
        self._stored.append(self._running.pop(request))
        del self._stored[: -self.capacity]

    def learn(self, routed: Routed) -> None:
        """Predict when a step's first layer is routed; count the uses of every layer."""
        if routed.step != self._step:
            self._step = routed.step
            self.predicted = sum((self._nearest(m) for m in self._running.values()), np.zeros(self._shape))
        if routed.requests is None:
            raise ValueError("activation-matrix was driven without requests")
        for row, request in enumerate(routed.requests.tolist()):
            ids = routed.ids[row]
            self._running[request][routed.layer, ids[ids < self._shape[1]]] += 1

    def _nearest(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """The stored matrix most like `matrix`, each layer's uses divided by their sum."""
        best = matrix
        if self._stored:
            stored = np.stack(self._stored).reshape(len(self._stored), -1)
            norms = np.linalg.norm(stored, axis=1) + 1e-12
            best = self._stored[int(np.argmax(stored @ matrix.ravel() / norms))]
        return best / np.maximum(1, best.sum(axis=1, keepdims=True))


class ActivationMatrix(Eviction):
    """score = (predicted share of the layer's uses + epsilon) * (1 - layers until the expert's layer / layers).

    `capacity` matrices are stored, the oldest goes (the authors cluster instead). Before one is stored a request
    predicts itself. With several requests in a batch predictions add up.
    """

    def __init__(self, capacity: int = 100) -> None:
        super().__init__()
        self._matrices = Matrices(capacity)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._matrices.start(meta)
        self._layer = np.arange(len(self.score))

    def request_begins(self, request: int) -> None:
        self._matrices.request_begins(request)

    def request_ends(self, request: int) -> None:
        self._matrices.request_ends(request)

    def touch(self, routed: Routed) -> None:
        self._matrices.learn(routed)
        layers = len(self.score)
        nearness = 1 - ((self._layer - routed.layer) % layers) / layers
        np.multiply(self._matrices.predicted + 1e-6, nearness[:, None], out=self.score)

    def parameters(self) -> dict[str, Any]:
        return {"capacity": self._matrices.capacity}


class ActivationMatrixPrefetch(Prefetch):
    """Of each of the next `distance` layers the `width` (default top-k) likeliest experts, by priority.

    priority = predicted share of the layer's uses * (1 - layers until then / layers). MoE-Infinity queues every later
    layer; here `distance` bounds how many, since a slot that is promised early is lost to the layers before (3 is
    chosen here).
    """

    def __init__(self, distance: int = 3, width: int | None = None, capacity: int = 100) -> None:
        if distance < 1 or (width is not None and width < 1):
            raise ValueError(f"distance and width must be at least 1, got {distance} and {width}")
        self.distance, self.width = distance, width
        self._matrices = Matrices(capacity)

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._matrices.start(meta)
        self._layers = len(meta.model.moe_layers)
        self._width = self.width or meta.model.top_k

    def request_begins(self, request: int) -> None:
        self._matrices.request_begins(request)

    def request_ends(self, request: int) -> None:
        self._matrices.request_ends(request)

    def propose(self, routed: Routed) -> list[Proposal]:
        self._matrices.learn(routed)
        wanted: list[tuple[float, int, int]] = []  # (-priority, layer, expert)
        for layer in range(routed.layer + 1, min(self._layers, routed.layer + 1 + self.distance)):
            share = self._matrices.predicted[layer]
            nearness = 1 - (layer - routed.layer) / self._layers
            best = np.argsort(-share, kind="stable")[: self._width].tolist()
            wanted += [(-share[expert] * nearness, layer, expert) for expert in best if share[expert] > 0]
        runs = groupby(sorted(wanted), key=lambda entry: entry[1])
        return [(layer, np.array([expert for _, _, expert in run], np.int32)) for layer, run in runs]

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance, "width": self.width, "capacity": self._matrices.capacity}
