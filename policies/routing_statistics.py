"""How often experts were routed, and after what, in some requests: the tables from which features are made.

Shares are of tokens: P(expert among the top-k | condition), shrunk towards the expert's own share where the condition
was seen rarely. Stored as float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import Trace
from .compiled import compiled

Tables = dict[str, NDArray[Any]]
SHRINK = 8.0  # uses of another expert after which half of what followed it is believed; chosen here
TOKEN_SHRINK = 2.0  # the same for token ids, whose experts are steadier
MOST_ENTRIES = 1 << 23  # of the table by token id: the most frequent ids are kept


def history(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per row: the row before it in its request, and the last one in an earlier step; -1 where there is none.

    What a row's own step routes at later layers is not known while the step runs, also for earlier rows of a prompt.
    """
    before = np.full(trace.rows, -1, np.int64)
    order = np.argsort(trace.request, kind="stable")
    same = trace.request[order][1:] == trace.request[order][:-1]
    before[order[1:][same]] = order[:-1][same]
    return before, _earlier(before, trace.step)


def tables(trace: Trace, distances: tuple[int, ...], counted: NDArray[np.bool_]) -> Tables:
    """From the rows in `counted` [N]. L layers, E experts, D distances, V token ids:

    share [L, E]; across [D, L, E, E]: at this layer, given an expert at the layer `distance` before; follows
    [L, E, E]: given an expert of the request's last token at the same layer; tokens [V] ids, ascending; of_token
    [V, L, E]; seen [V]: how often each id was.
    """
    layers, experts = trace.experts.shape[1], trace.meta.model.experts
    ids, times = np.unique(trace.token[counted & (trace.token >= 0)], return_counts=True)
    most = max(1, MOST_ENTRIES // (layers * experts))
    kept = np.sort(np.argsort(-times, kind="stable")[:most])
    ids, times = ids[kept].astype(np.int32), times[kept]
    place = np.searchsorted(ids, trace.token)
    place = np.where((place < len(ids)) & (np.append(ids, -2)[place] == trace.token), place, -1)
    share, across, follows, of_token, sources, last = _count(
        trace.experts, experts, np.array(distances), history(trace)[0], place, counted, len(ids)
    )
    rows = max(1, int(np.count_nonzero(counted)))
    share = (share + 1 / experts) / (rows + 1)  # [L, E], never 0
    made = {
        "share": share,
        "across": _shrunk(across, sources, share),
        "follows": _shrunk(follows, last, share),
        "of_token": (of_token + TOKEN_SHRINK * share) / (times[:, None, None] + TOKEN_SHRINK),
    }
    rounded = {name: np.maximum(table, 1e-6).astype(np.float16) for name, table in made.items()}
    return {**rounded, "tokens": ids, "seen": times.astype(np.int32)}


def _shrunk(counts: NDArray[Any], sources: NDArray[Any], share: NDArray[Any]) -> NDArray[Any]:
    return (counts + SHRINK * share[:, None, :]) / (sources[..., None] + SHRINK)


@compiled
def _earlier(before, step):  # type: ignore[no-untyped-def]
    found = before.copy()
    for row in range(len(before)):
        while found[row] >= 0 and step[found[row]] == step[row]:
            found[row] = found[found[row]]
    return found


@compiled
def _count(ids, experts, distances, before, place, counted, tokens):  # type: ignore[no-untyped-def]
    rows, layers, k = ids.shape
    share = np.zeros((layers, experts))
    across = np.zeros((len(distances), layers, experts, experts), np.float32)
    sources = np.zeros((len(distances), layers, experts), np.float32)
    follows = np.zeros((layers, experts, experts), np.float32)
    last = np.zeros((layers, experts), np.float32)
    of_token = np.zeros((tokens, layers, experts), np.float32)
    for row in range(rows):
        if not counted[row]:
            continue
        for layer in range(layers):
            for i in range(k):
                expert = ids[row, layer, i]
                if expert < experts:
                    share[layer, expert] += 1
                    if place[row] >= 0:
                        of_token[place[row], layer, expert] += 1
            for d in range(len(distances) + 1):
                source_layer, source_row = layer, before[row]
                if d < len(distances):
                    source_layer, source_row = layer - distances[d], row
                if source_layer < 0 or source_row < 0 or not counted[source_row]:
                    continue
                for i in range(k):
                    source = ids[source_row, source_layer, i]
                    if source >= experts:
                        continue
                    if d < len(distances):
                        sources[d, layer, source] += 1
                    else:
                        last[layer, source] += 1
                    for j in range(k):
                        expert = ids[row, layer, j]
                        if expert < experts:
                            if d < len(distances):
                                across[d, layer, source, expert] += 1
                            else:
                                follows[layer, source, expert] += 1
    return share, across, follows, of_token, sources, last
