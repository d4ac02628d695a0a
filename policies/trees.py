"""Sums of regression trees as flat arrays: evaluated without the library that grew them, the same value for value."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled

Trees = dict[str, NDArray[Any]]
LEAF = -1


def packed_forest(forest: Any) -> Trees:
    """The mean of a fitted scikit-learn `RandomForestRegressor` with one output."""
    grown = [estimator.tree_ for estimator in forest.estimators_]
    roots = np.cumsum([0, *(tree.node_count for tree in grown)])[:-1]
    leaf = np.concatenate([tree.children_left < 0 for tree in grown])
    children = [
        np.concatenate([side + root for side, root in zip(sides, roots, strict=True)])
        for sides in ([t.children_left for t in grown], [t.children_right for t in grown])
    ]
    return _arrays(
        np.concatenate([tree.feature for tree in grown]),
        np.concatenate([tree.threshold for tree in grown]),
        *children,
        np.concatenate([tree.value[:, 0, 0] for tree in grown]) / len(grown),
        leaf,
        roots,
        0.0,
    )


def packed_boosting(boosting: Any) -> Trees:
    """The sum of a fitted scikit-learn `HistGradientBoostingRegressor` of numerical features, none missing."""
    grown = [trees[0].nodes for trees in boosting._predictors]
    roots = np.cumsum([0, *(len(nodes) for nodes in grown)])[:-1]
    every = np.concatenate(grown)
    start = np.repeat(roots, [len(nodes) for nodes in grown])
    return _arrays(
        every["feature_idx"], every["num_threshold"], every["left"] + start, every["right"] + start, every["value"],
        every["is_leaf"].astype(bool), roots, float(np.ravel(boosting._baseline_prediction)[0]),
    )  # fmt: skip


def _arrays(
    feature: NDArray[Any],
    threshold: NDArray[Any],
    left: NDArray[Any],
    right: NDArray[Any],
    value: NDArray[Any],
    leaf: NDArray[np.bool_],
    roots: NDArray[Any],
    start: float,
) -> Trees:
    return {
        "feature": np.where(leaf, LEAF, feature).astype(np.int16),
        "threshold": np.where(leaf, value, threshold).astype(np.float64),  # of a leaf: its value
        "left": np.where(leaf, 0, left).astype(np.int32),
        "right": np.where(leaf, 0, right).astype(np.int32),
        "roots": roots.astype(np.int32),
        "start": np.array([start], np.float64),
    }


@compiled
def sum_of_trees(row, feature, threshold, left, right, roots, start):  # type: ignore[no-untyped-def]
    """The prediction for one row [F] of float32 features."""
    total = start[0]
    for node in roots:
        while feature[node] >= 0:
            node = left[node] if row[feature[node]] <= threshold[node] else right[node]
        total += threshold[node]
    return total
