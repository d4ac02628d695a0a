"""Layer budgets: how a number of slots is shared out among the layers' own caches (`cache.split`).

    uniform   the same number everywhere (the default; the simulator's own rule)
    entropy   in proportion to 2^entropy of a layer's routing, its effective number of experts
    demand    in proportion to the distinct experts that a layer needs in a while
    dp        the fewest expected loads, by dynamic programming over layers (AdapMoE, 2408.10284)

AdapMoE derives a layer's loads from its prefetch accuracy and the cache size; here they are what LRU misses at every
capacity, read off the recording's stack distances, so the programme is exact for LRU on what it was fitted on. That
entropy and demand mean these two formulas, and the window of demand, are chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.model_spec import ModelSpec
from ..traces.trace import Trace
from .compiled import compiled
from .fitted import Fitted, load_fitted, request_digests

KIND = "layer-budget"
SPLITS = ("uniform", "entropy", "demand", "dp")
WINDOW = 2  # of demand, in units of experts / top-k steps


@dataclass(frozen=True)
class Statistics:
    """What the splits know of L layers of E experts, top `top_k`."""

    hits: NDArray[np.int64]  # [L, E+1]: needs that LRU would have held with c slots
    needs: NDArray[np.int64]  # [L]
    effective: NDArray[np.float64]  # [L]: 2^entropy of the shares of uses
    distinct: NDArray[np.float64]  # [L]: mean distinct experts of a window
    top_k: int


def statistics(trace: Trace) -> Statistics:
    """Read off a trace's own steps. Needs of one layer-step are one event, as in the replay contract."""
    experts, top_k = trace.meta.model.experts, trace.meta.model.top_k
    step = np.repeat(np.arange(len(trace.step_starts) - 1), np.diff(trace.step_starts))
    window = max(1, round(WINDOW * experts / top_k))
    depths, uses, distinct = _walk(trace.experts, step, experts, window)
    shares = uses / np.maximum(1, uses.sum(axis=1, keepdims=True))
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    hits = np.cumsum(depths, axis=1)[:, :-1]
    return Statistics(
        np.concatenate((np.zeros_like(hits[:, :1]), hits), axis=1),
        uses.sum(axis=1),
        2.0 ** -(shares * logs).sum(axis=1),
        distinct,
        top_k,
    )


def train(trace: Trace, judged: Trace) -> Fitted:
    """Keep the statistics of `trace`; metrics are LRU's hit rate on `judged` at a quarter of the slots, per split."""
    known = statistics(trace)
    arrays = {"hits": known.hits, "needs": known.needs, "effective": known.effective, "distinct": known.distinct}
    return Fitted(
        KIND, arrays, {"top_k": known.top_k}, _metrics(known, judged), tuple(request_digests(trace).values()), None
    )


def load_statistics(path: str, model: ModelSpec) -> Statistics:
    """What `train` wrote. Raises InputError for another file, or one of another model's geometry."""
    fitted = load_fitted(path, KIND)
    layers = len(model.moe_layers)
    found = fitted.arrays["hits"].shape
    if found != (layers, model.experts + 1) or fitted.settings["top_k"] != model.top_k:
        raise InputError(
            f"{path}: fitted to {found[0]} layers of {found[1] - 1} experts, top-{fitted.settings['top_k']}, and the "
            f"model has {layers} of {model.experts}, top-{model.top_k}; train it on a trace of this model"
        )
    return Statistics(top_k=fitted.settings["top_k"], **fitted.arrays)


def shares(kind: str, total: int, known: Statistics) -> tuple[int, ...]:
    """Slots per layer: `total` in all (at most layers * experts), each from top-k (1 where short) to all experts."""
    layers, experts = known.hits.shape[0], known.hits.shape[1] - 1
    total = min(total, layers * experts)
    if total < layers:
        raise ValueError(f"{total} slots for {layers} layers: every layer needs one")
    least = min(known.top_k, total // layers)
    if kind == "dp":
        return tuple(_fewest_loads(known.needs[:, None] - known.hits, total, least).tolist())
    worth = {"uniform": np.ones(layers), "entropy": known.effective, "demand": known.distinct}[kind]
    return tuple(_proportional(worth, total, least, experts).tolist())


def _metrics(known: Statistics, judged: Trace) -> dict[str, float]:
    if not judged.rows:
        return {}
    seen, layers = statistics(judged), np.arange(len(known.hits))
    total = len(layers) * max(1, (known.hits.shape[1] - 1) // 4)
    rates = {kind: seen.hits[layers, list(shares(kind, total, known))].sum() for kind in SPLITS}
    return {f"lru_hit@0.25 {kind}": float(hits / max(1, seen.needs.sum())) for kind, hits in rates.items()}


@compiled
def _walk(ids, step, experts, window):  # type: ignore[no-untyped-def]
    """Per layer: needs by stack depth [L, E+1] (E: first use), uses [L, E], mean distinct experts of a window [L].

    The stack is ordered by last use, then by id, highest first: LRU evicts from its end, ties to the lowest id.
    """
    rows, layers, k = ids.shape
    depths = np.zeros((layers, experts + 1), np.int64)
    uses = np.zeros((layers, experts), np.int64)
    distinct = np.zeros(layers)
    for layer in range(layers):
        last = np.full(experts, -1, np.int64)
        window_of = np.full(experts, -1, np.int64)
        needed = np.zeros(experts, np.bool_)
        first = 0
        while first < rows:
            stop = first
            while stop < rows and step[stop] == step[first]:
                for i in range(k):
                    if ids[stop, layer, i] < experts:
                        needed[ids[stop, layer, i]] = True
                stop += 1
            for expert in range(experts):
                if not needed[expert]:
                    continue
                depth = experts
                if last[expert] >= 0:
                    depth = 0
                    for other in range(experts):
                        depth += last[other] > last[expert] or (last[other] == last[expert] and other > expert)
                depths[layer, depth] += 1
                uses[layer, expert] += 1
                if window_of[expert] != step[first] // window:
                    window_of[expert] = step[first] // window
                    distinct[layer] += 1
            for expert in range(experts):
                if needed[expert]:
                    last[expert] = step[first]
                    needed[expert] = False
            first = stop
        if rows:
            distinct[layer] /= step[rows - 1] // window + 1
    return depths, uses, distinct


def _proportional(worth: NDArray[np.float64], total: int, least: int, most: int) -> NDArray[np.int64]:
    """Whole numbers in [least, most] that add up to `total`, by Webster's rule: more in all is never less for one."""
    given = np.full(len(worth), least, np.int64)
    for _ in range(total - least * len(worth)):
        claim = np.where(given < most, np.maximum(worth, 1e-12) / (2 * given + 1), -1.0)
        given[np.argmax(claim)] += 1
    return given


def _fewest_loads(loads: NDArray[np.int64], total: int, least: int) -> NDArray[np.int64]:
    """[L] capacities of at least `least` that add up to `total` with the smallest sum of `loads` [L, E+1].

    best[c] is the least loads of the layers so far with c slots in all; of equal choices the fewest slots for the
    later layer.
    """
    layers, most = loads.shape[0], loads.shape[1] - 1
    far = np.iinfo(np.int64).max // 2
    best = np.full(total + 1, far)
    best[0] = 0
    taken = np.zeros((layers, total + 1), np.int64)
    for layer in range(layers):
        following = np.full(total + 1, far)
        for slots in range(least, min(most, total) + 1):
            candidate = best[: total + 1 - slots] + loads[layer, slots]
            better = candidate < following[slots:]
            following[slots:][better] = candidate[better]
            taken[layer, slots:][better] = slots
        best = following
    chosen = np.zeros(layers, np.int64)
    left = total
    for layer in range(layers - 1, -1, -1):
        chosen[layer] = taken[layer, left]
        left -= chosen[layer]
    return chosen
