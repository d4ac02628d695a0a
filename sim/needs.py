"""What a trace needs, layer-step by layer-step, as flat arrays: what replays without a clock read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import compiled
from ..policies.future import Future
from ..traces.trace import Trace


@dataclass(frozen=True)
class Needs:
    """V layer-steps (event = step * layers + layer) that need A experts in all; one of those A is an *access*.

    `begin` [V+1]: event v needs `expert[begin[v]:begin[v+1]]`, ascending, with `tokens` each. `demand` lists the same
    experts in demand order: most tokens first, then lowest id.
    """

    layers: int
    experts: int  # per layer
    begin: NDArray[np.int64]
    expert: NDArray[np.int32]
    tokens: NDArray[np.int32]
    demand: NDArray[np.int32]

    @property
    def events(self) -> int:
        return len(self.begin) - 1

    @property
    def of_layer(self) -> NDArray[np.int64]:
        """[L] accesses of each layer."""
        return np.diff(self.begin).reshape(-1, self.layers).sum(axis=0)

    def keys(self) -> NDArray[np.int64]:
        """[A] layer * experts + expert of every access, in order: the trace as a cache simulator reads it."""
        layer = np.repeat(np.arange(self.events) % self.layers, np.diff(self.begin))
        return layer * self.experts + self.expert


def needs_of(trace: Trace) -> Needs:
    """The distinct experts of every layer-step of `trace`; absent entries are skipped."""
    model = trace.meta.model
    arrays = _distinct(trace.experts, trace.step_starts, model.experts)
    return Needs(len(model.moe_layers), model.experts, *arrays)


def following(needs: Needs, future: Future) -> NDArray[np.float64]:
    """[A]: moment of each access's next use (`Future.next_use`); inf when there is none."""
    return _following(needs.begin, needs.expert, needs.layers, needs.experts, future.begin, future.moments)


@compiled
def _distinct(ids, starts, experts):  # type: ignore[no-untyped-def]
    steps, layers, width = len(starts) - 1, ids.shape[1], ids.shape[2]
    begin = np.zeros(steps * layers + 1, np.int64)
    expert = np.empty(ids.size, np.int32)
    tokens = np.empty(ids.size, np.int32)
    counts = np.zeros(experts, np.int32)
    n, most = 0, 0
    for step in range(steps):
        for layer in range(layers):
            first = n
            for row in range(starts[step], starts[step + 1]):
                for i in range(width):
                    chosen = ids[row, layer, i]
                    if chosen < experts:
                        if counts[chosen] == 0:
                            at = n
                            while at > first and expert[at - 1] > chosen:
                                expert[at] = expert[at - 1]
                                at -= 1
                            expert[at] = chosen
                            n += 1
                        counts[chosen] += 1
            for i in range(first, n):
                tokens[i] = counts[expert[i]]
                most = max(most, tokens[i])
                counts[expert[i]] = 0
            begin[step * layers + layer + 1] = n
    expert, tokens = expert[:n].copy(), tokens[:n].copy()
    if most < 2:
        return begin, expert, tokens, expert
    demand = np.empty(n, np.int32)
    for event in range(len(begin) - 1):
        first, last = begin[event], begin[event + 1]
        demand[first:last] = expert[first:last][np.argsort(-tokens[first:last], kind="mergesort")]
    return begin, expert, tokens, demand


@compiled
def _following(begin, expert, layers, experts, first_use, moments):  # type: ignore[no-untyped-def]
    found = np.full(len(expert), np.inf)
    use = first_use[:-1].copy()
    for event in range(len(begin) - 1):
        for i in range(begin[event], begin[event + 1]):
            key = event % layers * experts + expert[i]
            use[key] += 1
            if use[key] < first_use[key + 1]:
                found[i] = moments[use[key]]
    return found
