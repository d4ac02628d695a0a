"""SIEVE: one queue, one bit per entry, a hand that clears bits and evicts the first entry without (NSDI 2024)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class Sieve(Eviction):
    """Per scope a queue of keys, oldest first. Entries stay where they are; only the hand moves, towards the newest.

    A protected entry is passed over with its bit kept. Events are sets: a set's hits set their bits before any victim
    is sought, in contrast to the published replay of one object at a time.
    """

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._experts, self._scopes = meta.model.experts, len(slots.per_scope)
        self._queue: list[list[int]] = [[] for _ in slots.per_scope]
        self._hand = [0] * self._scopes
        self._visited: set[int] = set()

    def touch(self, routed: Routed) -> None:
        self._visited.update((routed.layer * self._experts + routed.needed[routed.held]).tolist())

    def admitted(self, event: int, layer: int, expert: int) -> None:
        self._queue[layer if self._scopes > 1 else 0].append(layer * self._experts + expert)

    def evicted(self, layer: int, expert: int) -> None:
        scope, key = layer if self._scopes > 1 else 0, layer * self._experts + expert
        at = self._queue[scope].index(key)
        del self._queue[scope][at]
        self._visited.discard(key)
        self._hand[scope] = at

    def victim(self, scope: int, evictable: NDArray[np.int64]) -> int:
        queue, allowed = self._queue[scope], set(evictable.tolist())
        at = self._hand[scope]
        for _ in range(2 * len(queue)):
            at = at % len(queue)
            if queue[at] in allowed:
                if queue[at] not in self._visited:
                    return queue[at]
                self._visited.discard(queue[at])
            at += 1
        raise AssertionError("an evictable entry was passed twice")
