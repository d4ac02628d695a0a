"""Perfect prediction: prefetch exactly what a later layer of this step will need. An upper reference, never live."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .future import Future
from .prefetch import Prefetch, Proposal
from .routed import Routed, StepBegun


class Oracle(Prefetch):
    """`distance` layers ahead, across the end of a step too: the last layers prefetch for the next token's first."""

    needs = ("future",)

    def __init__(self, distance: int = 1) -> None:
        if distance < 1:
            raise ValueError(f"distance must be at least 1, got {distance}")
        self.distance = distance

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        if future is None:
            raise ValueError("oracle needs the future")
        uses = future.uses()
        self._layers, self._experts = future.layers, future.experts
        self._keys = uses[:, 1]
        events = int(uses[-1, 0]) + 2 if len(uses) else 1
        self._begin = np.searchsorted(uses[:, 0], np.arange(events + 1))

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        if begun.event >= 0:
            return []
        return [(event, self._needed(event)) for event in range(min(self.distance, self._layers))]

    def propose(self, routed: Routed) -> list[Proposal]:
        event = routed.event + self.distance
        return [(event % self._layers, self._needed(event))]

    def _needed(self, event: int) -> NDArray[np.int32]:
        if event + 1 >= len(self._begin):
            return np.zeros(0, np.int32)
        keys = self._keys[self._begin[event] : self._begin[event + 1]]
        return (keys % self._experts).astype(np.int32)

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance}
