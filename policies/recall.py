"""How good predictions are: recall and precision at several widths, exact sets, and the union over a batch.

These are different questions (notes of many papers mix them): a predictor may have half of every set right and no set
whole, and the union over a batch is easier the larger the batch.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import Trace
from .predictor import Predictions


def recall_table(predictions: Predictions, trace: Trace) -> dict[str, Any]:
    """Per distance and overall: recall and precision at k, 1.5k and 2k, exact sets at k, batch-union recall at k.

    A target is a layer of the same step or, past its last layer, of a later step of the same request: that is judged
    for the last row of the request in each step, where anything is said of it. Each (token, layer) counts once per
    distance. Batches are the trace's steps.
    """
    (layers, k), experts = trace.experts.shape[1:], trace.meta.model.experts
    table: dict[str, Any] = {}
    pooled = _Counts.empty()
    for i, distance in enumerate(predictions.distances):
        counts = _Counts.empty()
        for column, moment in enumerate(predictions.moments):
            steps, target = divmod(moment + distance, layers)
            said = predictions.experts[:, column, i]
            rows, later = _later(trace, steps)
            if steps:
                spoken = (said[rows] < experts).any(axis=1)
                rows, later = rows[spoken], later[spoken]
            if len(rows):
                starts = np.flatnonzero(np.diff(trace.step[rows], prepend=-1))
                counts += _count(said[rows], trace.experts[later, target], starts, experts, k)
        if counts.needed[0]:
            table[str(distance)] = counts.figures()
            pooled += counts
    return {"overall": pooled.figures(), "by_distance": table} if pooled.needed[0] else {}


class _Counts:
    """Sums over (token, layer): needed, proposed and right at each width; whole sets; unions."""

    def __init__(self, values: NDArray[np.int64]) -> None:
        self.values = values  # [3 widths, needed | proposed | right], then a row of sets, exact, 0 and one of unions

    @classmethod
    def empty(cls) -> _Counts:
        return cls(np.zeros((5, 3), np.int64))

    def __iadd__(self, other: _Counts) -> _Counts:
        self.values += other.values
        return self

    @property
    def needed(self) -> NDArray[np.int64]:
        return self.values[:, 0]

    def figures(self) -> dict[str, float]:
        widths, sets, union = self.values[:3], self.values[3], self.values[4]
        found = {}
        for name, (needed, proposed, right) in zip(("k", "1.5k", "2k"), widths.tolist(), strict=True):
            found[f"recall@{name}"] = right / max(1, needed)
            found[f"precision@{name}"] = right / max(1, proposed)
        whole, unions = float(sets[1] / max(1, sets[0])), float(union[2] / max(1, union[0]))
        return {**found, "exact_set": whole, "union_recall@k": unions}


def _later(trace: Trace, steps: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows, ascending, and for each the row of its request that many of the request's own steps later."""
    if steps == 0:
        return np.arange(trace.rows), np.arange(trace.rows)
    order = np.argsort(trace.request, kind="stable")
    request, step = trace.request[order], trace.step[order]
    ends = np.append((request[1:] != request[:-1]) | (step[1:] != step[:-1]), True)[: len(order)]
    last = order[ends]
    same = trace.request[last[:-steps]] == trace.request[last[steps:]]
    rows, later = last[:-steps][same], last[steps:][same]
    ascending = np.argsort(rows)
    return rows[ascending], later[ascending]


def _count(predicted: NDArray[Any], truth: NDArray[Any], starts: NDArray[np.int64], experts: int, k: int) -> _Counts:
    """`predicted` [N, M], likeliest first, against `truth` [N, K]; batches begin at rows `starts`."""
    rows = np.arange(len(truth))[:, None]
    needed = _members(truth, experts)
    counts = np.zeros((5, 3), np.int64)
    ranks = np.full((len(truth), experts + 1), predicted.shape[1])
    clipped = np.minimum(predicted.astype(np.int64), experts)
    for rank in range(predicted.shape[1] - 1, -1, -1):
        ranks[rows, clipped[:, [rank]]] = rank
    ranks = ranks[:, :experts]
    for at, width in enumerate((k, ceil(1.5 * k), 2 * k)):
        proposed = ranks < min(width, predicted.shape[1])
        counts[at] = needed.sum(), proposed.sum(), (needed & proposed).sum()
        if at == 0:
            counts[3] = len(truth), (needed == proposed).all(axis=1).sum(), 0
            union_needed = np.logical_or.reduceat(needed, starts, axis=0)
            union_proposed = np.logical_or.reduceat(proposed, starts, axis=0)
            counts[4] = union_needed.sum(), union_proposed.sum(), (union_needed & union_proposed).sum()
    return _Counts(counts)


def _members(ids: NDArray[Any], experts: int) -> NDArray[np.bool_]:
    """[N, E]: which experts are among `ids` [N, K]."""
    found = np.zeros((len(ids), experts + 1), np.bool_)
    np.put_along_axis(found, np.minimum(ids.astype(np.int64), experts), True, axis=1)
    return found[:, :experts]


def popular(trace: Trace, judged: Trace, moments: tuple[int, ...], distances: tuple[int, ...]) -> Predictions:
    """The baseline that knows nothing of a token: for every row of `judged` the experts most used in `trace`."""
    layers, experts = trace.experts.shape[1], trace.meta.model.experts
    width = min(experts, 2 * trace.experts.shape[2])
    said = np.empty((len(moments), len(distances), width), trace.experts.dtype)
    for column, moment in enumerate(moments):
        for i, distance in enumerate(distances):
            uses = _members(trace.experts[:, (moment + distance) % layers], experts).sum(axis=0)
            said[column, i] = np.argsort(-uses, kind="stable")[:width]
    shape = (judged.rows, *said.shape)
    return Predictions(moments, distances, np.broadcast_to(said, shape), np.ones(shape, np.float16))
