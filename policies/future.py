"""What is still to come in a trace, for oracle policies and for the clairvoyant bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import Trace
from .compiled import compiled


class Future:
    """Every use of every expert, as layer-step indices: event = step * layers + layer, steps counted from 0."""

    def __init__(self, trace: Trace) -> None:
        model = trace.meta.model
        self.layers, self.experts = len(model.moe_layers), model.experts
        step = np.repeat(np.arange(len(trace.step_starts) - 1), np.diff(trace.step_starts))
        self.begin, self.events = _uses(trace.experts, step, self.experts, trace.absent)

    def uses(self) -> NDArray[np.int64]:
        """[U, 2] of (event, layer * experts + expert), ordered by event, then expert: all needs of the trace."""
        keys = np.repeat(np.arange(self.layers * self.experts), np.diff(self.begin))
        order = np.lexsort((keys, self.events))
        return np.stack((self.events[order], keys[order]), axis=1)

    def popularity(self) -> NDArray[np.int64]:
        """[layers, experts]: in how many steps each expert is needed."""
        return np.diff(self.begin).reshape(self.layers, self.experts)

    def first_use(self) -> NDArray[np.float64]:
        """[layers, experts]: event of the first use; inf when there is none."""
        used = np.diff(self.begin) > 0
        first = np.full(len(used), np.inf)
        first[used] = self.events[self.begin[:-1][used]]
        return first.reshape(self.layers, self.experts)

    def next_use(self, layer: int, experts: NDArray[np.int32], event: int) -> NDArray[np.float64]:
        """[n]: event of each expert's first use after `event`; inf when there is none."""
        return _next_use(self.begin, self.events, layer * self.experts + experts.astype(np.int64), event)


@compiled
def _uses(ids, step, experts, absent):  # type: ignore[no-untyped-def]
    """Uses grouped by (layer, expert), ascending in time, one per step: offsets [L*E+1] and events [U]."""
    rows, layers, k = ids.shape
    seen = np.full(layers * experts, -1, np.int64)
    begin = np.zeros(layers * experts + 1, np.int64)
    for row in range(rows):
        for layer in range(layers):
            for i in range(k):
                expert = ids[row, layer, i]
                if expert != absent and seen[layer * experts + expert] != step[row]:
                    seen[layer * experts + expert] = step[row]
                    begin[layer * experts + expert + 1] += 1
    begin = np.cumsum(begin)
    events = np.empty(begin[-1], np.int64)
    fill = begin[:-1].copy()
    seen[:] = -1
    for row in range(rows):
        for layer in range(layers):
            for i in range(k):
                expert = ids[row, layer, i]
                key = layer * experts + expert
                if expert != absent and seen[key] != step[row]:
                    seen[key] = step[row]
                    events[fill[key]] = step[row] * layers + layer
                    fill[key] += 1
    return begin, events


@compiled
def _next_use(begin, events, keys, event):  # type: ignore[no-untyped-def]
    found = np.empty(len(keys), np.float64)
    for i in range(len(keys)):
        uses = events[begin[keys[i]] : begin[keys[i] + 1]]
        at = np.searchsorted(uses, event, side="right")
        found[i] = uses[at] if at < len(uses) else np.inf
    return found
