"""Belady's rule: the expert whose next use lies furthest in the future goes (Belady 1966, IBM Systems Journal 5:2).

With bypass (the default) a miss that is needed later than every held expert passes through a scratch slot instead
of evicting; without it every miss is admitted, which is what 2608.07911 calls forced admission.
"""

from __future__ import annotations

from typing import Any

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class Belady(Eviction):
    """score = minus the moment of the next use (`Future.next_use`); -inf when there is none."""

    needs = ("future",)

    def __init__(self, bypass: bool = True) -> None:
        super().__init__()
        self.bypass = bypass

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        if future is None:
            raise ValueError("belady needs the future")
        self._future = future
        self.score = -future.first_use()

    def touch(self, routed: Routed) -> None:
        self.score[routed.layer, routed.needed] = -self._future.next_use(routed.layer, routed.needed, routed.event)

    def parameters(self) -> dict[str, Any]:
        return {"bypass": self.bypass}
