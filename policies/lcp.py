"""LCP: least cache priority, frequency times exponential recency (MoEpic, 2509.08342)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .steps import state, touch_step, value_step


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    uses, recency = state.planes[layer, 0], event // score.shape[0] * state.numbers[0]
    for expert in needed:
        uses[expert] += 1
        score[layer, expert] = np.log(uses[expert]) + recency


@value_step
def _value(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    return np.log(state.planes[layer, 0, expert] + 1) + event // score.shape[0] * state.numbers[0]


class LCP(Eviction):
    """priority = uses * decay^((now - last use) / window), in steps.

    Kept as a logarithm that need not decay: log(uses) - (last use / window) * log(decay).
    `window` 128 and `decay` 0.25 are the paper's.
    """

    routing_only = True
    touch_step = _touch
    value_step = _value

    def __init__(self, window: float = 128.0, decay: float = 0.25) -> None:
        if not window > 0 or not 0 < decay < 1:
            raise ValueError(f"window must be above 0 and decay between 0 and 1, got {window} and {decay}")
        super().__init__()
        self.window, self.decay = float(window), float(decay)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        self.state = state(planes=(layers, 1, experts), numbers=(-np.log(self.decay) / self.window,))
        self.score[:] = -np.inf

    def parameters(self) -> dict[str, Any]:
        return {"window": self.window, "decay": self.decay}
