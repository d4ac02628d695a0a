"""Layer budgets against brute force, greedy and replayed LRU; files, documents, labels and the command."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from cases import decode_trace, drive, spec, trace_of, traces
from hypothesis import given
from hypothesis import strategies as st
from moeflow.policies import layer_budget
from moeflow.policies.fitted import Fitted
from moeflow.policies.layer_budget import SPLITS, Statistics, load_statistics, shares, statistics, train
from moeflow.policies.policy import Policy
from moeflow.policies.policy_command import app
from moeflow.policies.residency import Slots
from moeflow.sim.run import simulate
from moeflow.traces.bundled import BUNDLED_TRACE, PRICED_AS
from moeflow.traces.reader import load_trace
from moeflow.traces.trace import Trace
from moeflow.traces.writer import write_trace
from typer.testing import CliRunner

from moeflow.errors import InputError


def known(hits: np.ndarray, top_k: int = 1) -> Statistics:
    layers = len(hits)
    return Statistics(hits, hits[:, -1] + 5, np.arange(1.0, layers + 1), np.arange(layers, 0.0, -1), top_k)


@st.composite
def curves(draw: st.DrawFn, convex: bool = False) -> np.ndarray:
    """[L, E+1] hits by capacity, ascending from 0; with `convex` each further slot brings no more than the last."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    gains = draw(st.lists(st.integers(0, 9), min_size=layers * experts, max_size=layers * experts))
    each = np.array(gains).reshape(layers, experts)
    if convex:
        each = -np.sort(-each, axis=1)
    return np.concatenate((np.zeros((layers, 1), np.int64), np.cumsum(each, axis=1)), axis=1)


@given(st.data())
def test_the_dynamic_programme_finds_what_brute_force_finds(data):
    hits = data.draw(curves())
    layers, experts = hits.shape[0], hits.shape[1] - 1
    total, top_k = data.draw(st.integers(layers, layers * experts)), data.draw(st.integers(1, experts))
    least = min(top_k, total // layers)
    found = shares("dp", total, known(hits, top_k))
    assert sum(found) == total
    assert all(least <= slots <= experts for slots in found)
    choices = [c for c in product(range(least, experts + 1), repeat=layers) if sum(c) == total]
    best = max(sum(hits[layer, slots] for layer, slots in enumerate(choice)) for choice in choices)
    assert sum(hits[layer, slots] for layer, slots in enumerate(found)) == best


@given(st.data())
def test_where_every_slot_brings_less_than_the_one_before_greedy_is_as_good(data):
    hits = data.draw(curves(convex=True))
    layers, experts = hits.shape[0], hits.shape[1] - 1
    total = data.draw(st.integers(layers, layers * experts))
    greedy = np.ones(layers, np.int64)
    for _ in range(total - layers):
        gain = [hits[at, n + 1] - hits[at, n] if n < experts else -1 for at, n in enumerate(greedy)]
        greedy[int(np.argmax(gain))] += 1
    found = shares("dp", total, known(hits))
    assert hits[np.arange(layers), list(found)].sum() == hits[np.arange(layers), greedy].sum()


@pytest.mark.parametrize("kind", SPLITS)
@given(data=st.data())
def test_shares_add_up_keep_their_limits_and_more_in_all_never_brings_less(kind, data):
    hits = data.draw(curves(convex=True))
    layers, experts = hits.shape[0], hits.shape[1] - 1
    top_k = data.draw(st.integers(1, experts))
    before = None  # comparable from where every layer has its top-k
    for total in range(layers, layers * experts + 3):
        found = shares(kind, total, known(hits, top_k))
        assert sum(found) == min(total, layers * experts)
        assert all(min(top_k, total // layers) <= slots <= experts for slots in found)
        if total < layers * top_k:
            continue
        if kind == "dp":
            saved = hits[np.arange(layers), list(found)].sum()
            assert before is None or saved >= before
            before = saved
        else:
            assert before is None or all(now >= then for now, then in zip(found, before, strict=True))
            before = found


def test_uniform_is_the_equal_split_with_the_remainder_first():
    assert shares("uniform", 8, known(np.zeros((3, 5), np.int64))) == (3, 3, 2)


def test_fewer_slots_than_layers_are_refused():
    with pytest.raises(ValueError, match="every layer needs one"):
        shares("dp", 1, known(np.zeros((2, 3), np.int64)))


@given(st.data())
def test_hits_by_capacity_are_those_of_a_replayed_lru(data):
    """For every capacity in which a needed set fits; one token per step here."""
    experts, layers, steps = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 25))
    top_k = data.draw(st.integers(1, 2))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    sets = [[rng.permutation(experts)[:top_k].tolist() for _ in range(layers)] for _ in range(steps)]
    trace = decode_trace(experts, sets)
    found = statistics(trace)
    assert found.needs.tolist() == [steps * top_k] * layers
    for slots in range(top_k, experts + 1):
        held = np.zeros(layers, np.int64)
        for moment in drive(Policy.load("lru").residency(trace, Slots((slots,) * layers)), trace):
            if moment.routed is not None:
                held[moment.layer] += np.count_nonzero(moment.routed.held)
        assert found.hits[:, slots].tolist() == held.tolist()


@given(traces())
def test_hits_grow_with_capacity_and_never_reach_the_first_uses(trace):
    found = statistics(trace)
    assert (np.diff(found.hits, axis=1) >= 0).all() and (found.hits[:, 0] == 0).all()
    firsts = [len(np.unique(layer[layer < trace.meta.model.experts])) for layer in trace.experts.swapaxes(0, 1)]
    assert (found.needs - found.hits[:, -1]).tolist() == firsts


def test_entropy_and_demand_by_hand():
    steps = [[[[0], [0]]], [[[1], [0]]], [[[2], [0]]], [[[3], [0]]]]  # layer 0 uses four experts alike, layer 1 one
    found = statistics(trace_of(spec(2, 4), [np.array(step) for step in steps]))
    assert found.effective.tolist() == [4.0, 1.0]
    assert found.distinct.tolist() == [4.0, 1.0]  # a window is 2 * 4 / 1 steps
    assert shares("entropy", 5, found) == (4, 1)
    assert shares("demand", 5, found) == (4, 1)
    assert shares("dp", 5, found) == (4, 1)


def small() -> Trace:
    return load_trace(BUNDLED_TRACE).of_requests(range(4))


def test_a_file_brings_back_the_statistics(tmp_path):
    trace = small()
    fitted = train(trace, trace)
    fitted.save(tmp_path / "budget")
    found, given_back = statistics(trace), load_statistics(str(tmp_path / "budget"), trace.meta.model)
    for name in ("hits", "needs", "effective", "distinct"):
        np.testing.assert_array_equal(getattr(found, name), getattr(given_back, name))
    assert found.top_k == given_back.top_k
    assert fitted.metrics["lru_hit@0.25 dp"] >= fitted.metrics["lru_hit@0.25 uniform"]  # in-sample it cannot lose


def test_another_geometry_and_another_kind_of_file_are_refused(tmp_path):
    other = decode_trace(4, [[[0], [1]]])
    train(other, other).save(tmp_path / "budget")
    with pytest.raises(InputError, match=r"fitted to 2 layers of 4 experts, top-1, and the model has 16 of 64, top-8"):
        load_statistics(str(tmp_path / "budget"), small().meta.model)
    Fitted("stride", {"x": np.zeros(1)}, {}, {}, (), 0.0).save(tmp_path / "stride")
    with pytest.raises(InputError, match="fitted for 'stride', not for 'layer-budget'"):
        load_statistics(str(tmp_path / "stride"), other.meta.model)


@pytest.mark.parametrize(
    "cache, words",
    [
        ({"split": "fair"}, "cache.split: 'fair' is not one of uniform, entropy, demand, dp"),
        ({"split": "dp", "scope": "global"}, "cache.split: dp shares slots among layers"),
        ({"fitted": "x"}, "cache.fitted: split: uniform reads no file"),
        ({"split": "dp", "fitted": 3}, "cache.fitted: expected str"),
    ],
)
def test_documents_that_make_no_sense_are_refused(cache, words):
    with pytest.raises(InputError) as caught:
        Policy.from_document({"cache": cache})
    assert words in str(caught.value)


def test_a_split_taken_from_the_replayed_trace_is_an_oracle_and_one_from_a_file_says_what_it_saw(tmp_path):
    trace = small()
    result = simulate(trace, "a100-80g", "lru-dp", 0.25, model=PRICED_AS).values
    assert result["policy"]["oracle"] and "future" in Policy.load("lru-dp").needs
    assert sum(result["slots"]["per_scope"]) == 16 * 16 and len(set(result["slots"]["per_scope"])) > 1
    train(trace.of_requests([0]), trace.of_requests([])).save(tmp_path / "budget")
    policy = Policy.load("lru-dp").with_fitted(str(tmp_path / "budget"))
    assert (policy.oracle, policy.in_sample(trace)) == (False, 0.25)
    assert policy.in_sample(trace.of_requests([1])) == 0
    alone = simulate(
        trace.of_requests([1]), "a100-80g", "lru-dp", 0.25, model=PRICED_AS,
        fitted=tmp_path / "budget",
    ).values  # fmt: skip
    assert not alone["policy"]["oracle"]
    with pytest.raises(InputError, match="has nothing that is trained"):
        Policy.load("lru").with_fitted("x")


def test_the_command_writes_the_file(tmp_path):
    trace = small()
    write_trace(tmp_path / "t.parquet", trace)
    out = tmp_path / "budget.safetensors"
    done = CliRunner().invoke(
        app, ["train", layer_budget.KIND, "--trace", str(tmp_path / "t.parquet"), "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert "lru_hit@0.25 dp" in done.output
    assert load_statistics(str(out), trace.meta.model).hits.shape == (16, 65)


def test_plain_python_reads_the_same_statistics(monkeypatch):
    if not hasattr(layer_budget._walk, "py_func"):
        pytest.skip("numba is not installed: there is only one of them")
    trace = decode_trace(5, [[[0, 1], [2, 3]], [[1, 4], [2, 0]], [[0, 1], [2, 3]]])
    found = statistics(trace)
    monkeypatch.setattr(layer_budget, "_walk", layer_budget._walk.py_func)
    np.testing.assert_array_equal(statistics(trace).hits, found.hits)
