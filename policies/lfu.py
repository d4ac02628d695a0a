"""Least frequently used, with counts kept for experts that are not held (2511.05814)."""

from __future__ import annotations

from .eviction import Eviction
from .routed import Routed


class LFU(Eviction):
    """score = layer-steps that used the expert."""

    def touch(self, routed: Routed) -> None:
        self.score[routed.layer, routed.needed] += 1
