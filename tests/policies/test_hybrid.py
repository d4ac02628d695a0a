"""The hybrid predictor: trees and network against scikit-learn's, tables against counting, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import spec, trace_of, traces
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moeflow.policies.fitted import Fitted, load_fitted
from moeflow.policies.hybrid import FOLDS, Hybrid, Model, folds
from moeflow.policies.hybrid_features import BASE, FEATURES, deviation
from moeflow.policies.hybrid_network import HybridNetwork, fit_network
from moeflow.policies.network import NETWORK_ARRAYS, add_network, packed_network
from moeflow.policies.routing_statistics import SHRINK, history, tables
from moeflow.policies.trees import TREE_ARRAYS, add_trees, packed_forest
from moeflow.traces.trace import Trace
from sklearn.ensemble import RandomForestRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.preprocessing import StandardScaler

from moeflow.errors import InputError

LAYERS, EXPERTS, TOP_K = 4, 12, 2
KINDS = {"hybrid": Hybrid, "hybrid-network": HybridNetwork}


def structured(lookahead: bool, rows: int = 300, requests: int = 10) -> Trace:
    """Experts follow from the token id, then from the layer before, most of the time; half of the pre-gate is right."""
    rng = np.random.default_rng(0)
    steps = rng.permuted(np.tile(np.arange(EXPERTS), (LAYERS, 1)), axis=1)
    ids = np.zeros((rows, LAYERS, TOP_K), np.int64)
    token = rng.integers(0, 20, rows)
    ids[:, 0] = steps[0][np.stack((token % EXPERTS, (token + 5) % EXPERTS), axis=1)]
    for layer in range(1, LAYERS):
        ids[:, layer] = steps[layer][ids[:, layer - 1]]
        strange = rng.random(rows) < 0.1
        ids[strange, layer] = (ids[strange, layer] + 1) % EXPERTS
    trace = trace_of(spec(LAYERS, EXPERTS, TOP_K), list(ids[:, None]))
    trace = replace(
        trace,
        request=(np.arange(rows) * requests // rows).astype(np.int32),
        token=token.astype(np.int32),
    )
    if not lookahead:
        return trace
    ahead = np.full((rows, LAYERS + 1, 2, TOP_K), trace.absent, np.uint8)
    for source in range(LAYERS + 1):
        for i, target in enumerate((source, source + 1)):
            if target < LAYERS:
                wrong = rng.random((rows, 1)) < 0.5
                ahead[:, source, i] = np.where(wrong, (ids[:, target] + 3) % EXPERTS, ids[:, target])
    weights = np.tile(np.array([0.5, 0.25], np.float16), (rows, LAYERS + 1, 2, 1))
    meta = replace(trace.meta, lookahead_distances=(1, 2))
    return replace(trace, meta=meta, lookahead=ahead, lookahead_weights=weights)


@pytest.fixture(
    scope="module",
    params=[(kind, lookahead) for kind in KINDS for lookahead in (True, False)],
    ids=lambda param: f"{param[0]}-{'pre-gate' if param[1] else 'transition'}",
)
def case(request) -> tuple[Trace, Trace, Fitted]:
    """(fitted on, judged on, fitted)."""
    kind, lookahead = request.param
    trace = structured(lookahead)
    fitting, judged = trace.of_requests(range(0, 10, 2)), trace.of_requests(range(1, 10, 2))
    return fitting, judged, KINDS[kind].train(fitting, judged)


@given(seed=st.integers(0, 2**16), trees=st.integers(1, 5), depth=st.integers(1, 6), leaf=st.integers(1, 40))
@settings(max_examples=25)
def test_trees_say_what_scikit_learn_says(seed, trees, depth, leaf):
    rng = np.random.default_rng(seed)
    rows = np.round(rng.normal(size=(200, 4)), 1).astype(np.float32)  # ties with thresholds too
    target = rows[:, 0] * (rows[:, 1] > 0) + rng.normal(size=200)
    forest = RandomForestRegressor(trees, max_depth=depth, min_samples_leaf=leaf, random_state=0).fit(rows, target)
    asked = np.concatenate((rows, rng.normal(size=(50, 4)).astype(np.float32)))
    total, packed = np.zeros(len(asked)), packed_forest(forest)
    add_trees(asked, *(packed[name] for name in TREE_ARRAYS), total)
    np.testing.assert_allclose(total, forest.predict(asked), rtol=0, atol=1e-12)


@given(seed=st.integers(0, 2**16), one=st.integers(1, 40), two=st.integers(1, 20))
@settings(max_examples=10)
def test_the_network_says_what_scikit_learn_says(seed, one, two):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(200, 4)) * [1, 10, 0.1, 0] + [0, -20, 3, 7]).astype(np.float32)  # one column is constant
    target = (rows[:, 0] * (rows[:, 1] > -20) + rng.normal(size=200)).astype(np.float32)
    scaler = StandardScaler().fit(rows)
    network = MLPRegressor(hidden_layer_sizes=(one, two), tol=1.0, n_iter_no_change=2, random_state=0)
    network.fit(scaler.transform(rows), target)
    total, packed = np.ones(len(rows)), packed_network(scaler, network)
    add_network(rows, *(packed[name] for name in NETWORK_ARRAYS), total)
    np.testing.assert_allclose(total - 1, network.predict(scaler.transform(rows)), rtol=1e-4, atol=1e-4)


def test_a_network_is_fitted_the_same_twice_and_to_a_single_row():
    rows = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    for number in (1, 500):
        first, second = (fit_network(rows[:number], rows[:number, 0]) for _ in range(2))
        for name in NETWORK_ARRAYS:
            np.testing.assert_array_equal(first[name], second[name])
            assert np.isfinite(first[name]).all()


@given(data=st.data())
@settings(max_examples=20)
def test_tables_are_shares_counted_one_by_one(data):
    trace = data.draw(traces())
    assume(trace.rows)
    experts, layers = trace.meta.model.experts, trace.experts.shape[1]
    counted = np.array(data.draw(st.lists(st.booleans(), min_size=trace.rows, max_size=trace.rows)))
    assume(counted.any())
    made = tables(trace, (1, 2), counted)
    used = (trace.experts[:, :, :, None] == np.arange(experts)).any(axis=2)  # [N, L, E]
    n = np.count_nonzero(counted)
    share = (used[counted].sum(axis=0) + 1 / experts) / (n + 1)
    np.testing.assert_allclose(made["share"], share, rtol=2e-3)
    before, earlier = history(trace)
    for row in range(trace.rows):
        own = np.flatnonzero(trace.request == trace.request[row])
        assert before[row] == max(own[own < row], default=-1)
        assert earlier[row] == max(own[trace.step[own] < trace.step[row]], default=-1)
    pairs = {
        ("across", 0): lambda row, layer: used[row, layer - 1] if layer >= 1 else None,
        ("across", 1): lambda row, layer: used[row, layer - 2] if layer >= 2 else None,
        ("follows", None): lambda row, layer: (
            used[before[row], layer] if before[row] >= 0 and counted[before[row]] else None
        ),
    }
    for (name, index), source in pairs.items():
        table = made[name] if index is None else made[name][index]
        for layer in range(layers):
            both, ones = np.zeros((experts, experts)), np.zeros(experts)
            for row in np.flatnonzero(counted):
                known = source(row, layer)
                if known is not None:
                    both += np.outer(known, used[row, layer])
                    ones += known
            expected = (both + SHRINK * share[layer]) / (ones[:, None] + SHRINK)
            np.testing.assert_allclose(table[layer], expected, rtol=2e-3)


def test_it_beats_its_base_on_requests_that_it_has_not_seen(case):
    fitting, _, fitted = case
    assert fitted.settings["base"] == ("pre-gate" if fitting.lookahead is not None else "transition")
    hybrid, base = (fitted.metrics[name]["overall"]["recall@k"] for name in (fitted.kind, "base"))
    assert fitted.metrics["points_over_base"] == pytest.approx(100 * (hybrid - base))
    assert fitted.metrics["points_over_base"] > (10 if fitting.lookahead is not None else 5)
    assert fitted.metrics["judged_requests"] == 5
    assert fitted.seconds_per_call > 0


def test_a_saved_file_predicts_the_same_and_names_what_its_gates_cost(case, tmp_path):
    _, judged, fitted = case
    fitted.save(tmp_path / "h.safetensors")
    predictor = KINDS[fitted.kind](str(tmp_path / "h.safetensors"))
    np.testing.assert_array_equal(predictor.predict(judged).experts, Model(fitted).predictions(judged).experts)
    assert predictor.gates == (fitted.settings["base"] == "pre-gate")
    assert KINDS[fitted.kind]().gates == 0
    assert load_fitted(tmp_path / "h.safetensors", fitted.kind).metrics == fitted.metrics


def test_targets_lie_in_the_step_and_past_it_nothing_is_said(case):
    _, judged, fitted = case
    found = Model(fitted).predictions(judged)
    assert found.moments == (-1, 0, 1, 2, 3)
    for column, moment in enumerate(found.moments):
        for i, distance in enumerate(found.distances):
            assert ((found.experts[:, column, i] < EXPERTS) == (moment + distance < LAYERS)).all()


def test_a_trace_of_another_geometry_is_refused(case):
    other = trace_of(spec(LAYERS, EXPERTS + 1, TOP_K), [np.zeros((1, LAYERS, TOP_K), np.int64)])
    with pytest.raises(InputError, match="4 MoE layers x 12 experts, top-2, but the trace has 4 x 13, top-2"):
        Model(case[2]).predictions(other)


def test_a_trace_without_the_pre_gate_is_refused_by_what_was_fitted_to_one(case):
    fitting, _, fitted = case
    if fitting.lookahead is None:
        assert Model(fitted).predictions(structured(True)).distances == (1, 2, 3, 4)
        return
    with pytest.raises(InputError, match=r"distances \[1, 2\], the trace has \[\]: record with --lookahead 2"):
        Model(fitted).predictions(structured(False))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_without_rows_cannot_be_fitted_to(kind):
    trace = structured(False)
    with pytest.raises(InputError, match=f"predict {kind}: .* no rows"):
        KINDS[kind].train(trace.of_requests([]), trace)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_file_it_says_how_to_get_one(kind):
    with pytest.raises(InputError, match=f"moeflow policies train {kind} "):
        KINDS[kind]().predict(structured(False))


def test_what_is_learned_is_the_deviation_from_the_base():
    candidates = np.array([[3, 5], [1, 2]])
    features = np.zeros((2, 2, len(FEATURES)), np.float32)
    features[:, :, BASE] = [[0.25, 0.5], [0.0, 1.0]]
    truth = np.array([[5, 7], [9, 1]])
    assert deviation(candidates, features, truth).tolist() == [[-0.25, 0.5], [1.0, -1.0]]


def test_folds_keep_requests_together_where_there_are_enough():
    trace = structured(False)
    parts = folds(trace)
    assert set(parts.tolist()) == set(range(FOLDS))
    assert all(len(set(parts[trace.request == request].tolist())) == 1 for request in range(10))
    assert len(set(folds(trace.of_requests([0])).tolist())) == FOLDS
