"""Least frequently used, with counts kept for experts that are not held (2511.05814)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .eviction import Eviction


class LFU(Eviction):
    """score = layer-steps that used the expert."""

    def touch(self, event: int, layer: int, needed: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        self.score[layer, needed] += 1
