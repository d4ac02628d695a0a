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

    A target is a layer of the same step; each (token, layer) counts once per distance. Batches are the trace's steps.
    """
    k, layers = trace.experts.shape[2], trace.experts.shape[1]
    table: dict[str, Any] = {}
    pooled = _Counts.empty()
    for i, distance in enumerate(predictions.distances):
        counts = _Counts.empty()
        for column, moment in enumerate(predictions.moments):
            target = moment + distance
            if target < layers:
                counts += _count(predictions.experts[:, column, i], trace, target, k)
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
        return {**found, "exact_set": sets[1] / max(1, sets[0]), "union_recall@k": union[2] / max(1, union[0])}


def _count(predicted: NDArray[Any], trace: Trace, layer: int, k: int) -> _Counts:
    """`predicted` [N, M] for `layer`, likeliest first."""
    experts, rows = trace.meta.model.experts, np.arange(trace.rows)[:, None]
    needed = _members(trace.experts[:, layer], experts)
    counts = np.zeros((5, 3), np.int64)
    ranks = np.full((trace.rows, experts + 1), predicted.shape[1])
    clipped = np.minimum(predicted.astype(np.int64), experts)
    for rank in range(predicted.shape[1] - 1, -1, -1):
        ranks[rows, clipped[:, [rank]]] = rank
    ranks = ranks[:, :experts]
    for at, width in enumerate((k, ceil(1.5 * k), 2 * k)):
        proposed = ranks < min(width, predicted.shape[1])
        counts[at] = needed.sum(), proposed.sum(), (needed & proposed).sum()
        if at == 0:
            counts[3] = trace.rows, (needed == proposed).all(axis=1).sum(), 0
            starts = trace.step_starts[:-1]
            union_needed = np.logical_or.reduceat(needed, starts, axis=0)
            union_proposed = np.logical_or.reduceat(proposed, starts, axis=0)
            counts[4] = union_needed.sum(), union_proposed.sum(), (union_needed & union_proposed).sum()
    return _Counts(counts)


def _members(ids: NDArray[Any], experts: int) -> NDArray[np.bool_]:
    """[N, E]: which experts are among `ids` [N, K]."""
    found = np.zeros((len(ids), experts + 1), np.bool_)
    np.put_along_axis(found, np.minimum(ids.astype(np.int64), experts), True, axis=1)
    return found[:, :experts]
