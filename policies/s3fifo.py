"""S3-FIFO: a small queue filters what is used once; a ghost queue lets it back in (SOSP 2023)."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed

MOST_VISITS = 3


class S3FIFO(Eviction):
    """Per scope: `small` share of the slots as a probationary queue, the rest as the main queue, as many ghosts.

    Protected entries keep their place. Queues map a key to its visits since it was queued, oldest first.
    """

    def __init__(self, small: float = 0.1) -> None:
        if not 0 < small < 1:
            raise ValueError(f"small must lie between 0 and 1, got {small}")
        super().__init__()
        self.small = small

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._experts = meta.model.experts
        self._room = slots.per_scope
        self._small, self._main, self._ghost = ([OrderedDict[int, int]() for _ in slots.per_scope] for _ in range(3))

    def touch(self, routed: Routed) -> None:
        scope = self._scope(routed.layer)
        for key in (routed.layer * self._experts + routed.needed[routed.held]).tolist():
            queue = self._small[scope] if key in self._small[scope] else self._main[scope]
            queue[key] = min(MOST_VISITS, queue[key] + 1)

    def admitted(self, event: int, layer: int, expert: int) -> None:
        scope, key = self._scope(layer), layer * self._experts + expert
        known = self._ghost[scope].pop(key, None) is not None
        (self._main if known else self._small)[scope][key] = 0

    def evicted(self, layer: int, expert: int) -> None:
        scope, key = self._scope(layer), layer * self._experts + expert
        if self._small[scope].pop(key, None) is not None:
            self._ghost[scope][key] = 0
            if len(self._ghost[scope]) > self._room[scope]:
                self._ghost[scope].popitem(last=False)
        else:
            del self._main[scope][key]

    def victim(self, scope: int, evictable: NDArray[np.int64]) -> int:
        allowed, small, main = set(evictable.tolist()), self._small[scope], self._main[scope]
        if len(small) > self.small * self._room[scope] or not allowed & main.keys():
            for key in [key for key in small if key in allowed]:
                if small[key] <= 1:
                    return key
                main[key] = 0
                del small[key]
        while True:
            for key in [key for key in main if key in allowed]:
                if main[key] == 0:
                    return key
                main[key] -= 1
                main.move_to_end(key)
            if not allowed & main.keys():
                return next(key for key in small if key in allowed)

    def _scope(self, layer: int) -> int:
        return layer if len(self._room) > 1 else 0

    def parameters(self) -> dict[str, Any]:
        return {"small": self.small}
