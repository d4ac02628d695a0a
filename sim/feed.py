"""What an engine is fed: the rows of each step, and the earliest moment at which it may begin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import DECODE, PREFILL, Trace
from .batches import Steps
from .batching import ATTENDED, CACHED, HELD_KEYS, OUTPUTS, PROMPT_ROWS, START_PS, Queue
from .cost import Batch, picoseconds

Rows = slice | NDArray[np.int64]


@dataclass(frozen=True)
class Formed:
    """One step: its rows of the trace, when it may begin, and the requests whose first or last rows it has."""

    start_ps: int
    rows: Rows
    batch: Batch
    phase: int
    beginning: list[int]
    ending: list[int]


class RecordedFeed:
    """The trace's own steps, each once all its requests have arrived."""

    def __init__(self, trace: Trace, steps: Steps) -> None:
        self._trace, self._steps, self._next = trace, steps, 0
        self._arrivals = {r.id: picoseconds(r.arrival_s) for r in trace.meta.requests if r.arrival_s is not None}
        self._lives = _Lives(trace)

    def next(self, now_ps: int) -> Formed | None:
        """The step after the one before, which has ended at `now_ps`; None when that was the last."""
        step = self._next
        if step == len(self._steps):
            return None
        self._next += 1
        rows = slice(int(self._steps.starts[step]), int(self._steps.starts[step + 1]))
        start = now_ps
        if self._arrivals:
            due = (self._arrivals.get(int(request), 0) for request in np.unique(self._trace.request[rows]))
            start = max(now_ps, *due)
        phase = DECODE if self._steps.decode[step] else PREFILL
        return Formed(start, rows, self._steps.batches[step], phase, *self._lives.at(rows))


class ContinuousFeed:
    """Steps formed while the run goes on; see batching.py."""

    def __init__(self, trace: Trace, token_budget: int, key_room: int) -> None:
        self._queue, self._budget, self._room = Queue.of(trace), token_budget, key_room
        self._trace, self._lives = trace, _Lives(trace)
        self._formed: list[NDArray[np.int64]] = []
        self.most_keys = 0  # cached tokens in device memory at their most

    def next(self, now_ps: int) -> Formed | None:
        """The step that may begin at `now_ps` or, when nothing runs, at the next arrival; None at the end."""
        taken = self._queue.next(now_ps, self._budget, self._room)
        if not taken:
            return None
        rows, figures = self._queue.chosen[:taken].copy(), self._queue.figures.tolist()
        self._formed.append(rows)
        self.most_keys = max(self.most_keys, figures[HELD_KEYS])
        batch = Batch(taken, figures[ATTENDED], figures[CACHED], figures[OUTPUTS])
        phase = PREFILL if figures[PROMPT_ROWS] else DECODE
        return Formed(figures[START_PS], rows, batch, phase, *self._lives.at(rows))

    def trace(self) -> Trace:
        """The rows in the steps that were formed so far."""
        order: NDArray[np.int64] = np.concatenate(self._formed) if self._formed else np.zeros(0, np.int64)
        step = np.repeat(np.arange(len(self._formed)), [len(rows) for rows in self._formed])
        return self._trace.reordered(order, step.astype(np.int32))


class _Lives:
    """Which rows are a request's first and last."""

    def __init__(self, trace: Trace) -> None:
        self._request = trace.request
        self._first, self._last = np.zeros((2, trace.rows), np.bool_)
        self._first[np.unique(trace.request, return_index=True)[1]] = True
        self._last[trace.rows - 1 - np.unique(trace.request[::-1], return_index=True)[1]] = True

    def at(self, rows: Rows) -> tuple[list[int], list[int]]:
        """Requests that begin and that end with these rows, by id."""
        requests: NDArray[Any] = self._request[rows]
        return np.sort(requests[self._first[rows]]).tolist(), np.sort(requests[self._last[rows]]).tolist()
