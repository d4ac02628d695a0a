"""Sequence predictor: which experts of a layer the next tokens will need, up to eight ahead (after SeqMoE, 2609.12978).

SeqMoE forecasts eight tokens with a Mamba2 network on the activations of the full stack. This is the same question put
to a small model, and no reproduction: for every expert of the layer that was just routed,

    P(needed by the token t steps later) = sigmoid(weights_t . features),   t in AHEAD

with one set of weights for all layers and experts. The features, each a log ratio to the expert's popularity:
  rates        how often the request used it, halved every 1, 4, 16, 64 tokens
  followers_t  how often it was used t tokens after the experts just chosen here (counted on the training trace)
  crossing     how often it was used one token after what the layer before has just chosen (likewise)
Popularity and whether it was just chosen come on top. While weights are fitted the counts leave out the block of rows
that is looked at: features made of the very rows they explain look better than they are. Form, half-lives and blocks
are chosen here.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import Trace
from .compiled import compiled
from .fitted import Fitted, request_digests
from .predictor import Predictions, Predictor
from .recall import popular, recall_table

AHEAD = (1, 2, 4, 8)  # tokens
HALF_LIVES = np.array([1.0, 4.0, 16.0, 64.0])  # tokens
PRIOR = 2.0  # tokens of average behaviour added to a rate, and uses to what follows an expert
FEATURES = 3 + len(HALF_LIVES) + len(AHEAD) + 1
BLOCKS = 4
EXAMPLES = 6_000  # (token, layer) pairs that weights are fitted on
RIDGE = 1.0
ENTRIES = 2**26  # of predictions for one trace, at most: three bytes each

Tables = dict[str, NDArray[Any]]


class Sequence(Predictor):
    """After layer l: the likeliest experts of layer l of the request's next, second, fourth and eighth token.

    Half of a layer's experts, or as many (at least top-k) as keep a long trace below ENTRIES entries. Only the last
    row of a request in a step says anything: the others' next tokens are in the same step.
    """

    @classmethod
    def train(cls, trace: Trace, judged: Trace) -> Fitted:
        if trace.rows <= max(AHEAD):
            raise InputError(f"sequence: the trace has {trace.rows} rows; learning {max(AHEAD)} ahead needs more")
        blocks = np.arange(trace.rows) * BLOCKS // trace.rows
        tables = _tables(trace, blocks)
        weights = _fit(trace, blocks, tables)
        arrays: Tables = {name: table.sum(axis=0).astype(np.float32) for name, table in tables.items()}
        arrays["weights"] = weights
        settings = {"layers": trace.experts.shape[1], "experts": trace.meta.model.experts, "ahead": list(AHEAD)}
        said = _predict(arrays, judged)
        metrics = recall_table(said, judged)
        if judged.rows:
            popularity = popular(trace, judged, said.moments, said.distances)
            metrics["popularity"] = _recall_at_k(popularity, judged)
            metrics["last_token"] = _recall_at_k(_last_token(judged, said), judged)
        seconds = _seconds(arrays, trace)
        return Fitted("sequence", arrays, settings, metrics, tuple(request_digests(trace).values()), seconds)

    def predict(self, trace: Trace) -> Predictions:
        fitted = self.fitted()
        layers, experts = fitted.settings["layers"], fitted.settings["experts"]
        if (layers, experts) != (trace.experts.shape[1], trace.meta.model.experts):
            raise InputError(
                f"{self.file}: fitted to {layers} layers of {experts} experts, and the trace has "
                f"{trace.experts.shape[1]} of {trace.meta.model.experts}; train it on a trace of this model"
            )
        return _predict(fitted.arrays, trace)


def _in_order(trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows by request; where a request begins; which rows are their request's last in their step."""
    order = np.argsort(trace.request, kind="stable")
    request, step = trace.request[order], trace.step[order]
    begins = np.append(True, request[1:] != request[:-1])[: len(order)]
    ends = np.append((request[1:] != request[:-1]) | (step[1:] != step[:-1]), True)[: len(order)]
    return order, begins, ends


def _tables(trace: Trace, blocks: NDArray[np.int64]) -> Tables:
    """Counts per block B: uses [B, L, E], tokens [B, 1], followers [B, L, A, E, E], crossing [B, L, E, E]."""
    order, begins, _ = _in_order(trace)
    layers, experts, count = trace.experts.shape[1], trace.meta.model.experts, int(blocks.max()) + 1
    tables: Tables = {
        "uses": np.zeros((count, layers, experts), np.float32),
        "tokens": np.bincount(blocks, minlength=count).astype(np.float32)[:, None],
        "followers": np.zeros((count, layers, len(AHEAD), experts, experts), np.float32),
        "crossing": np.zeros((count, layers, experts, experts), np.float32),
    }
    ids, place = np.ascontiguousarray(trace.experts[order]), np.cumsum(begins)
    _count(ids, place, blocks, np.array(AHEAD), tables["uses"], tables["followers"], tables["crossing"])
    return tables


def _layer_tables(tables: Tables, layer: int) -> tuple[NDArray[Any], ...]:
    """Popularity [B, E], and chances [B, A, E, E] and [B, E, E] given a chosen expert, each over the other blocks.

    A single block has no others and stands for itself.
    """
    parts = [tables["uses"][:, layer], tables["followers"][:, layer], tables["crossing"][:, layer], tables["tokens"]]
    if len(parts[0]) > 1:
        parts = [part.sum(axis=0, keepdims=True) - part for part in parts]
    uses, followers, crossing, tokens = parts
    experts = uses.shape[1]
    popularity = (uses + 0.5) / (tokens + experts / 2)
    usual = PRIOR * popularity[:, None, :]
    before = uses[:, :, None] + PRIOR
    crossed = crossing.sum(axis=2, keepdims=True) / max(1.0, float(uses.sum() / max(1.0, tokens.sum()))) + PRIOR
    return (
        popularity.astype(np.float32),
        ((followers + usual[:, None]) / before[:, None]).astype(np.float32),
        ((crossing + usual) / crossed).astype(np.float32),
    )


def _features(trace: Trace, tables: Tables, layer: int, blocks: NDArray[np.int64]) -> NDArray[np.float32]:
    """[N, E, F] of every row of `trace` by request, once `layer` is routed."""
    order, begins, _ = _in_order(trace)
    popularity, followers, crossing = _layer_tables(tables, layer)
    ids, above = trace.experts[order, layer], trace.experts[order, max(0, layer - 1)]
    out = np.empty((trace.rows, popularity.shape[1], FEATURES), np.float32)
    _walk(ids, above, begins, blocks, popularity, followers, crossing, 0.5 ** (1 / HALF_LIVES), out)
    return out


def _fit(trace: Trace, blocks: NDArray[np.int64], tables: Tables) -> NDArray[np.float64]:
    """[A, F] weights by logistic regression, Newton's method, on every so-manieth (token, layer)."""
    order, begins, _ = _in_order(trace)
    place, layers = np.cumsum(begins), trace.experts.shape[1]
    every = max(1, trace.rows * layers // EXAMPLES)
    inputs, rows, of_layer = [], [], []
    for layer in range(layers):
        kept = np.arange(layer % every, trace.rows, every)
        inputs.append(_features(trace, tables, layer, blocks)[kept])
        rows.append(kept)
        of_layer.append(np.full(len(kept), layer))
    seen, row, layer_of = np.concatenate(inputs), np.concatenate(rows), np.concatenate(of_layer)
    weights = np.zeros((len(AHEAD), FEATURES))
    for at, ahead in enumerate(AHEAD):
        later = row + ahead
        there = (later < trace.rows) & (place[np.minimum(later, trace.rows - 1)] == place[row])
        if not there.any():
            continue
        ids = trace.experts[order[later[there]], layer_of[there]].astype(np.int64)
        needed = np.zeros((len(ids), seen.shape[1] + 1))
        np.put_along_axis(needed, np.minimum(ids, seen.shape[1]), 1.0, axis=1)
        weights[at] = _logistic(seen[there].reshape(-1, FEATURES).astype(np.float64), needed[:, :-1].ravel())
    return weights


def _logistic(inputs: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.zeros(inputs.shape[1])
    for _ in range(12):
        chance = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        spread = chance * (1 - chance)
        curvature = (inputs * spread[:, None]).T @ inputs + RIDGE * np.eye(len(weights))
        weights += np.linalg.solve(curvature, inputs.T @ (truth - chance) - RIDGE * weights)
    return weights


def _predict(arrays: Tables, trace: Trace) -> Predictions:
    layers, k, experts = trace.experts.shape[1], trace.experts.shape[2], trace.meta.model.experts
    distances = tuple(ahead * layers for ahead in AHEAD)
    width = max(k, min(max(2 * k, experts // 2), ENTRIES // max(1, trace.rows * layers * len(AHEAD))))
    width = min(experts, width)
    ids = np.full((trace.rows, layers, len(AHEAD), width), trace.absent, trace.experts.dtype)
    chances = np.zeros(ids.shape, np.float16)
    order, _, ends = _in_order(trace)
    tables = {name: table[None] for name, table in arrays.items()}
    for layer in range(layers):
        features = _features(trace, tables, layer, np.zeros(trace.rows, np.int64))
        chance = np.zeros((trace.rows, len(AHEAD), width), np.float32)
        _rank(features, arrays["weights"], order, ends, ids[:, layer], chance)
        chances[:, layer] = chance
    return Predictions(tuple(range(layers)), distances, ids, chances)


def _last_token(trace: Trace, like: Predictions) -> Predictions:
    """The baseline that expects what was just chosen."""
    shape = (trace.rows, trace.experts.shape[1], len(like.distances), trace.experts.shape[2])
    said = np.broadcast_to(trace.experts[:, :, None], shape)
    return Predictions(like.moments, like.distances, said, np.ones(shape, np.float16))


def _recall_at_k(said: Predictions, trace: Trace) -> dict[str, float]:
    table = recall_table(said, trace).get("by_distance", {})
    return {distance: figures["recall@k"] for distance, figures in table.items()}


def _seconds(arrays: Tables, trace: Trace) -> float:
    """Of one layer for one token, spread over a request's tokens; the least of a few measurements."""
    few = trace.of_requests(np.unique(trace.request)[:1].tolist())
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        _predict(arrays, few)
        times.append(time.perf_counter() - begin)
    return min(times) / (few.rows * trace.experts.shape[1])


@compiled
def _count(ids, place, blocks, aheads, uses, followers, crossing):  # type: ignore[no-untyped-def]
    rows, layers, k = ids.shape
    experts = uses.shape[2]
    for row in range(rows):
        block = blocks[row]
        for layer in range(layers):
            for i in range(k):
                source = ids[row, layer, i]
                if source < experts:
                    uses[block, layer, source] += 1
            for at in range(len(aheads)):
                later = row + aheads[at]
                if later >= rows or place[later] != place[row]:
                    continue
                for i in range(k):
                    source = ids[row, layer, i]
                    above = ids[row, max(0, layer - 1), i]
                    for j in range(k):
                        target = ids[later, layer, j]
                        if target >= experts:
                            continue
                        if source < experts:
                            followers[block, layer, at, source, target] += 1
                        if at == 0 and above < experts:
                            crossing[block, layer, above, target] += 1


@compiled
def _walk(ids, above, begins, blocks, popularity, followers, crossing, keep, out):  # type: ignore[no-untyped-def]
    """Features of every row of one layer, request after request. See the module."""
    experts, k, rates = popularity.shape[1], ids.shape[1], len(keep)
    horizons = followers.shape[1]
    used = np.zeros((experts, rates))
    tokens = np.zeros(rates)
    sums = np.empty((horizons + 1, experts))
    for row in range(len(ids)):
        block = blocks[row]
        if begins[row]:
            used[:] = 0
            tokens[:] = 0
        for r in range(rates):
            tokens[r] = tokens[r] * keep[r] + 1
            for expert in range(experts):
                used[expert, r] *= keep[r]
        sums[:] = 0
        chosen, chosen_above = 0, 0
        for expert in range(experts):
            out[row, expert, 2] = 0
        for i in range(k):
            source = ids[row, i]
            if source < experts:
                chosen += 1
                out[row, source, 2] = 1
                for r in range(rates):
                    used[source, r] += 1
                for at in range(horizons):
                    for expert in range(experts):
                        sums[at, expert] += followers[block, at, source, expert]
            source = above[row, i]
            if source < experts:
                chosen_above += 1
                for expert in range(experts):
                    sums[horizons, expert] += crossing[block, source, expert]
        for expert in range(experts):
            usual = popularity[block, expert]
            out[row, expert, 0] = 1
            out[row, expert, 1] = np.log(usual)
            for r in range(rates):
                rate = (used[expert, r] + PRIOR * usual) / (tokens[r] + PRIOR)
                out[row, expert, 3 + r] = np.log(rate / usual)
            for at in range(horizons + 1):
                members = chosen if at < horizons else chosen_above
                ratio = sums[at, expert] / (members * usual) if members else 1.0
                out[row, expert, 3 + rates + at] = np.log(ratio)


@compiled
def _rank(features, weights, order, ends, ids, chances):  # type: ignore[no-untyped-def]
    """The likeliest experts of each row that ends its step, for every horizon."""
    for place in range(len(order)):
        if not ends[place]:
            continue
        for at in range(len(weights)):
            worth = np.zeros(features.shape[1])
            for expert in range(features.shape[1]):
                for f in range(features.shape[2]):
                    worth[expert] += features[place, expert, f] * weights[at, f]
            best = np.argsort(-worth, kind="mergesort")
            for rank in range(ids.shape[2]):
                ids[order[place], at, rank] = best[rank]
                chances[order[place], at, rank] = 1 / (1 + np.exp(-worth[best[rank]]))
