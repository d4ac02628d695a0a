"""ExpertFlow's hybrid predictor: the pre-gate's probabilities plus a learned deviation (2510.26730).

    demand = base + Delta,   Delta = a random forest's estimate of (truth - base)

The paper's inputs are the current pre-gate output, the batch's token ids and the activations of earlier layers; its
features, trees, depth and training size are not known. Here one row of features per candidate expert
(hybrid_features.py) is made from tables counted on the training requests (routing_statistics.py). 12 trees of depth 8
are chosen here: twice as many, deeper, find 0.3 points more of the experts and take more than twice the time, which
every layer pays (benchmarks/hybrid_variants.py). Tables for training rows leave out the rows' own quarter of the
requests, otherwise the forest would trust them too much.

A trace without `lookahead` has no pre-gate: then the base is the cross-layer transition probability of an expert given
those of the last routed layer, counted on the training requests (`settings["base"]` of the fitted file says which).

The paper keeps a prediction cache keyed by (token sequence, layer, step). Offline `predictions_for` is that cache:
everything said about a trace is computed once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import Trace
from .fitted import Fitted, request_digests
from .hybrid_features import FEATURES, Views, describe_all, deviation, predict_rows
from .network import NETWORK_ARRAYS
from .next_gate import NextGate
from .predictor import Predictions, Predictor
from .recall import recall_table
from .routing_statistics import Tables, history, tables
from .trees import TREE_ARRAYS, Trees, packed_forest

DISTANCES = (1, 2, 3, 4)  # without a pre-gate; with one those that were recorded
TRAINING_ROWS = 200_000  # candidates
FOLDS = 4
TREES, DEPTH = 12, 8
PRE_GATE, TRANSITION = "pre-gate", "transition"
Learner = Callable[[NDArray[np.float32], NDArray[np.float32]], dict[str, NDArray[Any]]]  # rows [R, F], target [R]


class Hybrid(Predictor):
    """Moments -1 (the embedding) to L-1, targets of the same step, the 2k experts of most demand for each."""

    @property
    def gates(self) -> int:  # type: ignore[override]
        """One router evaluation per distance where the base is the pre-gate."""
        return gates_of(self)

    @classmethod
    def train(cls, trace: Trace, judged: Trace) -> Fitted:
        """See `Predictor.train`. Metrics: `recall_table` of the hybrid, of its base, and their difference at k."""
        return train(trace, judged, "hybrid", grow_forest)

    def predict(self, trace: Trace) -> Predictions:
        """See `Predictor.predict`. Raises InputError for a trace of another geometry or without the pre-gate."""
        return Model(self.fitted()).predictions(trace)


class Model:
    """A fitted file, ready to predict."""

    def __init__(self, fitted: Fitted) -> None:
        self.kind, settings = fitted.kind, fitted.settings
        self.settings, self.distances = settings, tuple(settings["distances"])
        self.tables: Tables = fitted.arrays
        self.trees, self.network = (_learned(fitted.arrays, names) for names in (TREE_ARRAYS, NETWORK_ARRAYS))
        self.spans = _spans(self.distances, tuple(settings["across"]))

    def predictions(self, trace: Trace, bare: bool = False) -> Predictions:
        """What is said about every row; `bare` says what the base alone ranks among the same candidates."""
        self._check(trace)
        moments = tuple(range(-1, trace.experts.shape[1]))
        rows, most = trace.rows, min(trace.meta.model.experts, 2 * trace.meta.model.top_k)
        shape = (rows, len(moments), len(self.distances), most)
        chosen, chance = np.full(shape, trace.absent, trace.experts.dtype), np.zeros(shape, np.float32)
        self._fill(trace, self._views(trace), np.array(moments), 0, rows, chosen, chance, bare)
        return Predictions(moments, self.distances, chosen, chance.astype(np.float16))

    def seconds_per_call(self, trace: Trace) -> float | None:
        """Median time of what is said at one moment about one token; None for a trace without rows."""
        if not trace.rows:
            return None
        views, most = self._views(trace), min(trace.meta.model.experts, 2 * trace.meta.model.top_k)
        chosen = np.full((trace.rows, 1, len(self.distances), most), trace.absent, trace.experts.dtype)
        chance, took = np.zeros(chosen.shape, np.float32), []
        early = max(1, trace.experts.shape[1] - self.distances[-1])  # moments with something to say at every distance
        for call in range(201):
            row, moment, begun = call % trace.rows, np.array([call % early]), perf_counter()
            self._fill(trace, views, moment, row, row + 1, chosen, chance, False)
            took.append(perf_counter() - begun)
        return float(np.median(took[1:]))

    def _fill(
        self, trace: Trace, views: Views, moments: NDArray[Any], first: int, last: int,
        chosen: NDArray[Any], chance: NDArray[np.float32], bare: bool,
    ) -> None:  # fmt: skip
        near, far = self.spans
        columns = _columns(trace, self.distances, self.settings["base"])
        predict_rows(
            first,
            last,
            moments,
            np.array(self.distances),
            near,
            far,
            columns,
            width_of(trace),
            views,
            self.trees,
            self.network,
            chosen,
            chance,
            bare,
        )

    def _views(self, trace: Trace) -> Views:
        return _views(trace, self.tables, self.settings["base"])

    def _check(self, trace: Trace) -> None:
        fitted, model = self.settings["geometry"], trace.meta.model
        found = [trace.experts.shape[1], model.experts, model.top_k]
        if fitted != found:
            raise InputError(
                "predict {}: fitted to {} MoE layers x {} experts, top-{}, but the trace has {} x {}, top-{}: "
                "train it on a trace of this model".format(self.kind, *fitted, *found)
            )
        recorded = trace.meta.lookahead_distances if trace.lookahead is not None else ()
        if self.settings["base"] == PRE_GATE and not set(self.distances) <= set(recorded):
            raise InputError(
                f"predict {self.kind}: fitted to the pre-gate at distances {list(self.distances)}, the trace has "
                f"{list(recorded)}: record with --lookahead {self.distances[-1]} or train on such a trace"
            )


def grow_forest(rows: NDArray[np.float32], target: NDArray[np.float32]) -> Trees:
    """The paper's learner, for `rows` [R, F] and `target` [R]."""
    from sklearn.ensemble import RandomForestRegressor

    forest = RandomForestRegressor(TREES, max_depth=DEPTH, min_samples_leaf=20, max_features=0.5, random_state=0)
    return packed_forest(forest.fit(rows, target))


def gates_of(predictor: Predictor) -> int:
    """Router evaluations per moment of a predictor fitted here: those of the pre-gate where that is its base."""
    return NextGate.gates if predictor.file is not None and predictor.fitted().settings["base"] == PRE_GATE else 0


def train(trace: Trace, judged: Trace, kind: str, learn: Learner) -> Fitted:
    """Tables and what `learn` makes of `trace`, judged on `judged`. InputError where nothing can be learned."""
    if not trace.rows:
        raise InputError(f"predict {kind}: the trace to fit to has no rows; name one with some")
    base, distances = base_of(trace)
    if min(distances) > trace.experts.shape[1]:
        raise InputError(
            f"predict {kind}: the trace looks {min(distances)} layers ahead and has {trace.experts.shape[1]}; "
            "record with --lookahead 1"
        )
    across = spans_of(distances)
    rows, target = training_rows(trace, base, distances, across)
    model = trace.meta.model
    settings = {
        "base": base, "distances": list(distances), "across": list(across), "features": list(FEATURES),
        "geometry": [trace.experts.shape[1], model.experts, model.top_k],
    }  # fmt: skip
    arrays = tables(trace, across, np.ones(trace.rows, np.bool_)) | learn(rows, target)
    fitted = Fitted(kind, arrays, settings, {}, tuple(request_digests(trace).values()), None)
    return judge(fitted, trace, judged, len(rows))


def base_of(trace: Trace) -> tuple[str, tuple[int, ...]]:
    """What a predictor fitted to `trace` starts from, and how many layers ahead it looks."""
    if trace.lookahead is not None:
        return PRE_GATE, trace.meta.lookahead_distances
    return TRANSITION, DISTANCES


def spans_of(distances: tuple[int, ...]) -> tuple[int, ...]:
    """Spans of layers over which transitions are counted: each distance, and one layer more."""
    return tuple(sorted({*distances, *(distance + 1 for distance in distances)}))


def judge(fitted: Fitted, trace: Trace, judged: Trace, rows: int) -> Fitted:
    """The same with its metrics on `judged` and the time of a call."""
    ready = Model(fitted)
    metrics: dict[str, Any] = {"training_rows": rows, "judged_requests": len(np.unique(judged.request))}
    if judged.rows:
        own = recall_table(ready.predictions(judged), judged)
        bare = NextGate().predict(judged) if fitted.settings["base"] == PRE_GATE else ready.predictions(judged, True)
        base = recall_table(bare, judged)
        metrics |= {fitted.kind: own, "base": base}
        if own:
            metrics["points_over_base"] = 100 * (own["overall"]["recall@k"] - base["overall"]["recall@k"])
    called = judged if judged.rows else trace
    return Fitted(fitted.kind, fitted.arrays, fitted.settings, metrics, fitted.requests, ready.seconds_per_call(called))


def training_rows(
    trace: Trace, base: str, distances: tuple[int, ...], across: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[R, F] features and [R] deviations from the base, of a random sample of (token, moment, distance)."""
    layers = trace.experts.shape[1]
    width = width_of(trace)
    of_row = [(moment, i) for moment in range(-1, layers) for i, d in enumerate(distances) if moment + d < layers]
    rng = np.random.default_rng(0)
    number = min(max(1, TRAINING_ROWS // width), trace.rows * len(of_row))
    flat = np.sort(rng.choice(trace.rows * len(of_row), number, replace=False))
    picked = np.column_stack((flat // len(of_row), np.array(of_row)[flat % len(of_row)]))
    fold, columns = folds(trace), _columns(trace, distances, base)
    candidates = np.zeros((number, width), np.int64)
    features = np.zeros((number, width, len(FEATURES)), np.float32)
    near, far = _spans(distances, across)
    for own in range(FOLDS):
        mine = fold[picked[:, 0]] == own
        views = _views(trace, tables(trace, across, fold != own), base)
        named, described = candidates[mine], features[mine]
        describe_all(picked[mine], np.array(distances), near, far, columns, views, named, described)
        candidates[mine], features[mine] = named, described
    target = picked[:, 1] + np.array(distances)[picked[:, 2]]
    wanted = deviation(candidates, features, trace.experts[picked[:, 0], target])
    return features.reshape(-1, len(FEATURES)), wanted.ravel()


def width_of(trace: Trace) -> int:
    """Candidates for each prediction; 3k is chosen here."""
    return min(trace.meta.model.experts, 3 * trace.meta.model.top_k)


def folds(trace: Trace) -> NDArray[np.int64]:
    """[N]: each row's part, whole requests where there are enough of them, else stretches of the trace."""
    requests, of_row = np.unique(trace.request, return_inverse=True)
    if len(requests) >= FOLDS:
        return of_row % FOLDS
    return np.arange(trace.rows) * FOLDS // trace.rows


def _learned(arrays: dict[str, NDArray[Any]], names: tuple[str, ...]) -> tuple[NDArray[Any], ...] | None:
    """The arrays of one learner; None where another one made the correction."""
    return tuple(arrays[name] for name in names) if names[0] in arrays else None


def _spans(distances: tuple[int, ...], across: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which table of `across` holds each distance, and which one layer more."""
    return np.searchsorted(across, distances), np.searchsorted(across, np.array(distances) + 1)


def _columns(trace: Trace, distances: tuple[int, ...], base: str) -> NDArray[np.int64]:
    """[D]: the pre-gate's column for each distance; -1 without a pre-gate."""
    recorded = trace.meta.lookahead_distances
    return np.array([recorded.index(d) if base == PRE_GATE else -1 for d in distances], np.int64)


def _views(trace: Trace, made: Tables, base: str) -> Views:
    """The arrays that `describe` reads, as compiled code wants them."""
    before, earlier = history(trace)
    place = np.searchsorted(made["tokens"], trace.token)
    known = np.append(made["tokens"], np.int32(-2))[place] == trace.token
    if base == PRE_GATE:
        said = NextGate().predict(trace)
        ahead, weights = said.experts, said.probability.astype(np.float32)
    else:
        ahead = np.zeros((1, 1, 0, 0), trace.experts.dtype)
        weights = np.zeros((1, 1, 0, 0), np.float32)
    shares = tuple(made[name].astype(np.float32) for name in ("share", "across", "follows", "of_token"))
    return (trace.experts, ahead, weights, before, earlier, np.where(known, place, -1), made["seen"], *shares)
