"""What a trace needs, layer-step by layer-step, as flat arrays: what replays without a clock read."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import compiled
from ..traces.trace import Trace


class Needs(NamedTuple):
    """V layer-steps (event = step * layers + layer) that need A experts in all; one of those A is an *access*.

    Event v needs `expert[begin[v]:begin[v+1]]`, ascending, with `tokens` each; `demand` lists the same experts in
    demand order: most tokens first, then lowest id. The rest is what a policy may read beside them.
    """

    layers: int
    experts: int  # per layer
    begin: NDArray[np.int64]  # [V+1]
    expert: NDArray[np.int32]  # [A]
    tokens: NDArray[np.int32]  # [A]
    demand: NDArray[np.int32]  # [A]
    ids: NDArray[Any]  # [N, L, K] as the router gave them
    starts: NDArray[np.int64]  # [S+1] rows of each step
    place: NDArray[np.int64]  # [N] where each row's sequence lives in what a policy keeps per sequence
    opens: NDArray[np.bool_]  # [N] the first row of its sequence

    @property
    def of_layer(self) -> NDArray[np.int64]:
        """[L] accesses of each layer."""
        return np.diff(self.begin).reshape(-1, self.layers).sum(axis=0)

    @property
    def widest(self) -> int:
        """Experts of the largest needed set."""
        return int(np.diff(self.begin).max(initial=0))

    def keys(self) -> NDArray[np.int64]:
        """[A] layer * experts + expert of every access, in order: the trace as a cache simulator reads it."""
        layer = np.repeat(np.arange(len(self.begin) - 1) % self.layers, np.diff(self.begin))
        return layer * self.experts + self.expert


def needs_of(trace: Trace) -> Needs:
    """The distinct experts of every layer-step of `trace`, absent entries skipped; worked out once."""
    if "needs" not in trace.derived:
        model, starts = trace.meta.model, trace.step_starts.astype(np.int64)
        ids = np.ascontiguousarray(trace.experts)
        begin, expert, tokens, demand = _distinct(ids, starts, model.experts)
        trace.derived["needs"] = Needs(
            len(model.moe_layers), model.experts, begin, expert, tokens, demand, ids, starts, *_places(trace)
        )
    found: Needs = trace.derived["needs"]
    return found


def _places(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """A place is free again in the step after its sequence's last row."""
    requests, first, of_row = np.unique(trace.request, return_index=True, return_inverse=True)
    last = trace.rows - 1 - np.unique(trace.request[::-1], return_index=True)[1]
    place = np.zeros(len(requests), np.int64)
    free, used = [], 0
    leaving = iter(sorted(range(len(requests)), key=last.__getitem__))
    next_out = next(leaving, -1)
    for request in np.argsort(first, kind="stable").tolist():
        while next_out >= 0 and trace.step[last[next_out]] < trace.step[first[request]]:
            free.append(place[next_out])
            next_out = next(leaving, -1)
        place[request] = free.pop() if free else used
        used += place[request] == used
    opens = np.zeros(trace.rows, np.bool_)
    opens[first] = True
    return place[of_row.ravel()], opens


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
