"""LRFU: every past use counts, halved with age (Lee et al. 2001, IEEE Transactions on Computers 50:12).

The baseline to beat on MoE traces once its half-life is tuned (2608.07911 calls a relative of it LFRU).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .compiled import compiled
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .steps import state, touch_step, value_step


@compiled
def _with_use(score, event, layers, half_life):  # type: ignore[no-untyped-def]
    """log2(2^score + 2^now), without overflow."""
    now = event / layers / half_life
    high, low = max(score, now), min(score, now)
    return high + np.log1p(2.0 ** (low - high)) / np.log(2.0)


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    for expert in needed:
        score[layer, expert] = _with_use(score[layer, expert], event, score.shape[0], state.numbers[0])


@value_step
def _value(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    return _with_use(score[layer, expert], event, score.shape[0], state.numbers[0])


class LRFU(Eviction):
    """score = log2 of sum over past uses of 2^(-age / half_life), plus now / half_life, so that it need not decay.

    `half_life` is in steps; 0.01 behaves like LRU, a million like LFU.
    """

    routing_only = True
    touch_step = _touch
    value_step = _value

    def __init__(self, half_life: float = 16.0) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life must be above 0 steps, got {half_life}")
        super().__init__()
        self.half_life = float(half_life)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self.state = state(numbers=(self.half_life,))
        self.score[:] = -np.inf

    def parameters(self) -> dict[str, Any]:
        return {"half_life": self.half_life}
