"""Least recently used: the expert whose last use lies furthest back goes (mixtral-offloading, 2312.17238)."""

from __future__ import annotations

from .eviction import Eviction
from .routed import Routed


class LRU(Eviction):
    """score = index of the layer-step that last used the expert."""

    def touch(self, routed: Routed) -> None:
        self.score[routed.layer, routed.needed] = routed.event

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return float(event)
