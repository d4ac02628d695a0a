"""Bandwidth-adaptive split: of a layer's misses some cross the link while the host computes the others.

FreeToken's q* and exllamav3 #392: both ends finish together. The share is kept in 16-bit fixed point, so that a log's
inputs give the same decisions on any machine, and at least one expert is fetched, else the cache would never change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .compiled import bare
from .miss_service import FETCH, ON_CPU, MissService
from .routed import Routed

ONE = 1 << 16
LONGEST_NS = 2**31 - 1


class Split(MissService):
    """Fetch n of m misses, n = m * q rounded, q = host time / (host time + link time) per byte.

    Both times are moving averages (weight 1/8, chosen here) of what was measured; until both are known q is
    `share`. The most used and most valuable are fetched. Not `timing_free`.
    """

    exactness = "numeric"
    on_host = True
    timing_free = False

    def __init__(self, share: float = 0.5) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        self.share = float(share)

    def start(self, meta: TraceMeta) -> None:
        self._link = self._host = 0  # nanoseconds per byte, times 2^32; 0 = not yet measured

    def copied(self, layer: int, expert: int, size: int, ns: int) -> None:
        self._link = average(self._link, size, ns)

    def computed(self, layer: int, expert: int, size: int, ns: int) -> None:
        self._host = average(self._host, size, ns)

    def serve(self, routed: Routed, missing: NDArray[np.int32], score: NDArray[np.float64]) -> NDArray[np.int8]:
        services = np.full(len(missing), ON_CPU, np.int8)
        tokens = routed.tokens[np.searchsorted(routed.needed, missing)]
        best = np.lexsort((-score, -tokens))
        services[best[: self._fetched(len(missing))]] = FETCH
        return services

    def _fetched(self, missing: int) -> int:
        share = round(self.share * ONE)
        if self._link and self._host:
            share = self._host * ONE // (self._host + self._link)
        return min(missing, max(1, (missing * share + ONE // 2) // ONE))

    def parameters(self) -> dict[str, Any]:
        return {"share": self.share}


@bare
def average(known, size, ns):  # type: ignore[no-untyped-def]
    """Whole numbers of 63 bits only (2 s count as the longest copy); the first measurement stands for itself."""
    measured = (min(ns, LONGEST_NS) << 32) // max(1, size)
    return max(1, measured if not known else known + (measured - known) // 8)
