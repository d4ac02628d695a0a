"""The replay contract of DESIGN section 3 once more, in dicts and sets: slow, and easy to believe.

Written from the contract, not from `Residency`. What the contract leaves open and the decision log shows is decided
here as the log does: free slots are taken in ascending order, streams go round the scratch slots.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

DEMAND, STREAM, PREFETCH = 0, 1, 2
Key = tuple[int, int]  # layer, expert
ANY = None  # admitted whatever it is worth


class Worths:
    """What an eviction policy thinks of every expert. `uses[layer][step]`: the set of experts needed."""

    bypass = False

    def __init__(self, uses: list[list[set[int]]]) -> None:
        self.uses, self.layers = uses, len(uses)
        self.routed: dict[Key, list[int]] = {}  # moments at which each was routed so far
        self.entered: dict[Key, int] = {}  # moment at which each got its slot
        self.now = -1

    def of(self, key: Key) -> Any:
        raise NotImplementedError

    def of_newcomer(self, key: Key) -> Any:
        """Worth of an expert that is prefetched now."""
        return self.of(key)

    def moments(self, key: Key) -> list[int]:
        """Every moment, past and future, at which the trace needs it."""
        return [step * self.layers + key[0] for step, needed in enumerate(self.uses[key[0]]) if key[1] in needed]


class LRU(Worths):
    def of(self, key: Key) -> float:
        return max([self.entered.get(key, 0), *self.routed.get(key, [])])

    def of_newcomer(self, key: Key) -> float:
        return self.now


class LFU(Worths):
    def of(self, key: Key) -> float:
        return len(self.routed.get(key, []))


class FIFO(Worths):
    def of(self, key: Key) -> float:
        return self.entered.get(key, 0)

    def of_newcomer(self, key: Key) -> float:
        return self.now


class Static(Worths):
    bypass = True

    def of(self, key: Key) -> float:
        return len(self.moments(key))


class ForcedBelady(Worths):
    """Further in the future is worth less; among those needed at the same moment, what comes after it decides."""

    def of(self, key: Key) -> Any:
        coming = [-moment for moment in self.moments(key) if moment > self.now]
        return [*coming, -math.inf, -key[1]] if coming else [-math.inf]


class Belady(ForcedBelady):
    bypass = True


class Reference:
    """One cache. `capacity[scope]` slots; one scope per layer, or one for all."""

    def __init__(
        self, worths: Worths, capacity: Sequence[int], scratch: int, top_k: int, guards: dict[str, Any],
        stale: int = 0,
    ) -> None:  # fmt: skip
        self.worths, self.capacity, self.scratch, self.top_k = worths, capacity, scratch, top_k
        first = [sum(capacity[:scope]) for scope in range(len(capacity))]
        self.free = [set(range(first[s], first[s] + capacity[s])) for s in range(len(capacity))]
        self.slot: dict[Key, int] = {}  # of held experts
        self.predicted: set[Key] = set()  # protected until their layer is routed
        self.needed: set[Key] = set()  # protected until the layer is done
        self.log: list[tuple[int, int, int, int, int, int]] = []
        self.experts = 0
        self.dwell = guards["dwell"]
        self.per_layer = math.inf if guards["per_layer"] is None else guards["per_layer"]
        self.in_flight = math.inf if guards["in_flight"] is None else guards["in_flight"]
        self.under_way: set[Key] = set()  # nobody reports a copy as complete here
        self.stale = stale
        self.snapshots: list[dict[Key, Any]] = []  # every expert's worth when each step began
        self.index, self.given = 0, dict[int, int]()  # the step; the step in which a slot was given away

    def step(self, index: int, ids: list[list[list[int]]], ahead: list[list[tuple[int, list[int]]]] | None) -> None:
        """`ids[layer]` lists every token's choices; `ahead[0]`, then `ahead[layer + 1]`, what to prefetch when."""
        layers, self.index = len(ids), index
        self.worths.now = index * layers - 1
        everyone = [(layer, expert) for layer in range(layers) for expert in range(self.experts)]
        self.snapshots.append({key: self.worths.of(key) for key in everyone})
        if ahead is not None:
            self._prefetch(ahead[0])
        for layer in range(layers):
            self.worths.now = index * layers + layer
            self._layer(layer, Counter(expert for token in ids[layer] for expert in token))
            if ahead is not None:
                self._prefetch(ahead[layer + 1])
            self.needed.clear()

    def _layer(self, layer: int, tokens: Counter[int]) -> None:
        missing = [(layer, expert) for expert in tokens if (layer, expert) not in self.slot]
        self.predicted = {key for key in self.predicted if key[0] != layer}
        self.under_way = {key for key in self.under_way if key[0] != layer}
        self.needed = {(layer, expert) for expert in tokens}
        for key in self.needed:
            self.worths.routed.setdefault(key, []).append(self.worths.now)
        in_demand_order = sorted(missing, key=lambda key: (-tokens[key[1]], key[1]))
        choosing = in_demand_order
        if self.worths.bypass:  # what is worth most chooses first
            choosing = sorted(in_demand_order, key=self._worth, reverse=True)
        rows = {}
        for key in choosing:
            found = self._slot_for(key, self._worth(key) if self.worths.bypass else ANY)
            if found is not None:
                rows[key] = found
        for key in in_demand_order:
            if key in rows:
                self._write(DEMAND, key, *rows[key])
        streamed = [key for key in in_demand_order if key not in rows]
        for i, key in enumerate(streamed):
            self._write(STREAM, key, sum(self.capacity) + i % self.scratch, -1)

    def _prefetch(self, wanted: Iterable[tuple[int, list[int]]]) -> None:
        room = min(self.per_layer, max(0, self.in_flight - len(self.under_way)))
        for layer, experts in wanted:
            for key in ((layer, expert) for expert in experts):
                if key in self.predicted:
                    continue
                held = [k for k in self.slot if self._scope(k) == self._scope(key)]
                protected = [k for k in held if k in self.needed or k in self.predicted]
                if key not in protected and self.capacity[self._scope(key)] - len(protected) - 1 < self.top_k:
                    break  # room is made for the best first
                if key not in self.slot:
                    found = self._slot_for(key, self._worth_of_newcomer(key), self.dwell) if room else None
                    if found is None:
                        continue
                    room -= 1
                    self.under_way.add(key)
                    self._write(PREFETCH, key, *found)
                self.predicted.add(key)

    def _slot_for(self, key: Key, worth: Any, dwell: int = 0) -> tuple[int, int] | None:
        """Hold `key` in a free slot, else in that of an unprotected expert worth less: (slot, victim's key).

        Who has held a slot for fewer than `dwell` steps keeps it.
        """
        scope = self._scope(key)
        victim = -1
        if self.free[scope]:
            slot = min(self.free[scope])
            self.free[scope].remove(slot)
        else:
            candidates = [
                (self._worth(k), k)
                for k in self.slot
                if self._scope(k) == scope and k not in self.needed and k not in self.predicted
                if self.index - self.given[self.slot[k]] >= dwell
            ]
            if not candidates or not (worth is ANY or min(candidates)[0] < worth):
                return None
            loser = min(candidates)[1]
            victim = loser[0] * self.experts + loser[1]
            slot = self.slot.pop(loser)
        self.slot[key], self.given[slot] = slot, self.index
        self.worths.entered[key] = self.worths.now
        return slot, victim

    def _worth(self, key: Key) -> Any:
        """Now, or as seen by whoever learns of it `stale` steps later."""
        return self.snapshots[max(0, self.index + 1 - self.stale)][key] if self.stale else self.worths.of(key)

    def _worth_of_newcomer(self, key: Key) -> Any:
        own = type(self.worths).of_newcomer is not Worths.of_newcomer
        return self.worths.of_newcomer(key) if own else self._worth(key)

    def _scope(self, key: Key) -> int:
        return key[0] if len(self.capacity) > 1 else 0

    def _write(self, kind: int, key: Key, slot: int, victim: int) -> None:
        self.log.append((self.worths.now, kind, *key, slot, victim))


def fixed_distance(ahead: list[list[list[list[int]]]], distances: Sequence[int], distance: int, layers: int):
    """What `prefetch: lookahead` asks for, in order: after source s (0: the embedding), [(layer, experts), ...].

    `ahead[token][source][column]` lists predicted experts, best first: the i-th of n gets n - i votes.
    """

    def ranked(source: int, column: int) -> list[int]:
        votes: Counter[int] = Counter()
        for token in ahead:
            predicted = token[source][column]
            for place, expert in enumerate(predicted):
                if expert >= 0:
                    votes[expert] += len(predicted) - place
        return sorted(votes, key=lambda expert: (-votes[expert], expert))

    at_start = [(d - 1, ranked(0, i)) for i, d in enumerate(distances) if d <= min(distance, layers)]
    after = [
        [(layer + distance, ranked(layer + 1, distances.index(distance)))] if layer + distance < layers else []
        for layer in range(layers)
    ]
    return [at_start, *after]


def perfect(uses: list[list[set[int]]], distance: int, step: int) -> list[list[tuple[int, list[int]]]]:
    """What `prefetch: oracle` asks for: what is needed `distance` layer-steps on, in the next step too."""
    layers, steps = len(uses), len(uses[0])

    def at(moment: int) -> tuple[int, list[int]]:
        known = moment < layers * steps
        return moment % layers, sorted(uses[moment % layers][moment // layers]) if known else []

    first = [at(moment) for moment in range(min(distance, layers))] if step == 0 else []
    return [first, *([at(step * layers + layer + distance)] for layer in range(layers))]
