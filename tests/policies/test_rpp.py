"""The routing path predictor: causal, learns what can be learned from token ids, and says what does not fit."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from cases import spec
from moeflow.policies.fitted import Fitted
from moeflow.policies.policy_command import app
from moeflow.policies.predictor import Predictions, predictions_for
from moeflow.policies.rpp import RPP
from moeflow.traces.lockstep import lockstep
from moeflow.traces.trace import DECODE, PREFILL, Trace, TraceMeta
from moeflow.traces.writer import write_trace
from typer.testing import CliRunner

from moeflow.errors import InputError

pytest.importorskip("torch")
rpp_network = importlib.import_module("moeflow.policies.rpp_network")

VOCABULARY, LAYERS, EXPERTS, TOP_K = 12, 3, 8, 4


def conversation(requests: int, prompt: int = 5, decoded: int = 7, seed: int = 0) -> Trace:
    """Prompts in two chunks, then decode steps; a token id decides its routing."""
    rng = np.random.default_rng(seed)
    rows = requests * (prompt + decoded)
    at = np.tile(np.arange(prompt + decoded), requests)
    token = rng.integers(0, VOCABULARY, rows)
    table = np.argsort(np.random.default_rng(99).random((VOCABULARY, LAYERS, EXPERTS)), axis=2)[:, :, :TOP_K]
    step_of = np.concatenate(([0] * 3, [1] * (prompt - 3), 2 + np.arange(decoded)))
    return Trace(
        TraceMeta(spec(LAYERS, EXPERTS, TOP_K, vocabulary=VOCABULARY)),
        step=(np.repeat(np.arange(requests), prompt + decoded) * (decoded + 2) + step_of[at]).astype(np.int32),
        request=np.repeat(np.arange(requests), prompt + decoded).astype(np.int32),
        position=at.astype(np.int32),
        token=token.astype(np.int32),
        phase=np.where(at < prompt, PREFILL, DECODE).astype(np.int8),
        attempt=np.zeros(rows, np.int16),
        flags=np.zeros(rows, np.uint8),
        experts=table[token].astype(np.uint8),
    )


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    """A fitted file with random weights, none of them zero: everything that is visible has an effect."""
    import torch

    torch.manual_seed(1)
    shape = rpp_network.Shape(VOCABULARY, LAYERS, EXPERTS)
    network = rpp_network.Network(shape)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("rpp") / "rpp.safetensors"
    Fitted("rpp", rpp_network.to_arrays(network), rpp_network.shape_settings(shape), {}, (), 0.0).save(path)
    return str(path)


def dense(predictions: Predictions) -> np.ndarray:
    """[N, L, E]: 2k = E, so that every probability is said."""
    found = np.zeros((len(predictions.experts), LAYERS, EXPERTS))
    np.put_along_axis(
        found, predictions.experts[:, 0].astype(np.int64), predictions.probability[:, 0].astype(float), axis=2
    )
    return found


def test_it_speaks_at_step_start_of_every_layer(untrained):
    trace = conversation(3)
    said = RPP(untrained).predict(trace)
    assert (said.moments, said.distances) == ((-1,), (1, 2, 3))
    assert said.experts.shape == said.probability.shape == (trace.rows, 1, LAYERS, 2 * TOP_K)
    assert (np.sort(said.experts, axis=3) == np.arange(EXPERTS)).all()
    assert (np.diff(said.probability.astype(float), axis=3) <= 0).all()


def test_a_prediction_depends_on_no_later_step_and_on_no_other_request(untrained):
    trace = conversation(2)
    said = dense(RPP(untrained).predict(trace))
    for last in np.unique(trace.step):
        kept = trace.step <= last
        part = trace.reordered(np.flatnonzero(kept), trace.step[kept])
        np.testing.assert_allclose(dense(RPP(untrained).predict(part)), said[kept], atol=2e-3)
    alone = trace.of_requests([1])
    np.testing.assert_allclose(dense(RPP(untrained).predict(alone)), said[trace.request == 1], atol=2e-3)
    batches = lockstep(trace, 2)
    order = np.lexsort((batches.position, batches.request))
    np.testing.assert_allclose(dense(RPP(untrained).predict(batches))[order], said, atol=2e-3)


@pytest.mark.parametrize("row, changed", [(0, 0), (2, 0), (3, 3), (8, 8)])
def test_a_prediction_depends_on_every_token_of_its_step_and_before(untrained, row, changed):
    """Rows 0 to 2 are one chunk of the prompt, 3 and 4 the next, then one row a step."""
    trace = conversation(1)
    token = trace.token.copy()
    token[row] = (token[row] + 1) % VOCABULARY
    before, after = (dense(RPP(untrained).predict(t)) for t in (trace, replace(trace, token=token)))
    differs = np.abs(before - after).max(axis=(1, 2)) > 0
    assert differs.tolist() == [r >= changed for r in range(trace.rows)]


def test_it_learns_what_token_ids_decide(monkeypatch):
    training = rpp_network.Training
    monkeypatch.setattr(rpp_network, "Training", lambda: training(steps=150, batch=8))
    fitted = RPP.train(conversation(20), conversation(6, seed=1))
    assert fitted.metrics["rpp"]["recall@k"] > 0.95
    assert fitted.metrics["token table"]["recall@k"] > 0.95
    assert fitted.metrics["popularity"]["recall@k"] < 0.8
    assert fitted.seconds_per_call > 0
    assert len(fitted.requests) == 20


def test_training_twice_gives_the_same_weights(monkeypatch):
    training = rpp_network.Training
    monkeypatch.setattr(rpp_network, "Training", lambda: training(steps=3))
    trace = conversation(4)
    nothing = trace.of_requests([])
    first, second = RPP.train(trace, nothing), RPP.train(trace, nothing)
    assert first.metrics == {}
    for name, value in first.arrays.items():
        np.testing.assert_array_equal(value, second.arrays[name])


def test_the_command_writes_the_file_and_its_figures_beside_it(monkeypatch, tmp_path):
    training = rpp_network.Training
    monkeypatch.setattr(rpp_network, "Training", lambda: training(steps=2))
    write_trace(tmp_path / "t.parquet", conversation(4))
    out = tmp_path / "fitted.safetensors"
    arguments = ["train", "rpp", "--trace", str(tmp_path / "t.parquet"), "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    report = json.loads((tmp_path / "fitted.json").read_text())
    assert report["metrics"]["requests judged"] == report["requests"] == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert predictions_for(RPP(str(out)), conversation(4)).experts.shape == (48, 1, LAYERS, 2 * TOP_K)


def test_what_does_not_fit_is_refused(untrained):
    trace = conversation(1)
    unknown = replace(trace, token=np.full_like(trace.token, -1))
    with pytest.raises(InputError, match="the trace has no token ids"):
        RPP(untrained).predict(unknown)
    with pytest.raises(InputError, match="the trace has no token ids"):
        RPP.train(unknown, trace)
    with pytest.raises(InputError, match="token id 12 lies outside the vocabulary of 12"):
        RPP(untrained).predict(replace(trace, token=np.full_like(trace.token, VOCABULARY)))
    other = replace(trace, meta=TraceMeta(spec(LAYERS, EXPERTS + 1, TOP_K)))
    with pytest.raises(InputError, match="fitted to 3 MoE layers of 8 experts, but the trace has 3 of 9"):
        RPP(untrained).predict(other)
    with pytest.raises(InputError, match="moeflow policies train rpp"):
        RPP().predict(trace)


def test_a_file_whose_weights_are_not_of_its_sizes_is_refused(untrained, tmp_path):
    good = RPP(untrained).fitted()
    for settings in ({}, {**good.settings, "hidden": 16}):
        path = tmp_path / "wrong.safetensors"
        replace(good, settings=settings).save(path)
        with pytest.raises(InputError, match="weights and sizes do not match") as caught:
            RPP(str(path)).predict(conversation(1))
        assert "\n" not in str(caught.value)


def test_without_torch_it_says_what_to_install(untrained, monkeypatch):
    monkeypatch.delitem(sys.modules, "moeflow.policies.rpp_network")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs torch: pip install 'moeflow\[train\]'"):
        RPP(untrained).predict(conversation(1))
