"""Window swap: the cached set changes only at the end of a window (DALI, 2602.03495).

At the end of every `window` steps each layer swaps its `swaps` least used residents for its most used others, by
tokens in that window and only where that gains. Between two ends a miss of a non-resident is streamed. The paper's
window and swap count were not found: they are parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .compiled import compiled
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .steps import state, touch_step

WINDOW_OF, ROOM = range(2)  # columns of `state.clock`
WINDOW, SWAPS = range(2)  # of `state.words`


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    clock, used = state.clock[layer], state.planes[layer, 0]
    window = event // score.shape[0] // state.words[WINDOW]
    if window > clock[WINDOW_OF]:
        clock[WINDOW_OF] = window
        _swap(score[layer], used, state.words[SWAPS])
    for i in range(len(needed)):
        used[needed[i]] += tokens[i]
    room = clock[ROOM] - score[layer].sum()
    for expert in needed:
        if room > 0 and score[layer, expert] == 0:
            score[layer, expert] = 1
            room -= 1


@compiled
def _swap(resident, used, swaps):  # type: ignore[no-untyped-def]
    """The least used residents against the most used others, pair by pair while that gains; then count anew."""
    outgoing, incoming = np.flatnonzero(resident == 1), np.flatnonzero(resident == 0)
    outgoing = outgoing[np.argsort(used[outgoing], kind="mergesort")]
    incoming = incoming[np.argsort(-used[incoming], kind="mergesort")]
    for i in range(min(swaps, len(outgoing), len(incoming))):
        if used[incoming[i]] > used[outgoing[i]]:
            resident[outgoing[i]] = 0
            resident[incoming[i]] = 1
    used[:] = 0


class WindowSwap(Eviction):
    """score = 1 for the experts that are to be resident, else 0. The first window admits whatever comes first."""

    bypass = True
    touch_step = _touch

    def __init__(self, window: int = 16, swaps: int = 4) -> None:
        if window < 1 or swaps < 1:
            raise ValueError(f"window and swaps must be at least 1, got {window} and {swaps}")
        super().__init__()
        self.window, self.swaps = window, swaps

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        self.state = state(planes=(layers, 1, experts), clock=(layers, 2), words=(self.window, self.swaps))
        per_layer = slots.per_scope if len(slots.per_scope) > 1 else (slots.held // layers,) * layers
        self.state.clock[:, ROOM] = np.minimum(per_layer, experts)

    def parameters(self) -> dict[str, Any]:
        return {"window": self.window, "swaps": self.swaps}
