"""What is still to come in a trace, for oracle policies and for the clairvoyant bound."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import Trace
from .compiled import compiled


def future_of(trace: Trace) -> Future:
    """The trace's future, worked out once."""
    if "future" not in trace.derived:
        trace.derived["future"] = Future(trace)
    found: Future = trace.derived["future"]
    return found


class Future:
    """Every use of every expert, as layer-step indices: event = step * layers + layer, steps counted from 0."""

    def __init__(self, trace: Trace) -> None:
        model = trace.meta.model
        self.layers, self.experts = len(model.moe_layers), model.experts
        step = np.repeat(np.arange(len(trace.step_starts) - 1), np.diff(trace.step_starts))
        self.begin, self.events = _uses(trace.experts, step, self.experts, trace.absent)
        self._moments = _moments(self.begin, self.events, self.experts)

    @cached_property
    def _uses(self) -> NDArray[np.int64]:
        keys = np.repeat(np.arange(self.layers * self.experts), np.diff(self.begin))
        return np.stack((self.events[self._order], keys[self._order]), axis=1)

    def uses(self) -> NDArray[np.int64]:
        """[U, 2] of (event, layer * experts + expert), ordered by event, then expert: all needs of the trace."""
        return self._uses

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """From the order of `events` to that of `uses`; being stable, the sort leaves an event's keys ascending."""
        return np.argsort(self.events, kind="stable")

    def first_of_event(self) -> NDArray[np.int64]:
        """[events + 2]: where each event's uses begin in `uses` and `following`; the last entries are their number."""
        uses = self.uses()
        events = int(uses[-1, 0]) + 2 if len(uses) else 1
        return np.searchsorted(uses[:, 0], np.arange(events + 1)).astype(np.int64)

    def following(self) -> NDArray[np.float64]:
        """[U]: for every use, in the order of `uses`, the moment of the same expert's next one; inf when none."""
        after = np.full(len(self.events), np.inf)
        after[:-1] = self._moments[1:]
        after[self.begin[1:][np.diff(self.begin) > 0] - 1] = np.inf
        return after[self._order]

    def popularity(self) -> NDArray[np.int64]:
        """[layers, experts]: in how many steps each expert is needed."""
        return np.diff(self.begin).reshape(self.layers, self.experts)

    def first_use(self) -> NDArray[np.float64]:
        """[layers, experts]: moment of the first use; inf when there is none."""
        used = np.diff(self.begin) > 0
        first = np.full(len(used), np.inf)
        first[used] = self._moments[self.begin[:-1][used]]
        return first.reshape(self.layers, self.experts)

    def next_use(self, layer: int, experts: NDArray[np.int32], event: int) -> NDArray[np.float64]:
        """[n]: moment of each expert's first use after `event`; inf when there is none.

        A moment is the event plus a fraction below 1 that orders the experts of one event by when they are needed
        after it: a layer protects what it needs, so of two experts that it needs the one held should be the one
        that is needed again sooner.
        """
        keys = layer * self.experts + experts.astype(np.int64)
        return _next_use(self.begin, self.events, self._moments, keys, event)


@compiled
def _uses(ids, step, experts, absent):  # type: ignore[no-untyped-def]
    """Uses grouped by (layer, expert), ascending in time, one per step: offsets [L*E+1] and events [U]."""
    rows, layers, k = ids.shape
    seen = np.full(layers * experts, -1, np.int64)
    begin = np.zeros(layers * experts + 1, np.int64)
    for row in range(rows):
        for layer in range(layers):
            for i in range(k):
                expert = np.int64(ids[row, layer, i])  # an unsigned byte would wrap below
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
                expert = np.int64(ids[row, layer, i])  # an unsigned byte would wrap below
                key = layer * experts + expert
                if expert != absent and seen[key] != step[row]:
                    seen[key] = step[row]
                    events[fill[key]] = step[row] * layers + layer
                    fill[key] += 1
    return begin, events


@compiled
def _moments(begin, events, experts):  # type: ignore[no-untyped-def]
    """[U]: each use's event, plus its rank among the event's uses by the moment of the next use, over `experts`."""
    moments = np.empty(len(events), np.float64)
    following = np.full(len(events), np.inf)
    key_of = np.empty(len(events), np.int64)
    for key in range(len(begin) - 1):
        key_of[begin[key] : begin[key + 1]] = key
    order = np.argsort(events, kind="mergesort")
    stop = len(order)
    while stop > 0:
        start = stop
        while start > 0 and events[order[start - 1]] == events[order[stop - 1]]:
            start -= 1
        uses = order[start:stop]
        ranks = np.argsort(following[uses], kind="mergesort")
        for rank in range(len(uses)):
            use = uses[ranks[rank]]
            moments[use] = events[use] + rank / experts
            if use > begin[key_of[use]]:
                following[use - 1] = moments[use]
        stop = start
    return moments


@compiled
def _next_use(begin, events, moments, keys, event):  # type: ignore[no-untyped-def]
    found = np.empty(len(keys), np.float64)
    for i in range(len(keys)):
        first, last = begin[keys[i]], begin[keys[i] + 1]
        at = first + np.searchsorted(events[first:last], event, side="right")
        found[i] = moments[at] if at < last else np.inf
    return found
