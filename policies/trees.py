"""Sums of regression trees as flat arrays: evaluated without the library that grew them, the same value for value.

Nodes lie level by level, siblings side by side, and a leaf leads to itself: every row takes the same number of steps
in a tree and no step is a branch, so that the rows' steps overlap in the processor (a third of the time of a
while-loop down each tree).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled

TREE_ARRAYS = ("feature", "threshold", "child", "value", "roots", "depths", "start")
Trees = dict[str, NDArray[Any]]  # under those names


def packed_forest(forest: Any) -> Trees:
    """The mean of a fitted scikit-learn `RandomForestRegressor` with one output."""
    grown = [estimator.tree_ for estimator in forest.estimators_]
    nodes = [
        (t.feature, t.threshold, t.children_left, t.children_right, t.value[:, 0, 0] / len(grown), t.children_left < 0)
        for t in grown
    ]
    return packed(nodes, 0.0)


def packed(trees: Sequence[tuple[NDArray[Any], ...]], start: float) -> Trees:
    """From each tree's feature, threshold, left and right child, value, and whether a node is a leaf."""
    parts, roots, depths, placed = [], [], [], 0
    for feature, threshold, left, right, value, leaf in trees:
        order, child, depth = _level_order(left.astype(np.int64), right.astype(np.int64), leaf)
        parts.append(
            (
                np.where(leaf[order], 0, feature[order]),
                np.where(leaf[order], np.inf, threshold[order]),
                child + placed,
                np.where(leaf[order], value[order], 0.0),
            )
        )
        roots.append(placed)
        depths.append(depth)
        placed += len(order)
    features, thresholds, children, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {
        "feature": features.astype(np.int16),
        "threshold": thresholds.astype(np.float64),
        "child": children.astype(np.int32),  # the left one; the right one comes next
        "value": values.astype(np.float64),
        "roots": np.array(roots, np.int32),
        "depths": np.array(depths, np.int32),
        "start": np.array([start], np.float64),
    }


def _level_order(
    left: NDArray[np.int64], right: NDArray[np.int64], leaf: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """(old index of each new node, new index of its left child or of itself, levels below the root)."""
    order, level, depth = [0], [0], 0
    child: list[int] = []
    while level:
        following = []
        for node in level:
            child.append(len(child) if leaf[node] else len(order))
            if not leaf[node]:
                pair = [int(left[node]), int(right[node])]
                order += pair
                following += pair
        depth += bool(following)
        level = following
    return np.array(order, np.int64), np.array(child, np.int64), depth


@compiled
def add_trees(rows, feature, threshold, child, value, roots, depths, start, total):  # type: ignore[no-untyped-def]
    """Add to `total` [C] the predictions for `rows` [C, F] of float32 features."""
    at = np.empty(len(rows), np.int64)
    for c in range(len(rows)):
        total[c] += start[0]
    for tree in range(len(roots)):
        at[:] = roots[tree]
        for _ in range(depths[tree]):
            for c in range(len(rows)):
                node = at[c]
                at[c] = child[node] + (rows[c, feature[node]] > threshold[node])
        for c in range(len(rows)):
            total[c] += value[at[c]]
