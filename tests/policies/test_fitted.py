"""Fitted files, the predictions kept of a trace, and the command that trains."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from cases import decode_trace, traces
from hypothesis import given, settings
from moeflow.policies import policy as policy_module
from moeflow.policies.fitted import Fitted, load_fitted, request_digests, share_seen
from moeflow.policies.policy import Policy
from moeflow.policies.policy_command import app
from moeflow.policies.predictor import Predictions, Predictor, predictions_for
from moeflow.traces.trace import Trace
from moeflow.traces.writer import write_trace
from typer.testing import CliRunner

from moeflow.errors import InputError

TRACE = decode_trace(4, [[[step % 4], [(step + 1) % 4]] for step in range(8)])


class Popular(Predictor):
    """The training requests' most popular expert of each layer, one layer ahead."""

    calls = 0

    @classmethod
    def train(cls, trace: Trace, judged: Trace) -> Fitted:
        counts = np.stack([np.bincount(layer.ravel(), minlength=4)[:4] for layer in trace.experts.swapaxes(0, 1)])
        metrics = {"judged rows": judged.rows}
        return Fitted("popular", {"counts": counts}, {}, metrics, tuple(request_digests(trace).values()), 1e-5)

    def predict(self, trace: Trace) -> Predictions:
        type(self).calls += 1
        best = self.fitted().arrays["counts"].argmax(axis=1)
        said = np.broadcast_to(best[None, :, None, None], (trace.rows, len(best), 1, 1)).astype(np.uint8)
        return Predictions((-1, 0), (1,), said, np.ones(said.shape, np.float16))


@pytest.fixture
def popular(monkeypatch, tmp_path):
    """`Popular` known by that name, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Popular, "__module__", "tests.popular")
    monkeypatch.setattr(Popular, "calls", 0)
    find = policy_module.find_class
    known = lambda base, name, where: Popular if name == "popular" else find(base, name, where)  # noqa: E731
    monkeypatch.setattr(policy_module, "find_class", known)
    file = tmp_path / "popular.safetensors"
    Popular.train(TRACE, TRACE).save(file)
    return str(file)


def test_a_fitted_file_comes_back_as_it_was(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.float32([1.5])}
    fitted = Fitted("x", arrays, {"depth": 3}, {"recall": 0.5}, ("b", "a"), 1e-4)
    fitted.save(tmp_path / "deep" / "x.safetensors")
    found = load_fitted(tmp_path / "deep" / "x.safetensors", "x")
    assert (found.settings, found.metrics, found.requests, found.seconds_per_call) == (
        {"depth": 3}, {"recall": 0.5}, ("a", "b"), 1e-4,
    )  # fmt: skip
    assert len(found.sha256) == 64
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"no arrays", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_fitted_file_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.safetensors") as caught:
        load_fitted(path, "popular")
    assert "\n" not in str(caught.value)


def test_the_file_of_another_predictor_is_refused(popular):
    with pytest.raises(InputError, match="fitted for 'popular', not for 'hybrid'"):
        load_fitted(popular, "hybrid")


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another file"):
        Fitted("x", {}, {}, {}, (), None).save(tmp_path / "file" / "x.safetensors")


@given(trace=traces())
@settings(max_examples=25)
def test_a_requests_digest_is_its_own_whatever_stands_beside_it(trace):
    whole = request_digests(trace)
    for request in np.unique(trace.request).tolist():
        alone = trace.of_requests([request])
        assert request_digests(alone) == {request: whole[request]}
        assert share_seen(alone, (whole[request],)) == 1.0
    assert share_seen(trace, ()) == 0.0


def test_predictions_are_computed_once_per_trace_and_file(popular):
    predictor = Popular(popular)
    first, second = predictions_for(predictor, TRACE), predictions_for(predictor, TRACE)
    assert Popular.calls == 1
    np.testing.assert_array_equal(first.experts, second.experts)
    assert (second.moments, second.distances) == ((-1, 0), (1,))
    predictions_for(predictor, TRACE.of_requests([0, 99]))
    assert Popular.calls == 1, "the same rows are the same trace"
    other = Fitted("popular", {"counts": np.eye(2, 4)}, {}, {}, (), None)
    other.save(popular)
    predictions_for(predictor, TRACE)
    assert Popular.calls == 2


def test_a_run_on_what_was_fitted_to_is_labelled(popular):
    document = {"prefetch": {"kind": "predicted"}, "predict": {"kind": "popular"}}
    policy = Policy.from_document(document).with_fitted(popular)
    assert policy.in_sample(TRACE) == 1.0
    assert policy.in_sample(decode_trace(4, [[[0], [0]]])) == 0.0
    assert policy.document["predict"] == {"kind": "popular", "fitted": popular}


def test_a_predictor_without_its_file_says_how_to_get_one(popular):
    policy = Policy.from_document({"prefetch": {"kind": "predicted"}, "predict": {"kind": "popular"}})
    with pytest.raises(InputError, match="moeflow policies train popular --trace"):
        policy.predictions(TRACE)


def test_a_policy_that_reads_predictions_needs_a_predictor():
    with pytest.raises(InputError, match=r"predict\.kind"):
        Policy.from_document({"prefetch": {"kind": "predicted"}})


def test_a_policy_without_a_predictor_takes_no_fitted_file():
    with pytest.raises(InputError, match="nothing that is trained"):
        Policy.load("lru").with_fitted("x.safetensors")


def test_a_missing_column_is_named():
    policy = Policy.load("next-gate")
    with pytest.raises(InputError, match="'lookahead'"):
        policy.predictions(TRACE)


def trained(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


def test_training_holds_requests_out_and_writes_the_metrics(popular, tmp_path, monkeypatch):
    many = np.arange(8, dtype=np.int32) // 2
    write_trace(tmp_path / "t.parquet", replace(TRACE, request=many))
    out = tmp_path / "fitted.safetensors"
    result = trained("popular", "--trace", str(tmp_path / "t.parquet"), "--out", str(out), "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["requests"] == 2 and facts["metrics"] == {"judged rows": 4}
    assert len(load_fitted(out, "popular").requests) == 2


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("hybrids",), "hybrids"),
        (("next-gate",), "nothing to train"),
        (("popular", "--hold-out", "some"), "--hold-out 'some'"),
        (("popular", "--hold-out", "even"), "no request is left"),
    ],
)
def test_bad_training_arguments_are_refused(popular, tmp_path, arguments, sentence):
    write_trace(tmp_path / "t.parquet", TRACE)
    result = trained(*arguments, "--trace", str(tmp_path / "t.parquet"), "--out", str(tmp_path / "o.safetensors"))
    assert isinstance(result.exception, InputError)
    assert sentence in str(result.exception)
    assert not (tmp_path / "o.safetensors").exists()


def test_predictions_of_a_predictor_that_is_not_trained_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trace = decode_trace(4, [[[0], [1]]])
    ahead = np.repeat(trace.experts[:, :1], 3, axis=1)[:, :, None]
    trace = replace(trace, lookahead=ahead, meta=replace(trace.meta, lookahead_distances=(1,)))
    predictions_for(Policy.load("next-gate").predictor(), trace)
    assert not list(tmp_path.rglob("*.safetensors"))
