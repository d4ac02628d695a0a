"""First in, first out: the expert that has been held longest goes, used or not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .eviction import Eviction


class FIFO(Eviction):
    """score = index of the layer-step at which the expert was given its slot."""

    def touch(self, event: int, layer: int, needed: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        pass

    def admitted(self, event: int, layer: int, expert: int) -> None:
        self.score[layer, expert] = event

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return float(event)
