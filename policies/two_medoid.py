"""ExpertFlow's token scheduler (2410.17954, section on the token scheduler): two adjacent batches are split anew, so
that tokens with similar predicted routing paths share one and each needs fewer distinct experts.

Similarity is 1 - Hamming / (layers * experts). Two medoids, a balanced assignment, at most 30 rounds. Unlike the
authors' code, which draws first medoids at random and reads a cluster's number where it means its medoid, the first
two medoids are the least similar pair and balancing compares with the medoids (chosen here: no randomness).
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import DECODE, Trace
from .predictor import Predictions
from .schedule import Regrouped, Schedule

# Host time of one split: a line through the medians that `python benchmarks/two_medoid.py` gave for 8 to 64 paths of
# 16 layers x 64 experts (0.10, 0.14, 0.19, 0.28 ms) on one core of an AMD EPYC, taken to grow with a path's length.
FIXED_S = 90e-6
PER_ENTRY_S = 2.9e-9


class TwoMedoid(Schedule):
    """Two adjacent groups of requests run alternately; before each pair of decode steps their live requests are split
    anew by the paths predicted at step start. The former split stays unless the new one needs fewer experts by these.

    A group is a set of requests connected by shared steps; pairs of single requests are left alone. `merge: copy`
    reads and writes the KV cache of every request that changes batch, `reindex` only changes an index (paged caches).
    `rounds: 0` alternates and keeps the groups. The paper prepares a pair while the one before runs; here deciding
    is charged to the host before the pair begins, because its tokens are known no earlier.
    """

    needs = ("predicted",)

    def __init__(self, rounds: int = 30, merge: str = "copy") -> None:
        if rounds < 0 or merge not in ("copy", "reindex"):
            raise ValueError(f"rounds must be at least 0 and merge copy or reindex, got {rounds} and {merge}")
        self.rounds, self.merge = rounds, merge

    def regroup(self, trace: Trace, predictions: Predictions | None) -> Regrouped | None:
        if predictions is None:
            raise ValueError("two-medoid was driven without predictions")
        pairs = _pairs(trace)
        if not any(len(pair) == 2 for pair in pairs):
            return None
        paths = predicted_paths(predictions, trace)
        plan = _Plan()
        for pair in pairs:
            if len(pair) == 1:
                for rows in pair[0]:
                    plan.add(rows)
            else:
                self._alternate(plan, pair, trace, paths)
        return plan.regrouped(self.merge == "copy")

    def _alternate(self, plan: _Plan, pair: list[list[NDArray[np.int64]]], trace: Trace, paths: _Paths) -> None:
        """The j-th steps of both groups, one after the other, for every j."""
        batch_of: dict[int, int] = {}  # request -> 0 or 1
        for batch, group in enumerate(pair):
            batch_of.update(dict.fromkeys(trace.request[np.concatenate(group)].tolist(), batch))
        for turn in range(max(map(len, pair))):
            steps = [group[turn] for group in pair if turn < len(group)]
            rows = np.concatenate(steps)
            requests, index = np.unique(trace.request[rows], return_inverse=True)
            before = np.array([batch_of[request] for request in requests.tolist()])
            after, seconds = before, 0.0
            if len(steps) == 1:  # one group has ended: what is left runs together
                after = np.full_like(before, before.sum() * 2 > len(before))
            elif self.rounds and (trace.phase[rows] == DECODE).all():
                merged = np.zeros((len(requests), paths.width), np.bool_)  # a request's rows stay together
                np.logical_or.at(merged, index, paths.of(rows))
                after = better_split(merged, before, self.rounds)
                seconds = self.seconds(len(requests), paths.width)
            cached = np.zeros(len(requests), np.int64)
            np.maximum.at(cached, index, trace.position[rows])
            changed = after != before
            plan.charge(seconds, int(changed.sum()), int(cached[changed].sum()))
            batch_of.update(zip(requests.tolist(), after.tolist(), strict=True))
            for batch in (0, 1):
                plan.add(rows[after[index] == batch])

    @staticmethod
    def seconds(tokens: int, path: int) -> float:
        """Host time for one split of `tokens` paths with `path` (layer, expert) entries each."""
        return FIXED_S + PER_ENTRY_S * tokens * path

    def parameters(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "merge": self.merge}


class _Plan:
    """Steps in their new order, with what is charged before each."""

    def __init__(self) -> None:
        self.steps: list[NDArray[np.int64]] = []
        self.charges: dict[int, tuple[float, int, int]] = {}

    def add(self, rows: NDArray[np.int64]) -> None:
        if len(rows):
            self.steps.append(rows)

    def charge(self, seconds: float, moved: int, tokens: int) -> None:
        """To the step that is added next."""
        self.charges[len(self.steps)] = (seconds, moved, tokens)

    def regrouped(self, copies: bool) -> Regrouped:
        charges = [self.charges.get(step, (0.0, 0, 0)) for step in range(len(self.steps))]
        seconds, moved, tokens = (np.array(column) for column in zip(*charges, strict=True))
        step = np.repeat(np.arange(len(self.steps)), [len(rows) for rows in self.steps])
        return Regrouped(
            np.concatenate(self.steps), step.astype(np.int32), seconds, moved, tokens, tokens if copies else 0 * tokens
        )


class _Paths:
    """Predicted paths, unpacked row by row when they are asked for."""

    def __init__(self, experts: NDArray[Any], layers: int, count: int) -> None:
        self._experts, self._layers, self._count = experts, layers, count  # [N, D, k] of targets 0 .. D-1
        self.width = layers * count

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n, L * E]."""
        ids = np.minimum(self._experts[rows].astype(np.int64), self._count)
        found = np.zeros((len(rows), self._layers, self._count + 1), np.bool_)
        np.put_along_axis(found[:, : ids.shape[1]], ids, True, axis=2)
        return found[:, :, : self._count].reshape(len(rows), -1)


def predicted_paths(predictions: Predictions, trace: Trace) -> _Paths:
    """Each row's top-k experts of every layer that something is said about at step start."""
    model = trace.meta.model
    layers, k = len(model.moe_layers), model.top_k
    kept = [(d - 1, i) for i, d in enumerate(predictions.distances) if d <= layers]
    experts = np.full((trace.rows, layers, k), model.experts, np.int64)
    if -1 in predictions.moments:
        said = predictions.experts[:, predictions.moments.index(-1), :, :k]
        for layer, i in kept:
            experts[:, layer, : said.shape[2]] = said[:, i]
    return _Paths(experts, layers, model.experts)


def _pairs(trace: Trace) -> list[list[list[NDArray[np.int64]]]]:
    """Groups of requests that share steps, in order, as lists of their steps' rows; adjacent ones paired.

    A pair holds two groups, or one that is left alone: the last of an odd number, or single requests.
    """
    starts = trace.step_starts
    steps = [np.arange(first, last) for first, last in pairwise(starts.tolist())]
    group_of: dict[int, int] = {}  # request -> group
    groups: list[list[int]] = []  # steps of each
    members: list[set[int]] = []
    for number, rows in enumerate(steps):
        requests = set(trace.request[rows].tolist())
        known = sorted({group_of[request] for request in requests if request in group_of})
        own = known[0] if known else len(groups)
        if not known:
            groups.append([])
            members.append(set())
        for other in known[1:]:
            groups[own] += groups[other]
            members[own] |= members[other]
            groups[other], members[other] = [], set()
        groups[own].append(number)
        members[own] |= requests
        group_of.update(dict.fromkeys(members[own], own))
    kept = sorted(set(group_of.values()))
    found = [([steps[number] for number in sorted(groups[own])], len(members[own])) for own in kept]
    pairs: list[list[list[NDArray[np.int64]]]] = []
    for at in range(0, len(found), 2):
        both = found[at : at + 2]
        together = len(both) == 2 and sum(size for _, size in both) > 2
        pairs += [[group for group, _ in both]] if together else [[group] for group, _ in both]
    return pairs


def better_split(paths: NDArray[np.bool_], before: NDArray[np.int64], rounds: int = 30) -> NDArray[np.int64]:
    """[n] batch 0 or 1 of each path [n, W]: the two-medoid split where it needs fewer experts than `before`, else that.

    Of the two ways to name the halves the one that moves fewer is taken.
    """
    after = two_medoid(paths, rounds)
    if union_cost(paths, after) >= union_cost(paths, before):
        return before
    return 1 - after if (after != before).sum() * 2 > len(after) else after


def two_medoid(paths: NDArray[np.bool_], rounds: int = 30) -> NDArray[np.int64]:
    """[n] cluster 0 or 1 of each path [n, W]; cluster sizes differ by at most one."""
    count = len(paths)
    if count < 2:
        return np.zeros(count, np.int64)
    bits = paths.astype(np.float32)
    uses = bits.sum(axis=1)
    common = bits @ bits.T
    similar = 1 - (uses[:, None] + uses[None, :] - 2 * common) / max(1, paths.shape[1])
    apart = similar + 2 * np.eye(count, dtype=np.float32)
    medoids = [int(i) for i in np.unravel_index(np.argmin(apart), apart.shape)]
    labels = _balanced(similar, medoids)
    for _ in range(rounds):
        medoids = [_medoid(similar, labels == cluster) for cluster in (0, 1)]
        again = _balanced(similar, medoids)
        if (again == labels).all():
            break
        labels = again
    return labels


def _balanced(similar: NDArray[np.float32], medoids: list[int]) -> NDArray[np.int64]:
    """Each to the more similar medoid; the fuller cluster gives up those that are least similar to its own."""
    to = similar[:, medoids]  # [n, 2]
    labels = (to[:, 1] > to[:, 0]).astype(np.int64)
    labels[medoids[0]], labels[medoids[1]] = 0, 1
    most = (len(labels) + 1) // 2
    full = int(labels.sum() * 2 > len(labels))
    members = np.flatnonzero(labels == full)
    own = to[members, full]
    own[members == medoids[full]] = np.inf
    labels[members[np.argsort(-own, kind="stable")[most:]]] = 1 - full
    return labels


def _medoid(similar: NDArray[np.float32], members: NDArray[np.bool_]) -> int:
    """The member with the largest sum of similarities to the others."""
    own = np.flatnonzero(members)
    return int(own[np.argmax(similar[np.ix_(own, own)].sum(axis=1))])


def union_cost(paths: NDArray[np.bool_], labels: NDArray[np.int64]) -> int:
    """Distinct (layer, expert) pairs that the two batches need, added up."""
    return sum(int(paths[labels == batch].any(axis=0).sum()) for batch in (0, 1))


def optimal_split(paths: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[n] the balanced split of least `union_cost`, by trying them all: a yardstick for small n."""
    count = len(paths)
    best, least = np.zeros(count, np.int64), None
    for chosen in combinations(range(count), count // 2):
        labels = np.zeros(count, np.int64)
        labels[list(chosen)] = 1
        cost = union_cost(paths, labels)
        if least is None or cost < least:
            best, least = labels, cost
    return best
