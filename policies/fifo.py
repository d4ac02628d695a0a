"""First in, first out: the expert that has been held longest goes, used or not."""

from __future__ import annotations

from .eviction import Eviction
from .routed import Routed


class FIFO(Eviction):
    """score = index of the layer-step at which the expert was given its slot."""

    def touch(self, routed: Routed) -> None:
        pass

    def admitted(self, event: int, layer: int, expert: int) -> None:
        self.score[layer, expert] = event

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        return float(event)
