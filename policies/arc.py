"""ARC: recency and frequency share the cache, ghosts decide how much each gets (Megiddo and Modha, FAST 2003)."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class ARC(Eviction):
    """Per scope: T1 used once, T2 used again, ghosts B1 and B2, target size p of T1. Keys, least recent first.

    A set's hits move to T2 before its misses are served; protected entries are passed over.
    """

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._experts, self._room = meta.model.experts, slots.per_scope
        self._t1, self._t2, self._b1, self._b2 = ([OrderedDict[int, None]() for _ in slots.per_scope] for _ in range(4))
        self._target = [0.0] * len(slots.per_scope)
        self._again: set[int] = set()  # misses of the running set that a ghost remembers

    def touch(self, routed: Routed) -> None:
        scope, base = self._scope(routed.layer), routed.layer * self._experts
        for key in (base + routed.needed[routed.held]).tolist():
            self._t1[scope].pop(key, None)
            self._t2[scope].pop(key, None)
            self._t2[scope][key] = None
        self._again = set()
        for key in (base + routed.needed[~routed.held]).tolist():
            b1, b2 = self._b1[scope], self._b2[scope]
            if key in b1:
                self._target[scope] = min(self._room[scope], self._target[scope] + max(1, len(b2) / len(b1)))
            elif key in b2:
                self._target[scope] = max(0, self._target[scope] - max(1, len(b1) / len(b2)))
            else:
                continue
            b1.pop(key, None)
            b2.pop(key, None)
            self._again.add(key)

    def admitted(self, event: int, layer: int, expert: int) -> None:
        scope, key = self._scope(layer), layer * self._experts + expert
        (self._t2 if key in self._again else self._t1)[scope][key] = None

    def evicted(self, layer: int, expert: int) -> None:
        scope, key = self._scope(layer), layer * self._experts + expert
        once = key in self._t1[scope]
        (self._t1 if once else self._t2)[scope].pop(key)
        ghosts = (self._b1 if once else self._b2)[scope]
        ghosts[key] = None
        if len(ghosts) > self._room[scope]:
            ghosts.popitem(last=False)

    def victim(self, scope: int, evictable: NDArray[np.int64]) -> int:
        allowed = set(evictable.tolist())
        t1, t2 = self._t1[scope], self._t2[scope]
        first, second = (t1, t2) if t1 and len(t1) > self._target[scope] else (t2, t1)
        return next(key for queue in (first, second) for key in queue if key in allowed)

    def _scope(self, layer: int) -> int:
        return layer if len(self._room) > 1 else 0
