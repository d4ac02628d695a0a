"""Prefetch what a later layer's own gate chooses on this layer's router input, a fixed number of layers ahead.

The idea of mixtral-offloading (2312.17238, section 3.2) and of Fate (2502.12224), without training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import TraceMeta
from .prefetch import BEFORE_FIRST_LAYER, Prefetch


class Lookahead(Prefetch):
    """`distance` layers ahead; the first `distance` layers are predicted from the embedding at step start."""

    needs = ("lookahead",)

    def __init__(self, distance: int = 1) -> None:
        if distance < 1:
            raise ValueError(f"distance must be at least 1, got {distance}")
        self.distance = distance

    @property
    def gates(self) -> int:  # type: ignore[override]
        return 1

    def start(self, meta: TraceMeta) -> None:
        self._experts, self._layers = meta.model.experts, len(meta.model.moe_layers)
        self._column = {distance: i for i, distance in enumerate(meta.lookahead_distances)}
        if self.distance not in self._column:
            raise InputError(
                f"prefetch lookahead: distance {self.distance} is not in the trace, which has "
                f"{list(meta.lookahead_distances)}: choose one of those or record with --lookahead {self.distance}"
            )

    def propose(
        self, layer: int, lookahead: NDArray[np.unsignedinteger[Any]] | None
    ) -> list[tuple[int, NDArray[np.int32]]]:
        if lookahead is None:
            raise ValueError("prefetch lookahead was driven without the lookahead column")
        if layer == BEFORE_FIRST_LAYER:
            known = [d for d in range(1, self.distance + 1) if d in self._column]
            return [(d - 1, self._ranked(lookahead[:, self._column[d]])) for d in known]
        target = layer + self.distance
        return [(target, self._ranked(lookahead[:, self._column[self.distance]]))] if target < self._layers else []

    def _ranked(self, predicted: NDArray[np.unsignedinteger[Any]]) -> NDArray[np.int32]:
        """Distinct experts of [T, K'] predictions: most and best-ranked votes first, then lowest id."""
        width = predicted.shape[1]
        votes = np.tile(np.arange(width, 0, -1), len(predicted))
        flat = predicted.ravel()
        present = flat < self._experts
        totals = np.bincount(flat[present], weights=votes[present], minlength=self._experts)
        ranked = np.argsort(-totals, kind="stable")
        return ranked[: np.count_nonzero(totals)].astype(np.int32)

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance}
