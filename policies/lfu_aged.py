"""Least frequently used with aging: all counts are halved every so many steps (Robinson and Devarakonda 1990)."""

from __future__ import annotations

from typing import Any

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .steps import state, touch_step

HALVE_EVERY, EPOCH = range(2)  # of `state.words`


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    words = state.words
    epoch = event // score.shape[0] // words[HALVE_EVERY]
    if epoch > words[EPOCH]:
        score /= 2.0 ** (epoch - words[EPOCH])
        words[EPOCH] = epoch
    for expert in needed:
        score[layer, expert] += 1


class LFUAged(Eviction):
    """score = uses, halved at every multiple of `halve_every` steps."""

    routing_only = True
    touch_step = _touch

    def __init__(self, halve_every: int = 64) -> None:
        if halve_every < 1:
            raise ValueError(f"halve_every must be at least 1 step, got {halve_every}")
        super().__init__()
        self.halve_every = halve_every

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self.state = state(words=(self.halve_every, 0))

    def parameters(self) -> dict[str, Any]:
        return {"halve_every": self.halve_every}
