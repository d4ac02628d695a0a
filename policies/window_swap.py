"""Window swap: the cached set changes only at the end of a window (DALI, 2602.03495).

At the end of every `window` steps each layer swaps its `swaps` least used residents for its most used others, by
tokens in that window and only where that gains. Between two ends a miss of a non-resident is streamed. The paper's
window and swap count were not found: they are parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class WindowSwap(Eviction):
    """score = 1 for the experts that are to be resident, else 0. The first window admits whatever comes first."""

    bypass = True

    def __init__(self, window: int = 16, swaps: int = 4) -> None:
        if window < 1 or swaps < 1:
            raise ValueError(f"window and swaps must be at least 1, got {window} and {swaps}")
        super().__init__()
        self.window, self.swaps = window, swaps

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        per_layer = slots.per_scope if len(slots.per_scope) > 1 else (slots.held // layers,) * layers
        self._room = np.minimum(per_layer, experts)
        self._tokens = np.zeros((layers, experts), np.int64)
        self._window_of = np.zeros(layers, np.int64)

    def touch(self, routed: Routed) -> None:
        layer = routed.layer
        if routed.step // self.window > self._window_of[layer]:
            self._window_of[layer] = routed.step // self.window
            self._swap(layer)
        self._tokens[layer, routed.needed] += routed.tokens
        room = int(self._room[layer] - self.score[layer].sum())
        if room > 0:
            newcomers = routed.needed[self.score[layer, routed.needed] == 0]
            self.score[layer, newcomers[:room]] = 1

    def _swap(self, layer: int) -> None:
        tokens, resident = self._tokens[layer], self.score[layer] == 1
        outgoing = np.flatnonzero(resident)
        incoming = np.flatnonzero(~resident)
        outgoing = outgoing[np.argsort(tokens[outgoing], kind="stable")][: self.swaps]
        incoming = incoming[np.argsort(-tokens[incoming], kind="stable")][: self.swaps]
        for loser, winner in zip(outgoing, incoming, strict=False):
            if tokens[winner] > tokens[loser]:
                self.score[layer, loser], self.score[layer, winner] = 0, 1
        tokens[:] = 0

    def parameters(self) -> dict[str, Any]:
        return {"window": self.window, "swaps": self.swaps}
