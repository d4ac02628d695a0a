"""The sequence predictor learns, sees nothing later and beats its baselines; recall in later steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import decode_trace, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies import sequence
from moeflow.policies.fitted import Fitted
from moeflow.policies.predictor import Predictions
from moeflow.policies.recall import popular, recall_table
from moeflow.policies.sequence import AHEAD, Sequence
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.reader import load_trace
from moeflow.traces.trace import Trace

from moeflow.errors import InputError


def cycle(rows: int, begin: int = 0, experts: int = 7) -> Trace:
    """Token t needs expert 3t of layer 0 and 2t + 1 of layer 1, modulo `experts`."""
    return decode_trace(experts, [[[3 * t % experts], [(2 * t + 1) % experts]] for t in range(begin, begin + rows)])


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return Sequence.train(cycle(120), cycle(40, begin=3))


@pytest.fixture(scope="module")
def file(fitted, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("sequence") / "sequence.safetensors"
    fitted.save(path)
    return str(path)


def test_what_the_token_determines_is_learned_at_every_distance(fitted):
    for ahead in AHEAD:
        assert fitted.metrics["by_distance"][str(2 * ahead)]["recall@k"] == 1.0
        assert fitted.metrics["popularity"][str(2 * ahead)] < 0.3
    assert fitted.seconds_per_call > 0 and len(fitted.requests) == 1


def test_training_twice_gives_the_same_arrays(fitted):
    again = Sequence.train(cycle(120), cycle(40, begin=3))
    for name, array in fitted.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_on_requests_it_has_not_seen_it_beats_popularity_and_the_last_token():
    trace = load_trace(BUNDLED_TRACE)
    metrics = Sequence.train(trace.of_requests(range(0, 60, 2)), trace.of_requests(range(1, 60, 2))).metrics
    for distance, figures in metrics["by_distance"].items():
        assert figures["recall@k"] > metrics["last_token"][distance]
        assert figures["recall@k"] > metrics["popularity"][distance]


@settings(max_examples=30)
@given(data=st.data())
def test_nothing_routed_later_changes_what_was_said(data):
    trace = data.draw(traces())
    experts, layers = trace.meta.model.experts, trace.experts.shape[1]
    rng = np.random.default_rng(0)
    arrays = {
        "uses": rng.integers(1, 9, (layers, experts)).astype(np.float32),
        "tokens": np.array([50], np.float32),
        "followers": rng.integers(0, 5, (layers, len(AHEAD), experts, experts)).astype(np.float32),
        "crossing": rng.integers(0, 5, (layers, experts, experts)).astype(np.float32),
        "weights": rng.normal(size=(len(AHEAD), sequence.FEATURES)),
    }
    steps = np.unique(trace.step)
    step, layer = data.draw(st.sampled_from(steps.tolist())), data.draw(st.integers(0, layers - 1))
    other = trace.experts.copy()
    later = (trace.step[:, None] > step) | ((trace.step[:, None] == step) & (np.arange(layers) > layer))
    other[later] = rng.integers(0, experts, other[later].shape)
    said, changed = (sequence._predict(arrays, t) for t in (trace, replace(trace, experts=other)))
    assert said.moments == tuple(range(layers))
    for name in ("experts", "probability"):
        np.testing.assert_array_equal(getattr(said, name)[~later], getattr(changed, name)[~later])


def test_only_the_last_row_of_a_request_in_a_step_says_anything(file):
    trace = cycle(6)
    chunk = replace(trace, step=np.array([0, 0, 0, 1, 2, 3], np.int32))
    said = Sequence(file).predict(chunk)
    assert (said.experts[:2] == chunk.absent).all() and (said.probability[:2] == 0).all()
    assert (said.experts[2:] < 7).all()
    np.testing.assert_array_equal(said.experts[2:], Sequence(file).predict(trace).experts[2:])


def test_requests_do_not_see_each_other(file):
    one, two = cycle(8), cycle(8, begin=2)
    order = np.argsort(np.tile(np.arange(8), 2), kind="stable")
    both = replace(
        one,
        **{name: np.concatenate((array, getattr(two, name)))[order] for name, array in one.columns.items()},
    )
    both = replace(both, request=np.tile(np.arange(2, dtype=np.int32), 8), step=np.repeat(np.arange(8), 2).astype("i4"))
    said, alone = Sequence(file).predict(both), Sequence(file).predict(two)
    np.testing.assert_array_equal(said.experts[1::2], alone.experts)
    np.testing.assert_array_equal(said.probability[1::2], alone.probability)


def test_what_does_not_fit_is_refused(file, tmp_path):
    with pytest.raises(InputError, match=r"fitted to 2 layers of 7 experts, and the trace has 2 of 8; train it"):
        Sequence(file).predict(cycle(4, experts=8))
    Fitted("stride", {"x": np.zeros(1)}, {}, {}, (), 0.0).save(tmp_path / "other")
    with pytest.raises(InputError, match="fitted for 'stride', not for 'sequence'"):
        Sequence(str(tmp_path / "other")).predict(cycle(4))
    with pytest.raises(InputError, match="has 8 rows; learning 8 ahead needs more"):
        Sequence.train(cycle(8), cycle(8))


def test_a_long_trace_gets_fewer_experts_but_never_fewer_than_top_k(fitted, monkeypatch):
    assert sequence._predict(fitted.arrays, cycle(10)).experts.shape == (10, 2, 4, 3)
    monkeypatch.setattr(sequence, "ENTRIES", 10 * 2 * 4 * 2)
    assert sequence._predict(fitted.arrays, cycle(10)).experts.shape == (10, 2, 4, 2)
    monkeypatch.setattr(sequence, "ENTRIES", 1)
    assert sequence._predict(fitted.arrays, cycle(10)).experts.shape == (10, 2, 4, 1)


def test_plain_python_says_the_same(fitted, monkeypatch):
    said = sequence._predict(fitted.arrays, cycle(10))
    if not hasattr(sequence._walk, "py_func"):
        pytest.skip("numba is not installed: there is only one of them")
    for name in ("_walk", "_rank"):
        monkeypatch.setattr(sequence, name, getattr(sequence, name).py_func)
    plain = sequence._predict(fitted.arrays, cycle(10))
    np.testing.assert_array_equal(plain.experts, said.experts)
    np.testing.assert_allclose(plain.probability, said.probability, rtol=2e-3)


def test_recall_of_a_later_step_is_judged_by_the_requests_own_later_rows():
    """Two requests; the first is in steps 0, 2 and 3, so its next step after 0 is 2."""
    trace = decode_trace(4, [[[0]], [[1]], [[2]], [[3]], [[0]]])
    trace = replace(
        trace, step=np.array([0, 0, 1, 2, 3], np.int32), request=np.array([5, 6, 6, 5, 5], np.int32)
    )  # rows of 5: 0 (needs 0), 3 (needs 3), 4 (needs 0); of 6: 1 (needs 1), 2 (needs 2)
    said = np.array([3, 2, 9, 1, 9], np.uint8).reshape(5, 1, 1, 1)
    table = recall_table(Predictions((0,), (1,), said, np.ones(said.shape, np.float16)), trace)
    assert table["by_distance"]["1"]["recall@k"] == pytest.approx(2 / 3)  # 3 and 2 are right, 1 is not 0


def test_the_popular_baseline_says_the_most_used_of_the_target_layer():
    said = popular(cycle(8), cycle(3), (0, 1), (1,))
    assert said.experts.shape == (3, 2, 1, 2)
    assert said.experts[0, 0, 0, 0] == 1  # of layer 1 token 7 needs expert 1 once more
    assert said.experts[0, 1, 0, 0] == 0
