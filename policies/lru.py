"""Least recently used: the expert whose last use lies furthest back goes (mixtral-offloading, 2312.17238)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .eviction import Eviction


class LRU(Eviction):
    """score = index of the layer-step that last used the expert."""

    def touch(self, event: int, layer: int, needed: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        self.score[layer, needed] = event

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return float(event)
