"""Each request's own figures, so that two runs can be compared request by request."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import DECODE, PREFILL, REJECTED, Trace
from .batches import Steps
from .measurements import Measurements


def per_request(trace: Trace, steps: Steps, measured: Measurements) -> dict[str, list[Any]]:
    """Columns, one entry per request in ascending order.

    `tokens`: decode rows that were not rejected. `tpot_s`, `wait_s`: duration and exposed wait of a decode row's step,
    the mean over the request's decode rows; a step that several requests share counts for each of them, whole.
    `ttft_s`: as in `first_tokens`. None where a request has no such rows.
    """
    requests, index = np.unique(trace.request, return_inverse=True)
    step = np.repeat(np.arange(len(steps)), steps.tokens)
    decode = trace.phase == DECODE
    rows = np.bincount(index[decode], minlength=len(requests))
    kept = np.bincount(index[decode & ((trace.flags & REJECTED) == 0)], minlength=len(requests))
    duration = measured.steps["end_ps"] - measured.steps["start_ps"]
    first = dict(zip(*(values.tolist() for values in first_tokens(trace, steps, measured)), strict=True))
    return {
        "request": requests.tolist(),
        "tokens": kept.tolist(),
        "tpot_s": _means(duration[step], index, decode, rows),
        "ttft_s": [first.get(request) for request in requests.tolist()],
        "wait_s": _means(measured.steps["wait_ps"][step], index, decode, rows),
    }


def first_tokens(trace: Trace, steps: Steps, measured: Measurements) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Requests with prefill rows, and seconds from arrival (or from the start of the request's first step) to the end
    of its last prefill step."""
    prefill = np.flatnonzero(trace.phase == PREFILL)
    step = np.repeat(np.arange(len(steps)), steps.tokens)[prefill]
    requests, index = np.unique(trace.request[prefill], return_inverse=True)
    began, ended = np.full(len(requests), np.inf), np.zeros(len(requests))
    np.minimum.at(began, index, measured.steps["start_ps"][step] / 1e12)
    np.maximum.at(ended, index, measured.steps["end_ps"][step] / 1e12)
    arrival = {r.id: r.arrival_s for r in trace.meta.requests if r.arrival_s is not None}
    starts = [arrival.get(int(r), start) for r, start in zip(requests, began, strict=True)]
    return requests, ended - np.array(starts)


def _means(
    time_ps: NDArray[np.int64], index: NDArray[np.int64], counted: NDArray[np.bool_], rows: NDArray[np.int64]
) -> list[float | None]:
    """Seconds: per request, the mean of `time_ps` [N] over its counted rows. Whole picoseconds are added up."""
    total = np.zeros(len(rows), np.int64)
    np.add.at(total, index[counted], time_ps[counted])
    return [None if not n else ps / 1e12 / n for ps, n in zip(total.tolist(), rows.tolist(), strict=True)]
