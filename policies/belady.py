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
from .steps import state, touch_step


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    for i in range(len(needed)):  # an event that needs nothing may lie behind the last one that `words` knows
        score[layer, needed[i]] = -state.numbers[state.words[event] + i]


class Belady(Eviction):
    """score = minus the moment of the next use (`Future.following`); -inf when there is none.

    `state.numbers` holds that moment for every use of the trace, `state.words` where those of an event begin.
    """

    needs = ("future",)
    routing_only = True
    touch_step = _touch

    def __init__(self, bypass: bool = True) -> None:
        super().__init__()
        self.bypass = bypass

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        if future is None:
            raise ValueError("belady needs the future")
        self.score = -future.first_use()
        self.state = state()._replace(words=future.first_of_event(), numbers=future.following())

    def parameters(self) -> dict[str, Any]:
        return {"bypass": self.bypass}
