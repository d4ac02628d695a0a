"""Prefetch what a later layer's own gate chooses on this layer's router input, a fixed number of layers ahead.

The idea of mixtral-offloading (2312.17238, section 3.2) and of Fate (2502.12224), without training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import TraceMeta
from .future import Future
from .prefetch import Prefetch, Proposal, ranked
from .routed import Routed, StepBegun


class Lookahead(Prefetch):
    """`distance` layers ahead; the first `distance` layers are predicted from the embedding at step start."""

    needs = ("lookahead",)
    gates = 1

    def __init__(self, distance: int = 1) -> None:
        if distance < 1:
            raise ValueError(f"distance must be at least 1, got {distance}")
        self.distance = distance

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._experts, self._layers = meta.model.experts, len(meta.model.moe_layers)
        self._column = {distance: i for i, distance in enumerate(meta.lookahead_distances)}
        if self.distance not in self._column:
            raise InputError(
                f"prefetch lookahead: distance {self.distance} is not in the trace, which has "
                f"{list(meta.lookahead_distances)}: choose one of those or record with --lookahead {self.distance}"
            )

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        known = [d for d in range(1, min(self.distance, self._layers) + 1) if d in self._column]
        return [(d - 1, self._ranked(begun.lookahead, d)) for d in known]

    def propose(self, routed: Routed) -> list[Proposal]:
        target = routed.layer + self.distance
        return [(target, self._ranked(routed.lookahead, self.distance))] if target < self._layers else []

    def _ranked(self, lookahead: NDArray[np.unsignedinteger[Any]] | None, distance: int) -> NDArray[np.int32]:
        """Distinct predicted experts: most and best-ranked votes first, then lowest id."""
        if lookahead is None:
            raise ValueError("prefetch lookahead was driven without the lookahead column")
        predicted = lookahead[:, self._column[distance]]  # [T, K']
        votes = np.tile(np.arange(predicted.shape[1], 0, -1), len(predicted))
        flat = predicted.ravel()
        present = flat < self._experts
        return ranked(np.bincount(flat[present], votes[present], self._experts).astype(np.int64))

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance}
