"""What the hybrid predictor knows of an expert at the moment of a prediction: one row of numbers per candidate.

Candidates for a (token, moment, target layer) are the experts that the base names and, up to C of them in all, those
with the most evidence: log2 of the share of tokens that use the expert, plus for each condition (the experts of the
last routed layer, of the layer before it, of the request's last token, the token id) log2 of how much more often it is
used under that condition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled
from .network import add_network
from .trees import add_trees

FEATURES = (
    "probability by the base", "its rank there", "evidence", "rank by evidence", "share of tokens",
    "given the last routed layer", "given the layer before", "given the last token", "used by the last token",
    "recent uses, decaying", "given the token id", "log2 times the token id was seen", "distance", "target layer",
)  # fmt: skip
BASE, RANK, EVIDENCE, EVIDENCE_RANK, SHARE, ACROSS, ACROSS_2, FOLLOWS, USED, RECENT, OF_TOKEN, SEEN, FAR, LAYER = range(
    len(FEATURES)
)
WIDTH = len(FEATURES)
RECENT_TOKENS = 16  # of the request, back to which uses count; chosen here
DECAY = 0.8  # of a use's weight per token; chosen here

Views = tuple[Any, ...]  # arrays in the order of `_describe`


@compiled
def _mean_given(table, ids, experts, found):  # type: ignore[no-untyped-def]
    """found[e]: mean over the experts in `ids` [K] of table[expert, e]; False when there is none."""
    found[:] = 0.0
    n = 0
    for source in ids:
        if source < experts:
            n += 1
            for expert in range(experts):
                found[expert] += table[source, expert]
    if n:
        for expert in range(experts):
            found[expert] /= n
    return n > 0


@compiled
def describe(  # type: ignore[no-untyped-def]
    row, moment, target, distance, column, near, far, ids, ahead, ahead_weights, before, earlier, place, seen,
    share, across, follows, of_token, features, candidates,
):  # fmt: skip
    """Fill `features` [C, F] and `candidates` [C] for `target`, `distance` layers after `moment`.

    `near` and `far` index the tables of `across` for that distance and for one layer more. `column` is the pre-gate's
    in `ahead` [N, L+1, D', K']; -1: no pre-gate, the base is what follows the last routed layer.
    """
    experts = share.shape[1]
    c = len(candidates)
    given = np.empty((4, experts), np.float32)
    known = np.zeros(4, np.bool_)
    if moment >= 0:
        known[0] = _mean_given(across[near, target], ids[row, moment], experts, given[0])
    if moment >= 1:
        known[1] = _mean_given(across[far, target], ids[row, moment - 1], experts, given[1])
    last = earlier[row]
    if last >= 0:
        known[2] = _mean_given(follows[target], ids[last, target], experts, given[2])
    if place[row] >= 0:
        known[3] = True
        given[3] = of_token[place[row], target]
    evidence = np.empty(experts, np.float32)
    for expert in range(experts):
        usual = np.log2(np.float64(share[target, expert]))
        total = usual
        for i in range(4):
            if known[i]:
                total += np.log2(np.float64(given[i, expert])) - usual
            else:
                given[i, expert] = share[target, expert]
        evidence[expert] = total
    base = np.zeros(experts, np.float32)
    rank = np.full(experts, experts, np.int64)
    if column >= 0:
        for i in range(ahead.shape[3]):
            expert = ahead[row, moment + 1, column, i]
            if expert < experts:
                base[expert] = ahead_weights[row, moment + 1, column, i]
                rank[expert] = i
    else:
        base[:] = given[0]
        order = np.argsort(-base, kind="mergesort")
        for i in range(experts):
            rank[order[i]] = i
    recent = np.zeros(experts, np.float32)
    at, weight = last, np.float32(1.0)
    for _ in range(RECENT_TOKENS):
        if at < 0:
            break
        for i in range(ids.shape[2]):
            if ids[at, target, i] < experts:
                recent[ids[at, target, i]] += weight
        weight *= np.float32(DECAY)
        at = before[at]
    order = np.argsort(-evidence, kind="mergesort")
    taken = np.zeros(experts, np.bool_)
    n = 0
    for i in range(experts):
        expert = order[i]
        if column >= 0 and rank[expert] < ahead.shape[3] and n < c:
            taken[expert] = True
            n += 1
    for i in range(experts):
        if not taken[order[i]] and n < c:
            taken[order[i]] = True
            n += 1
    n = 0
    for i in range(experts):
        expert = order[i]
        if not taken[expert]:
            continue
        candidates[n] = expert
        features[n, BASE] = base[expert]
        features[n, RANK] = rank[expert]
        features[n, EVIDENCE] = evidence[expert]
        features[n, EVIDENCE_RANK] = i
        features[n, SHARE] = share[target, expert]
        features[n, ACROSS] = given[0, expert]
        features[n, ACROSS_2] = given[1, expert]
        features[n, FOLLOWS] = given[2, expert]
        features[n, USED] = 0.0
        features[n, RECENT] = recent[expert]
        features[n, OF_TOKEN] = given[3, expert]
        features[n, SEEN] = np.log2(1.0 + seen[place[row]]) if place[row] >= 0 else 0.0
        features[n, FAR] = distance
        features[n, LAYER] = target
        if last >= 0:
            for j in range(ids.shape[2]):
                if ids[last, target, j] == expert:
                    features[n, USED] = 1.0
        n += 1


@compiled
def describe_all(picked, distances, near, far, columns, views, candidates, features):  # type: ignore[no-untyped-def]
    """Rows for training: `picked` [P, 3] of (row, moment, index of the distance) into [P, C] and [P, C, F]."""
    ids, ahead, ahead_weights, before, earlier, place, seen, share, across, follows, of_token = views
    for p in range(len(picked)):
        row, moment, i = picked[p]
        describe(
            row, moment, moment + distances[i], distances[i], columns[i], near[i], far[i], ids, ahead,
            ahead_weights, before, earlier, place, seen, share, across, follows, of_token, features[p], candidates[p],
        )  # fmt: skip


@compiled
def predict_rows(  # type: ignore[no-untyped-def]
    first, last, moments, distances, near, far, columns, width, views, trees, network, chosen, chance, bare
):
    """Fill rows [first, last) of `chosen` and `chance` [N, A, D, M], the best of `width` candidates.

    One of `trees` and `network` is None, which compiles its branch away. `bare` leaves the correction out.
    """
    ids, ahead, ahead_weights, before, earlier, place, seen, share, across, follows, of_token = views
    layers, m = share.shape[0], chosen.shape[3]
    features = np.empty((width, WIDTH), np.float32)
    candidates = np.empty(width, np.int64)
    demand = np.empty(width)
    for row in range(first, last):
        for a in range(len(moments)):
            for i in range(len(distances)):
                target = moments[a] + distances[i]
                if target >= layers:
                    continue
                describe(
                    row, moments[a], target, distances[i], columns[i], near[i], far[i], ids, ahead, ahead_weights,
                    before, earlier, place, seen, share, across, follows, of_token, features, candidates,
                )  # fmt: skip
                for n in range(width):
                    demand[n] = features[n, BASE]
                if not bare:
                    if trees is not None:
                        feature, threshold, child, value, roots, depths, start = trees
                        add_trees(features, feature, threshold, child, value, roots, depths, start, demand)
                    if network is not None:
                        first_layer, first_bias, second, second_bias, out, out_bias = network
                        add_network(features, first_layer, first_bias, second, second_bias, out, out_bias, demand)
                order = np.argsort(-demand, kind="mergesort")
                for n in range(m):
                    chosen[row, a, i, n] = candidates[order[n]]
                    chance[row, a, i, n] = min(1.0, max(0.0, demand[order[n]]))


def deviation(candidates: NDArray[np.int64], features: NDArray[np.float32], truth: NDArray[Any]) -> NDArray[np.float32]:
    """[P, C]: 1 for a candidate among its `truth` [P, K], else 0, less the base's probability."""
    used = (candidates[:, :, None] == truth[:, None, :]).any(axis=2)
    return used.astype(np.float32) - features[:, :, BASE]
