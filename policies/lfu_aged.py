"""Least frequently used with aging: all counts are halved every so many steps (Robinson and Devarakonda 1990)."""

from __future__ import annotations

from typing import Any

from .eviction import Eviction
from .routed import Routed


class LFUAged(Eviction):
    """score = uses, halved at every multiple of `halve_every` steps."""

    def __init__(self, halve_every: int = 64) -> None:
        if halve_every < 1:
            raise ValueError(f"halve_every must be at least 1 step, got {halve_every}")
        super().__init__()
        self.halve_every = halve_every
        self._epoch = 0

    def touch(self, routed: Routed) -> None:
        epoch = routed.step // self.halve_every
        if epoch > self._epoch:
            self.score /= 2.0 ** (epoch - self._epoch)
            self._epoch = epoch
        self.score[routed.layer, routed.needed] += 1

    def parameters(self) -> dict[str, Any]:
        return {"halve_every": self.halve_every}
