"""The two-medoid token scheduler: its distance to the optimal split, what it saves, and the time it takes.

    python benchmarks/two_medoid.py [TRACE]

Splits pairs of batches by the paths that were recorded, so this is what the split can do with perfect predictions.
"""

from __future__ import annotations

import sys
from statistics import mean, median
from time import perf_counter

import numpy as np
from moeflow.policies.two_medoid import better_split, optimal_split, two_medoid, union_cost
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.lockstep import lockstep
from moeflow.traces.reader import load_trace
from moeflow.traces.trace import DECODE, Trace

OPTIMAL = (4, 6, 8, 10, 12)  # paths in a pair, for which every split is tried
TIMED = (8, 16, 32, 64)
PAIRS = 60


def recorded_paths(trace: Trace, count: int, pairs: int) -> list[np.ndarray]:
    """[count, L * E] paths of decode steps in lockstep batches of `count`, evenly spread over the trace."""
    batches = lockstep(trace, count)
    starts, decode = batches.step_starts, batches.phase == DECODE
    whole = [s for s in range(len(starts) - 1) if starts[s + 1] - starts[s] == count and decode[starts[s]]]
    experts = trace.meta.model.experts
    found = []
    for step in np.array(whole)[np.linspace(0, len(whole) - 1, pairs).astype(int)]:
        ids = np.minimum(batches.experts[starts[step] : starts[step + 1]].astype(np.int64), experts)
        paths = np.zeros((*ids.shape[:2], experts + 1), np.bool_)
        np.put_along_axis(paths, ids, True, axis=2)
        found.append(paths[:, :, :experts].reshape(count, -1))
    return found


def main() -> None:
    trace = load_trace(sys.argv[1] if len(sys.argv) > 1 else BUNDLED_TRACE)
    print("paths  recorded  two-medoid  kept if better  optimal  mean gap to the optimum (kept if better)")
    for count in OPTIMAL:
        costs = []
        for paths in recorded_paths(trace, count, PAIRS):
            before = (np.arange(count) >= count // 2).astype(np.int64)
            splits = (before, two_medoid(paths), better_split(paths, before), optimal_split(paths))
            costs.append([union_cost(paths, split) for split in splits])
        means = np.mean(costs, axis=0)
        gaps = [mean(row[i] / row[3] - 1 for row in costs) for i in (1, 2)]
        print(f"{count:5d}", *(f"{value:10.1f}" for value in means), f"   {gaps[0]:.2%} ({gaps[1]:.2%})")
    print("\npaths  recorded  kept if better  saved  ms per split  us per pair of paths")
    for count in TIMED:
        costs, times = [], []
        for paths in recorded_paths(trace, count, PAIRS):
            before = (np.arange(count) >= count // 2).astype(np.int64)
            began = perf_counter()
            after = better_split(paths, before)
            times.append(perf_counter() - began)
            costs.append((union_cost(paths, before), union_cost(paths, after)))
        recorded, split = np.mean(costs, axis=0)
        took = median(times)
        print(
            f"{count:5d} {recorded:9.1f} {split:15.1f} {1 - split / recorded:6.2%} {took * 1e3:13.3f} "
            f"{took / count**2 * 1e6:12.2f}"
        )


if __name__ == "__main__":
    main()
