"""Fit the weights of `policies/moeflow.py` on one half of the requests, judge them on the other.

    python benchmarks/fit_moeflow.py [--traces ../shared/traces] [--fit]

Without --fit the weights in the policy are judged. The rival is LRFU with the best of nine half-lives, chosen on the
fitting half, per trace and capacity. Hits are event-atomic, caches start cold, one cache per layer; the kernels are
the policies' own. Intervals: 95 %, bootstrap over requests, of the difference in hit rate.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from moeflow.policies import lrfu, moeflow
from moeflow.policies.compiled import compiled
from moeflow.policies.residency import _plan_demand, _protect, _release, _union
from numpy.typing import NDArray
from scipy.optimize import minimize

MOST_FITTING_TOKENS = 1500  # of one trace, so that none outweighs the others
union, protect, release, plan_demand = _union, _protect, _release, _plan_demand
touch_moeflow, touch_lrfu = moeflow._touch, lrfu._touch


@dataclass(frozen=True)
class Recorded:
    """One trace: `ids` [T, L, K], one token per step, and the sequence of each token."""

    name: str
    ids: NDArray[np.int64]
    sequence: NDArray[np.int64]
    experts: int

    def half(self, which: int) -> Recorded:
        """Requests 0, 2, 4 … (0) or 1, 3, 5 … (1); of fewer than four requests the first or second half of each."""
        requests = np.unique(self.sequence)
        if len(requests) >= 4:
            kept = np.isin(self.sequence, requests[which::2])
        else:
            kept = np.zeros(len(self.ids), bool)
            for request in requests:
                rows = np.flatnonzero(self.sequence == request)
                kept[rows[: len(rows) // 2] if which == 0 else rows[len(rows) // 2 :]] = True
        return Recorded(self.name, self.ids[kept], self.sequence[kept], self.experts)

    def capacities(self) -> list[int]:
        """2k, 3k, a quarter and half of the experts, as slots per layer."""
        top_k = self.ids.shape[2]
        return sorted({2 * top_k, 3 * top_k, self.experts // 4, self.experts // 2} & set(range(top_k, self.experts)))


def load(folder: Path) -> list[Recorded]:
    """Every recorded .npz of the folder."""
    traces = []
    for path in sorted(folder.glob("*.npz")):
        arrays = np.load(path)
        experts = json.loads(path.with_suffix(".json").read_text())["num_experts"]
        name = path.stem.removesuffix("_decode")
        traces.append(Recorded(name, arrays["expert_ids"].astype(np.int64), arrays["seq_id"].astype(np.int64), experts))
    return traces


@compiled
def replay(ids, experts, capacity, weights, rate, recency, affinity, half_life):  # type: ignore[no-untyped-def]
    """[T] hits and needs per token. `half_life` above 0 replays LRFU, else moeflow."""
    steps, layers, top_k = ids.shape
    hits, needs = np.zeros(steps), np.zeros(steps)
    places = np.zeros(1, np.int64)
    first_slot = np.array([0, capacity])
    for layer in range(layers):
        score = np.full((1, experts), -np.inf) if half_life > 0 else np.zeros((1, experts))
        slot_of, guard = np.full((1, experts), np.int32(-1)), np.zeros((1, experts), np.uint8)
        holder, used, guarded = np.full(capacity, -1), np.zeros(1, np.int64), np.zeros(1, np.int64)
        uses, linear = np.full((experts, len(rate)), -30.0), np.full(experts, -30.0 * weights.sum())
        last, popularity, sources = np.full(experts, -1), np.zeros(experts), np.zeros(experts)
        followed, before = np.zeros((experts, experts), np.float32), np.full((1, top_k), experts)
        for step in range(steps):
            chosen = ids[step : step + 1, layer].copy()
            needed, tokens = union(chosen, experts)
            held = protect(slot_of[0], guard[0], needed, guarded, 0)
            hits[step] += held.sum()
            needs[step] += len(needed)
            if half_life > 0:
                touch_lrfu(score[0], needed, step / half_life)
            else:
                touch_moeflow(
                    chosen, needed, tokens, step, places, before, weights, rate, uses, linear, last, popularity,
                    step + 1.0, followed, sources, recency, affinity, score[0],
                )  # fmt: skip
            plan_demand(0, needed, tokens, held, 0, False, 2, score, slot_of, guard, holder, first_slot, used, guarded)
            release(slot_of[0], guard[0], needed, guarded, 0)
    return hits, needs


def scores(trace: Recorded, capacity: int, theta: NDArray[np.float64], half_life: float = 0.0) -> NDArray[np.float64]:
    """[2, T] hits and needs under the weights `theta` (nine, recency, affinity), or LRFU."""
    unit = trace.experts / trace.ids.shape[2]
    rate = 1 / (moeflow.HALF_LIVES * unit)
    hits, needs = replay(trace.ids, trace.experts, capacity, theta[:-2], rate, theta[-2], theta[-1], half_life * unit)
    return np.stack((hits, needs))


def rate_of(counts: NDArray[np.float64]) -> float:
    return float(counts[0].sum() / counts[1].sum())


def best_half_life(trace: Recorded, capacity: int, theta: NDArray[np.float64]) -> float:
    return max(moeflow.HALF_LIVES, key=lambda half_life: rate_of(scores(trace, capacity, theta, half_life)))


def fit(traces: list[Recorded], start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights that raise the mean hit rate over traces and capacities of the fitting halves (Powell's method)."""
    halves = [t.half(0) for t in traces if len(t.ids) >= 500]
    halves = [Recorded(t.name, t.ids[:MOST_FITTING_TOKENS], t.sequence, t.experts) for t in halves]
    cells = [(t, capacity) for t in halves for capacity in t.capacities()]

    def loss(x: NDArray[np.float64]) -> float:
        return -float(np.mean([rate_of(scores(trace, capacity, normal(x))) for trace, capacity in cells]))

    bounds = [(0, 1)] * (len(start) - 2) + [(-1, 1), (0, 3)]
    return normal(minimize(loss, start, method="Powell", bounds=bounds, options={"xtol": 0.02, "ftol": 1e-4}).x)


def normal(theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nine weights sum to one."""
    theta = theta.copy()
    theta[:-2] /= theta[:-2].sum()
    return theta


def judge(trace: Recorded, theta: NDArray[np.float64]) -> None:
    """One line per capacity: hit rates on the unseen half, and the difference with its interval."""
    fitting, judging = trace.half(0), trace.half(1)
    for capacity in trace.capacities():
        half_life = best_half_life(fitting, capacity, theta)
        ours, rival = scores(judging, capacity, theta), scores(judging, capacity, theta, half_life)
        lru = scores(judging, capacity, theta, 1e-4)
        low, high = interval(judging, ours, rival)
        print(
            f"{trace.name:32s} {capacity:3d} of {trace.experts:3d}  lru {rate_of(lru):.4f}  "
            f"lrfu({half_life:g}) {rate_of(rival):.4f}  moeflow {rate_of(ours):.4f}  "
            f"{100 * (rate_of(ours) - rate_of(rival)):+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}]"
        )


def interval(trace: Recorded, ours: NDArray[np.float64], rival: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of the difference in hit rate; of few requests, over blocks of 50 tokens."""
    requests = np.unique(trace.sequence, return_inverse=True)[1]
    groups = requests if requests.max() >= 19 else np.arange(len(requests)) // 50
    counts = [np.stack([np.bincount(groups, row) for row in rows]) for rows in (ours, rival)]
    draws = np.random.default_rng(0).integers(0, groups.max() + 1, (2000, groups.max() + 1))
    rates = [count[0][draws].sum(1) / count[1][draws].sum(1) for count in counts]
    low, high = np.percentile(rates[0] - rates[1], [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--fit", action="store_true")
    options = parser.parse_args()
    traces = load(options.traces)
    defaults = moeflow.Moeflow()
    theta = np.array([*moeflow.WEIGHTS, defaults.recency, defaults.affinity])
    if options.fit:
        theta = fit(traces, theta)
        print("weights", theta[:-2].round(3).tolist(), "recency, affinity", theta[-2:].round(3).tolist())
    for trace in traces:
        judge(trace, normal(theta))


if __name__ == "__main__":
    main()
