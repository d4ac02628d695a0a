"""The stride predictor learns what routing determines, sees nothing later, and refuses what it was not fitted to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import decode_trace
from moeflow.policies.fitted import Fitted
from moeflow.policies.stride import STRIDE, Stride
from moeflow.traces.trace import Trace

from moeflow.errors import InputError

pytest.importorskip("sklearn")


def permuted(seed: int, rows: int = 300, layers: int = 5, experts: int = 8) -> Trace:
    """Every layer's two experts are the layer before's, each renamed by that layer's fixed permutation."""
    names = np.random.default_rng(7).permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    rng, sets = np.random.default_rng(seed), []
    for _ in range(rows):
        now = rng.permutation(experts)[:2]
        sets.append([])
        for layer in range(layers):
            now = names[layer][now]
            sets[-1].append(now.tolist())
    return decode_trace(experts, sets)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    return Stride.train(permuted(0), permuted(1, 60))


@pytest.fixture(scope="module")
def file(fitted, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("stride") / "stride.safetensors"
    fitted.save(path)
    return str(path)


def test_what_the_layer_determines_is_learned(fitted):
    assert fitted.metrics["by_distance"].keys() == {str(STRIDE)}
    assert fitted.metrics["overall"]["recall@k"] > 0.99
    assert fitted.metrics["popularity"]["recall@k"] < 0.5
    assert fitted.seconds_per_call > 0 and len(fitted.requests) == 1


def test_training_twice_gives_the_same_arrays(fitted):
    again = Stride.train(permuted(0), permuted(1, 60))
    for name, array in fitted.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    assert again.metrics == fitted.metrics


@pytest.mark.parametrize("step, layer", [(0, 0), (3, 1), (5, 4)])
def test_nothing_routed_later_changes_what_was_said(file, step, layer):
    trace = permuted(2, 8)
    other = trace.experts.copy()
    other[step, layer + 1 :] = (other[step, layer + 1 :] + 1) % 8
    other[step + 1 :] = (other[step + 1 :] + 3) % 8
    said, changed = (Stride(file).predict(t) for t in (trace, replace(trace, experts=other)))
    assert said.moments == (0, 1, 2)
    upto = sum(moment <= layer for moment in said.moments)
    for name in ("experts", "probability"):
        one, two = getattr(said, name), getattr(changed, name)
        np.testing.assert_array_equal(one[:step], two[:step])
        np.testing.assert_array_equal(one[step, :upto], two[step, :upto])


def test_gate_weights_and_sketches_are_inputs_where_recorded():
    trace = permuted(0, 40)
    weights = np.full(trace.experts.shape, 0.5, np.float16)
    sketch = np.ones((40, 5, 3), np.float16)
    trace = replace(trace, weights=weights, sketch=sketch)
    fitted = Stride.train(trace, trace.of_requests([]))
    assert fitted.arrays["first"].shape == (5 - STRIDE, 8 + 3, 128)
    assert fitted.metrics == {}


def test_a_trace_that_it_was_not_fitted_to_is_refused(file):
    with pytest.raises(InputError, match=r"fitted to a trace with layers 5, and this one has 4; train it"):
        Stride(file).predict(permuted(0, 4, layers=4))
    with pytest.raises(InputError, match=r"experts 8, and this one has 9"):
        Stride(file).predict(permuted(0, 4, experts=9))
    trace = permuted(0, 4)
    with pytest.raises(InputError, match=r"weights False, and this one has True"):
        Stride(file).predict(replace(trace, weights=np.ones(trace.experts.shape, np.float16)))


def test_other_files_and_shallow_models_are_refused(file, tmp_path):
    Fitted("sequence", {"x": np.zeros(1)}, {}, {}, (), 0.0).save(tmp_path / "other")
    with pytest.raises(InputError, match="fitted for 'sequence', not for 'stride'"):
        Stride(str(tmp_path / "other")).predict(permuted(0, 4))
    with pytest.raises(InputError, match="has to be trained"):
        Stride().predict(permuted(0, 4))
    with pytest.raises(InputError, match="the trace has 2 MoE layers"):
        Stride.train(permuted(0, 4, layers=2), permuted(0, 4, layers=2))
