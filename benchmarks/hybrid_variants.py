"""The hybrid predictor's correction by a random forest (the paper's), boosted trees and a small network.

    python benchmarks/hybrid_variants.py [--trace TRACE]

Fitted on every other request, judged on a sample of (token, moment, distance) of the others. `call` is the correction
alone for one token at one moment, all distances, by this repository's evaluation, single-threaded. Prints one line per
learner. On the bundled recording, on a busy two-core machine (times of single lines varied by more than half between
two runs):

    learner         recall@k recall@2k  call us  fit s
    base alone        0.6714
    forest 24 x 10    0.7370    0.8763       41     32
    forest 40 x 10    0.7370    0.8762      109     66
    forest 12 x 8     0.7342    0.8744       17     16
    boosted 60 x 31   0.7380    0.8767       92      4
    boosted 30 x 15   0.7328    0.8733       30      2
    network 32, 16    0.7392    0.8775       14     18

Offered are the forest of 12 x 8 (`hybrid`, the paper's learner, in `expertflow-a`) and the network (`hybrid-network`,
in `expertflow-a-network`), which finds as much or more in less time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from moeflow.policies import hybrid
from moeflow.policies.hybrid_features import BASE, FEATURES, describe_all
from moeflow.policies.hybrid_network import fit_network
from moeflow.policies.network import NETWORK_ARRAYS, add_network
from moeflow.policies.policy_command import _halves
from moeflow.policies.routing_statistics import tables
from moeflow.policies.trees import TREE_ARRAYS, add_trees, packed, packed_forest
from moeflow.traces.bundled import BUNDLED_TRACE
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor

import moeflow

JUDGED = 20_000  # (token, moment, distance)
Correct = Callable[[NDArray[np.float32]], NDArray[Any]]  # [R, F] -> [R]


def forest(trees: int, depth: int) -> Callable[[Any, Any], Correct]:
    def fit(rows: NDArray[np.float32], target: NDArray[np.float32]) -> Correct:
        grown = RandomForestRegressor(trees, max_depth=depth, min_samples_leaf=20, max_features=0.5, random_state=0)
        return _of_trees(packed_forest(grown.fit(rows, target)))

    return fit


def boosted(trees: int, leaves: int) -> Callable[[Any, Any], Correct]:
    def fit(rows: NDArray[np.float32], target: NDArray[np.float32]) -> Correct:
        grown = HistGradientBoostingRegressor(
            max_iter=trees, max_leaf_nodes=leaves, early_stopping=False, random_state=0
        )
        grown.fit(rows, target)
        nodes = [
            (n["feature_idx"], n["num_threshold"], n["left"], n["right"], n["value"], n["is_leaf"].astype(bool))
            for n in (parts[0].nodes for parts in grown._predictors)
        ]
        return _of_trees(packed(nodes, float(np.ravel(grown._baseline_prediction)[0])))

    return fit


def network(rows: NDArray[np.float32], target: NDArray[np.float32]) -> Correct:
    arrays = fit_network(rows, target)
    return _by(add_network, tuple(arrays[name] for name in NETWORK_ARRAYS))


def _of_trees(trees: dict[str, NDArray[Any]]) -> Correct:
    return _by(add_trees, tuple(trees[name] for name in TREE_ARRAYS))


def _by(add: Callable[..., None], arrays: tuple[NDArray[Any], ...]) -> Correct:
    def correct(values: NDArray[np.float32]) -> NDArray[Any]:
        total = np.zeros(len(values))
        for start in range(0, len(values), 96):  # as many as one call describes
            add(values[start : start + 96], *arrays, total[start : start + 96])
        return total

    return correct


@dataclass
class Judged:
    """Candidates [P, C] with features [P, C, F] and the truth [P, K]."""

    candidates: NDArray[np.int64]
    features: NDArray[np.float32]
    truth: NDArray[Any]

    def recall(self, demand: NDArray[Any], width: int) -> float:
        best = np.argsort(-demand, axis=1, kind="stable")[:, :width]
        named = np.take_along_axis(self.candidates, best, axis=1)
        return float((named[:, :, None] == self.truth[:, None, :]).any(axis=1).mean())


def describe(fitted_on: moeflow.Trace, judged: moeflow.Trace) -> Judged:
    """A sample of the judged trace, described with the other requests' tables."""
    base, distances = hybrid.base_of(fitted_on)
    across = hybrid.spans_of(distances)
    made = tables(fitted_on, across, np.ones(fitted_on.rows, np.bool_))
    layers = judged.experts.shape[1]
    of_row = [(m, i) for m in range(-1, layers) for i, d in enumerate(distances) if m + d < layers]
    flat = np.random.default_rng(1).choice(judged.rows * len(of_row), JUDGED)
    picked = np.column_stack((flat // len(of_row), np.array(of_row)[flat % len(of_row)]))
    width = hybrid.width_of(judged)
    found = Judged(
        np.zeros((JUDGED, width), np.int64),
        np.zeros((JUDGED, width, len(FEATURES)), np.float32),
        judged.experts[picked[:, 0], picked[:, 1] + np.array(distances)[picked[:, 2]]],
    )
    near, far = hybrid._spans(distances, across)
    columns = hybrid._columns(judged, distances, base)
    views = hybrid._views(judged, made, base)
    describe_all(picked, np.array(distances), near, far, columns, views, found.candidates, found.features)
    return found


VARIANTS = {
    "forest 24 x 10": forest(24, 10),
    "forest 40 x 10": forest(40, 10),
    "forest 12 x 8": forest(12, 8),
    "boosted 60 x 31": boosted(60, 31),
    "boosted 30 x 15": boosted(30, 15),
    "network 32, 16": network,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--trace", type=Path, default=BUNDLED_TRACE)
    fitted_on, judged = _halves(moeflow.load_trace(arguments.parse_args().trace), "odd")
    base, distances = hybrid.base_of(fitted_on)
    rows, target = hybrid.training_rows(fitted_on, base, distances, hybrid.spans_of(distances))
    sample, k = describe(fitted_on, judged), judged.experts.shape[2]
    before = sample.features[:, :, BASE]
    print(f"{len(rows)} training rows, {base}")
    print(f"{'learner':16} recall@k recall@2k  call us  fit s")
    print(f"{'base alone':16} {sample.recall(before, k):8.4f}")
    for name, fit in VARIANTS.items():
        begun = perf_counter()
        correct = fit(rows, target)
        fitting = perf_counter() - begun
        demand = before + correct(sample.features.reshape(-1, len(FEATURES))).reshape(before.shape)
        one, took = sample.features[: len(distances)].reshape(-1, len(FEATURES)), []
        for _ in range(200):
            begun = perf_counter()
            correct(one)
            took.append(perf_counter() - begun)
        at_k, at_2k = sample.recall(demand, k), sample.recall(demand, 2 * k)
        print(f"{name:16} {at_k:8.4f} {at_2k:9.4f} {np.median(took) * 1e6:8.0f} {fitting:6.0f}")


if __name__ == "__main__":
    main()
