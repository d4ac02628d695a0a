"""What must hold for every predictor in policies/: files are discovered, not listed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import policies_in_folder, traces
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from moeflow.policies import rpp_network
from moeflow.policies.predictor import Predictions, Predictor
from moeflow.traces.trace import Trace

from moeflow.errors import InputError

PREDICTORS = policies_in_folder(Predictor)
EXAMPLES = 8  # each trains a predictor


def served(name: str, trace: Trace) -> bool:
    return all(getattr(trace, column) is not None for column in PREDICTORS[name].needs)


def trained(name: str, trace: Trace, folder) -> Predictor:
    """A predictor of this kind, fitted to `trace` where that is needed."""
    cls = PREDICTORS[name]
    if not cls.trained:
        return cls()
    path, training = folder / f"{name}.safetensors", rpp_network.Training
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpp_network, "Training", lambda: training(steps=2))  # causal from the first step on
        try:
            cls.train(trace, trace.of_requests([])).save(path)
        except InputError:
            reject()  # a trace with nothing to learn, which it says
    return cls(str(path))


def cut(trace: Trace, row: int, layer: int, seed: int) -> Trace:
    """The trace as known when MoE layer `layer` of `row`'s step is routed (-1: the step begins); the rest is noise.

    Whatever is routed later is replaced, and later steps are left out.
    """
    rng = np.random.default_rng(seed)
    end = int(np.searchsorted(trace.step, trace.step[row], side="right"))
    kept = {name: array[:end].copy() for name, array in trace.columns.items()}
    now = kept["step"] == trace.step[row]
    for name, known in (("experts", layer + 1), ("weights", layer + 1), ("probs", layer + 1), ("lookahead", layer + 2),
                        ("lookahead_weights", layer + 2)):  # fmt: skip
        if name in kept:
            later = kept[name][now, known:]
            noise = rng.permutation(later.ravel()).reshape(later.shape)
            absent = np.full_like(later, trace.absent if later.dtype.kind == "u" else 0)
            kept[name][now, known:] = noise if seed % 2 else absent
    return replace(trace, **kept)


def assert_same(found: Predictions, expected: Predictions, rows: slice, columns: int) -> None:
    assert (found.moments, found.distances) == (expected.moments, expected.distances)
    np.testing.assert_array_equal(found.experts[rows, :columns], expected.experts[rows, :columns])
    np.testing.assert_array_equal(found.probability[rows, :columns], expected.probability[rows, :columns])


@pytest.mark.parametrize(
    "name, lookahead",
    [*((n, True) for n in PREDICTORS), *((n, False) for n, cls in PREDICTORS.items() if "lookahead" not in cls.needs)],
)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_no_prediction_depends_on_what_is_routed_after_its_moment(name, lookahead, tmp_path_factory, data):
    trace = data.draw(traces(lookahead=lookahead))
    assume(trace.rows and served(name, trace))
    predictor = trained(name, trace, tmp_path_factory.mktemp("fitted"))
    whole = predictor.predict(trace)
    row = data.draw(st.integers(0, trace.rows - 1))
    layer = data.draw(st.integers(-1, trace.experts.shape[1] - 1))
    known = predictor.predict(cut(trace, row, layer, data.draw(st.integers(0, 3))))
    begins, ends = np.searchsorted(trace.step, trace.step[row], side="left"), len(known.experts)
    assert_same(known, whole, slice(0, begins), len(whole.moments))
    assert_same(known, whole, slice(begins, ends), sum(moment <= layer for moment in whole.moments))


@pytest.mark.parametrize("name", PREDICTORS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_predictions_are_distinct_experts_likeliest_first(name, tmp_path_factory, data):
    trace = data.draw(traces(lookahead=True))
    assume(trace.rows and served(name, trace))
    found = trained(name, trace, tmp_path_factory.mktemp("fitted")).predict(trace)
    experts, probability = trace.meta.model.experts, found.probability.astype(np.float32)
    assert found.experts.shape == probability.shape
    assert found.experts.shape[:3] == (trace.rows, len(found.moments), len(found.distances))
    assert ((probability >= 0) & (probability <= 1)).all()
    assert (np.diff(probability, axis=-1) <= 0).all()
    ids = np.sort(found.experts.astype(int), axis=-1)
    assert not ((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] < experts)).any()


@pytest.mark.parametrize("name", PREDICTORS)
@given(data=st.data())
@settings(max_examples=EXAMPLES // 2)
def test_two_predictors_fitted_to_the_same_trace_say_the_same(name, tmp_path_factory, data):
    trace = data.draw(traces(lookahead=True))
    assume(trace.rows and served(name, trace))
    first, second = (trained(name, trace, tmp_path_factory.mktemp("fitted")) for _ in range(2))
    said = first.predict(trace)
    assert_same(second.predict(trace), said, slice(None), len(said.moments))
