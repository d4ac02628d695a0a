"""Continuous batching: which rows the next step holds (Orca's iteration-level scheduling, with chunked prompts).

One function on plain arrays, so that every engine forms the same batches. Requests are numbered in the order in which
they are served: by arrival, then by their first row in the trace. R requests, N rows.

`requests` [R, 6] and `rows` [N, 4] have the columns named below; `running` [R] lists requests that hold memory, in
order; `counts` [3] says how many were admitted, how many run and how many keys are set aside for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import bare
from ..traces.trace import DECODE, Trace
from .cost import picoseconds

# Of a request: when it is there, the keys (cached tokens) it has at its end, its first row that was in no step before
# this one, its first that is not in this step either, where its rows end, and the keys it has after this step.
ARRIVAL_PS, KEYS, NEXT, STEP, END, HELD = range(6)
# Of a row: its index in the trace, its position, 1 if it decodes, and the end of the rows that may go with it:
# of a decode row the rows of its recorded pass, of a prompt row the prompt's.
ROW, POSITION, DECODES, UNTIL = range(4)
ADMITTED, RUNNING, RESERVED = range(3)
# Of the batch: see `cost.Batch`; then prompt rows, keys that all running requests hold after it, its earliest start.
TOKENS, ATTENDED, CACHED, OUTPUTS, PROMPT_ROWS, HELD_KEYS, START_PS = range(7)


@bare
def next_batch(  # type: ignore[no-untyped-def]
    now_ps, token_budget, key_room, requests, rows, running, counts, chosen, figures
):
    """Form the step that begins at `now_ps` or, when nothing runs, at the next arrival.

    Requests that have ended leave, then those that have arrived are admitted while all their keys fit `key_room`,
    first come, first served. Running requests decode one pass each as far as `token_budget` goes; what is left goes
    to prompts, cut where it ends. A pass larger than the budget goes first or not at all.

    Writes trace rows to `chosen` [N] and `figures` [7]; returns how many rows, 0 when every request has ended.
    """
    kept = 0
    for i in range(counts[RUNNING]):
        request = running[i]
        requests[request, NEXT] = requests[request, STEP]
        if requests[request, NEXT] < requests[request, END]:
            running[kept] = request
            kept += 1
        else:
            counts[RESERVED] -= requests[request, KEYS]
    start = now_ps
    if kept == 0 and counts[ADMITTED] < len(requests):
        start = max(start, requests[counts[ADMITTED], ARRIVAL_PS])
    while counts[ADMITTED] < len(requests):
        request = counts[ADMITTED]
        if requests[request, ARRIVAL_PS] > start or counts[RESERVED] + requests[request, KEYS] > key_room:
            break
        counts[ADMITTED] += 1
        counts[RESERVED] += requests[request, KEYS]
        running[kept] = request
        kept += 1
    counts[RUNNING] = kept
    figures[:] = 0
    figures[START_PS] = start
    taken = 0
    for decoding in (1, 0):
        for i in range(kept):
            request = running[i]
            at = requests[request, NEXT]
            if rows[at, DECODES] != decoding:
                continue
            size = rows[at, UNTIL] - at
            if decoding == 1 and taken > 0 and taken + size > token_budget:
                continue
            if decoding == 0:
                size = min(size, token_budget - taken)
                if size <= 0:
                    break
            longest = 0
            for row in range(at, at + size):
                keys = rows[row, POSITION] + 1
                figures[ATTENDED] += keys
                longest = max(longest, keys)
                chosen[taken] = rows[row, ROW]
                taken += 1
            requests[request, STEP] = at + size
            requests[request, HELD] = max(requests[request, HELD], longest)
            figures[CACHED] += longest
            figures[OUTPUTS] += size if decoding == 1 else 1
            figures[PROMPT_ROWS] += 0 if decoding == 1 else size
    for i in range(kept):
        figures[HELD_KEYS] += requests[running[i], HELD]
    figures[TOKENS] = taken
    return taken


@dataclass(frozen=True)
class Queue:
    """The arrays that `next_batch` works on, and `ids` [R]: the trace's number of each request."""

    ids: NDArray[np.int64]
    requests: NDArray[np.int64]  # [R, 6]
    rows: NDArray[np.int64]  # [N, 4]
    running: NDArray[np.int64]  # [R]
    counts: NDArray[np.int64]  # [3]
    chosen: NDArray[np.int64]  # [N]
    figures: NDArray[np.int64]  # [7]

    @classmethod
    def of(cls, trace: Trace) -> Queue:
        """Every request of `trace` in its place; one without an arrival is there from the start."""
        ids, first, request = np.unique(trace.request, return_index=True, return_inverse=True)
        known = {r.id: picoseconds(r.arrival_s) for r in trace.meta.requests if r.arrival_s is not None}
        arrival = np.array([known.get(int(i), 0) for i in ids], np.int64)
        served = np.lexsort((first, arrival))
        place = np.empty(len(ids), np.int64)
        place[served] = np.arange(len(ids))
        turn = place[request.reshape(-1)]  # [N]: the place of each row's request
        order = np.argsort(turn, kind="stable")
        ends = np.searchsorted(turn[order], np.arange(len(ids)), side="right")
        begins = np.concatenate(([0], ends[:-1])).astype(np.int64)[: len(ids)]
        requests = np.zeros((len(ids), 6), np.int64)
        requests[:, ARRIVAL_PS], requests[:, END] = arrival[served], ends
        requests[:, NEXT] = requests[:, STEP] = begins
        rows = np.empty((trace.rows, 4), np.int64)
        rows[:, ROW], rows[:, POSITION] = order, trace.position[order]
        rows[:, DECODES] = trace.phase[order] == DECODE
        rows[:, UNTIL] = _ends_of_runs(turn[order], rows[:, DECODES], trace.step[order])
        if trace.rows:
            requests[:, KEYS] = np.maximum.reduceat(rows[:, POSITION] + 1, begins)
        return cls(
            ids[served].astype(np.int64), requests, rows, np.zeros(len(ids), np.int64), np.zeros(3, np.int64),
            np.zeros(trace.rows, np.int64), np.zeros(7, np.int64),
        )  # fmt: skip

    def next(self, now_ps: int, token_budget: int, key_room: int) -> int:
        """`next_batch` on these arrays."""
        return int(
            next_batch(
                now_ps, token_budget, key_room, self.requests, self.rows, self.running, self.counts, self.chosen,
                self.figures,
            )
        )  # fmt: skip


def _ends_of_runs(turn: NDArray[np.int64], decodes: NDArray[np.int64], step: NDArray[np.int32]) -> NDArray[np.int64]:
    """[N]: where the rows end that may go with each: a request's prompt, or one recorded pass of its decoding."""
    if not len(turn):
        return np.zeros(0, np.int64)
    breaks = (np.diff(turn) != 0) | (np.diff(decodes) != 0) | ((np.diff(step) != 0) & (decodes[1:] == 1))
    last = np.concatenate((np.flatnonzero(breaks) + 1, [len(turn)])).astype(np.int64)
    return np.repeat(last, np.diff(last, prepend=0))
