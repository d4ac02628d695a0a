"""Fit the weights of `policies/moeflow.py` on one half of the requests, judge them on the other.

    python benchmarks/fit_moeflow.py [--traces ../shared/traces] [--refit]

Without --refit the weights in the policy are judged; with it, the ones fitted now. Either way the last column judges
weights fitted without the trace in question. The rival is LRFU with the best of nine half-lives, chosen on the fitting
half, per trace, capacity and scope. Hits are event-atomic, of decode steps, caches and counts start empty; the scores
and the residency are the policies' own code. Requests 0, 2, 4 … fit and 1, 3, 5 … judge; of fewer than four requests
the first and the second half of each. Intervals: 95 %, paired bootstrap over requests, of the difference in hit rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
from moeflow.policies import lrfu, moeflow
from moeflow.policies.compiled import compiled
from moeflow.policies.planning import plan_demand, protect, release, union
from moeflow.policies.residency import Slots
from moeflow.policies.routed import Routed
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.model_spec import Attention, ModelSpec
from moeflow.traces.trace import DECODE, TraceMeta
from numpy.typing import NDArray

from moeflow import load_trace

HALF_LIVES = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)  # of the rival, times experts / top-k steps
MOST_FITTING_STEPS = 1500  # of one trace, so that fitting stays cheap
MOST_TUNING_STEPS = 5000  # the rival's half-life is chosen on so many
LEAST_STEPS = 400  # shorter halves are judged but fit nothing
FARTHEST = 8.0  # a next use later than this, in units of experts / top-k steps, counts as this late
touch_lrfu = lrfu._touch
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Recorded:
    """`ids` [T, L, K] and `request` [T] by row, and `starts` [S + 1], `decode` [S] by step."""

    name: str
    ids: NDArray[np.int64]
    request: NDArray[np.int64]
    starts: NDArray[np.int64]
    decode: NDArray[np.bool_]
    experts: int

    @property
    def unit(self) -> float:
        return self.experts / self.ids.shape[2]

    def keep(self, steps: NDArray[np.bool_]) -> Recorded:
        rows = np.repeat(steps, np.diff(self.starts))
        starts = np.concatenate(([0], np.cumsum(np.diff(self.starts)[steps])))
        return replace(self, ids=self.ids[rows], request=self.request[rows], starts=starts, decode=self.decode[steps])

    def half(self, which: int) -> Recorded:
        """For fitting (0) or judging (1)."""
        request = self.request[self.starts[:-1]]
        known = np.unique(request)
        if len(known) >= 4:
            return self.keep(np.isin(request, known[which::2]))
        kept = np.zeros(len(request), bool)
        for one in known:
            steps = np.flatnonzero(request == one)
            kept[steps[: len(steps) // 2] if which == 0 else steps[len(steps) // 2 :]] = True
        return self.keep(kept)

    def first(self, steps: int) -> Recorded:
        return self.keep(np.arange(len(self.decode)) < steps)

    def capacities(self) -> list[int]:
        """2k, 3k, a quarter and half of the experts, as slots per layer."""
        top_k = self.ids.shape[2]
        return sorted({2 * top_k, 3 * top_k, self.experts // 4, self.experts // 2} & set(range(top_k, self.experts)))


def load(folder: Path) -> list[Recorded]:
    """The bundled recording, and every .npz of the folder: one row per step."""
    bundled = load_trace(BUNDLED_TRACE)
    starts = bundled.step_starts.astype(np.int64)
    columns = bundled.experts.astype(np.int64), bundled.request.astype(np.int64), starts
    traces = [Recorded("bundled", *columns, bundled.phase[starts[:-1]] == DECODE, bundled.meta.model.experts)]
    for path in sorted(folder.glob("*.npz")):
        arrays = np.load(path)
        experts = json.loads(path.with_suffix(".json").read_text())["num_experts"]
        rows = len(arrays["seq_id"])
        columns = arrays["expert_ids"].astype(np.int64), arrays["seq_id"].astype(np.int64), np.arange(rows + 1)
        traces.append(Recorded(path.stem.removesuffix("_decode"), *columns, arrays["phase"] == DECODE, experts))
    return traces


def drive(trace: Recorded) -> Iterator[tuple[int, int, moeflow.Moeflow]]:
    """(step, layer, policy) after each touch of a fresh moeflow."""
    layers, top_k = trace.ids.shape[1:]
    sizes = {"hidden": 1, "intermediate": 1, "attention": Attention("gqa", 1, 1, 1), "vocabulary": 1}
    model = ModelSpec(trace.name, layers, tuple(range(layers)), trace.experts, top_k, **sizes)
    policy = moeflow.Moeflow()
    policy.start(TraceMeta(model), Slots((1,) * layers), None)
    request = trace.request.astype(np.int32)
    ends, begun = dict(zip(request.tolist(), range(len(request)), strict=True)), set()
    for step, (first, last) in enumerate(pairwise(trace.starts.tolist())):
        here = sorted(set(request[first:last].tolist()))
        for one in here:
            if one not in begun:
                policy.request_begins(one)
                begun.add(one)
        for layer in range(layers):
            ids = np.ascontiguousarray(trace.ids[first:last, layer])
            needed, tokens = union(ids, trace.experts)
            event, held = step * layers + layer, np.zeros(len(needed), bool)
            policy.touch(Routed(event, step, layer, ids, None, request[first:last], None, needed, tokens, held, {}))
            yield step, layer, policy
        for one in here:
            if ends[one] < last:
                policy.request_ends(one)


def moments(trace: Recorded) -> tuple[Floats, Floats]:
    """Covariance of moeflow's terms [7, 7], and of terms and target [7], where the target's horizon can be seen."""
    target = -np.log2(np.minimum(next_use(trace.ids, trace.starts, trace.experts) / trace.unit, FARTHEST))
    last = len(trace.decode) - int(FARTHEST * trace.unit)
    n, sums, products = 0, np.zeros(moeflow.TERMS + 1), np.zeros((moeflow.TERMS + 1, moeflow.TERMS + 1))
    for step, layer, policy in drive(trace):
        if step < last:
            both = np.column_stack((policy.terms[layer], target[step, layer]))
            n, sums, products = n + len(both), sums + both.sum(0), products + both.T @ both
    covariance = products / n - np.outer(sums / n, sums / n)
    return covariance[:-1, :-1], covariance[:-1, -1]


def fit(of: list[tuple[Floats, Floats]]) -> Floats:
    """Least squares in which every trace has the same say."""
    terms, target = sum(m[0] for m in of), sum(m[1] for m in of)
    return np.linalg.solve(terms + 1e-3 * np.diag(np.diag(terms)), target)


def moeflow_scores(trace: Recorded, weights: list[Floats]) -> list[Floats]:
    """[S, L, E] of each of `weights`."""
    scores = [np.zeros((len(trace.decode), trace.ids.shape[1], trace.experts)) for _ in weights]
    for step, layer, policy in drive(trace):
        for score, weight in zip(scores, weights, strict=True):
            score[step, layer] = policy.terms[layer] @ weight
    return scores


@compiled
def next_use(ids, starts, experts):  # type: ignore[no-untyped-def]
    """[S, L, E] steps to the next use after each step; 1e9 where there is none."""
    steps = len(starts) - 1
    distance = np.full((steps, ids.shape[1], experts), np.float32(1e9))
    for step in range(steps - 2, -1, -1):
        distance[step] = distance[step + 1] + 1
        for row in range(starts[step + 1], starts[step + 2]):
            for layer in range(ids.shape[1]):
                for i in range(ids.shape[2]):
                    if ids[row, layer, i] < experts:
                        distance[step, layer, ids[row, layer, i]] = 1
    return distance


@compiled
def lrfu_scores(ids, starts, experts, half_life):  # type: ignore[no-untyped-def]
    """[S, L, E]"""
    scores = np.full((len(starts) - 1, ids.shape[1], experts), -np.inf)
    for step in range(len(starts) - 1):
        for layer in range(ids.shape[1]):
            if step:
                scores[step, layer] = scores[step - 1, layer]
            needed, _ = union(ids[starts[step] : starts[step + 1], layer].copy(), experts)
            touch_lrfu(scores[step, layer], needed, step / half_life)
    return scores


@compiled
def replay(ids, starts, scores, capacity, pooled, bypass):  # type: ignore[no-untyped-def]
    """[2, S] held and needed under given scores: `capacity` slots in every layer, or as many in one pool."""
    steps, layers, experts = scores.shape
    counts = np.zeros((2, steps))
    scopes = 1 if pooled else layers
    first_slot = np.arange(scopes + 1) * (capacity * layers // scopes)
    score, slot_of = np.full((layers, experts), -np.inf), np.full((layers, experts), np.int32(-1))
    guard, holder = np.zeros((layers, experts), np.uint8), np.full(capacity * layers, -1)
    used, guarded = np.zeros(scopes, np.int64), np.zeros(scopes, np.int64)
    for step in range(steps):
        for layer in range(layers):
            scope = 0 if pooled else layer
            needed, tokens = union(ids[starts[step] : starts[step + 1], layer].copy(), experts)
            held = protect(slot_of[layer], guard[layer], needed, guarded, scope)
            counts[0, step] += held.sum()
            counts[1, step] += len(needed)
            score[layer] = scores[step, layer]
            plan_demand(
                layer, needed, tokens, held, scope, bypass, 2, score, slot_of, guard, holder, first_slot, used, guarded
            )
            release(slot_of[layer], guard[layer], needed, guarded, scope)
    return counts


def hits(trace: Recorded, scores: Floats, capacity: int, pooled: bool, bypass: bool) -> Floats:
    """[2, decode steps]"""
    return replay(trace.ids, trace.starts, scores, capacity, pooled, bypass)[:, trace.decode]


def rate(counts: Floats) -> float:
    return float(counts[0].sum() / counts[1].sum())


def rival(fitting: Recorded, judging: Recorded, pooled: bool) -> Iterator[tuple[float, Floats]]:
    """Per capacity: LRFU's best half-life on the fitting half, and its counts on the judging half."""
    tuning, best = fitting.first(MOST_TUNING_STEPS), {}
    for half_life in HALF_LIVES:
        scores = lrfu_scores(tuning.ids, tuning.starts, tuning.experts, half_life * tuning.unit)
        for capacity in judging.capacities():
            found = (rate(hits(tuning, scores, capacity, pooled, False)), half_life)
            best[capacity] = max(best.get(capacity, found), found)
    for capacity, (_, half_life) in best.items():
        scores = lrfu_scores(judging.ids, judging.starts, judging.experts, half_life * judging.unit)
        yield half_life, hits(judging, scores, capacity, pooled, False)


def interval(trace: Recorded, ours: Floats, theirs: Floats) -> str:
    """95 % bootstrap interval of the difference in hit rate, in points; of few requests, over blocks of 50 tokens."""
    request = np.unique(trace.request[trace.starts[:-1]][trace.decode], return_inverse=True)[1]
    groups = request if request.max() >= 19 else np.arange(len(request)) // 50
    if groups.max() < 4:
        return "[too short]"
    counts = [np.stack([np.bincount(groups, row) for row in rows]) for rows in (ours, theirs)]
    draws = np.random.default_rng(0).integers(0, groups.max() + 1, (2000, groups.max() + 1))
    rates = [count[0][draws].sum(1) / count[1][draws].sum(1) for count in counts]
    low, high = np.percentile(rates[0] - rates[1], [2.5, 97.5])
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]"


def judge(trace: Recorded, weights: Floats, without: Floats) -> None:
    """One table row per capacity: hit rates on the judging half, and the difference with its interval."""
    fitting, judging = trace.half(0), trace.half(1)
    ours, left_out = moeflow_scores(judging, [weights, without])
    lru = lrfu_scores(judging.ids, judging.starts, judging.experts, 1e-3)
    rivals = zip(rival(fitting, judging, False), rival(fitting, judging, True), strict=True)
    for capacity, ((half_life, theirs), (_, pooled)) in zip(judging.capacities(), rivals, strict=True):
        mine = hits(judging, ours, capacity, True, moeflow.Moeflow.bypass)
        figures = (
            trace.name, f"{capacity} of {trace.experts}", f"{rate(hits(judging, lru, capacity, False, False)):.4f}",
            f"{rate(theirs):.4f} ({half_life:g})", f"{rate(pooled):.4f}",
            f"{rate(hits(judging, ours, capacity, False, moeflow.Moeflow.bypass)):.4f}", f"**{rate(mine):.4f}**",
            f"{100 * (rate(mine) - rate(theirs)):+.2f} {interval(judging, mine, theirs)}",
            f"{rate(hits(judging, left_out, capacity, True, moeflow.Moeflow.bypass)):.4f}",
        )  # fmt: skip
        print("| " + " | ".join(figures) + " |", flush=True)


def cost(trace: Recorded) -> float:
    """Microseconds of one touch on this machine, with its Python call and the making of its event."""
    some = trace.first(150)
    seconds = []
    for _ in range(3):
        begin = perf_counter()
        for _ in drive(some):
            pass
        seconds.append(perf_counter() - begin)
    return 1e6 * min(seconds) / len(some.decode) / some.ids.shape[1]


HEADINGS = (
    "trace", "slots per layer", "LRU", "LRFU (half-life)", "LRFU, one pool", "moeflow per layer", "moeflow",
    "points over LRFU", "fitted without this trace",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--refit", action="store_true", help="judge the weights fitted now, not the policy's")
    options = parser.parse_args()
    traces = load(options.traces)
    halves = {trace.name: trace.half(0).first(MOST_FITTING_STEPS) for trace in traces}
    of = {name: moments(half) for name, half in halves.items() if len(half.decode) >= LEAST_STEPS}
    fitted = fit(list(of.values()))
    print("fitted on", ", ".join(of), fitted.round(3).tolist(), "in the policy", list(moeflow.WEIGHTS))
    weights = fitted if options.refit else np.array(moeflow.WEIGHTS)
    print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|")
    for trace in traces:
        judge(trace, weights, fit([moment for name, moment in of.items() if name != trace.name]))
    print(
        "microseconds per touch:",
        ", ".join(f"{t.experts} experts, top {t.ids.shape[2]}: {cost(t):.1f}" for t in traces),
    )


if __name__ == "__main__":
    main()
