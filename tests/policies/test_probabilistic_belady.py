"""Probabilistic Belady against its formula, and with perfect forecasts against Belady."""

from __future__ import annotations

import numpy as np
from cases import decode_trace
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.predictor import Predictions
from moeflow.policies.probabilistic_belady import ProbabilisticBelady
from moeflow.policies.residency import Residency, Slots
from moeflow.policies.routed import Routed
from moeflow.traces.trace import Trace

DOCUMENT = {"cache": {"evict": "probabilistic-belady"}, "predict": {"kind": "next-gate"}}


def random_trace(seed: int, experts: int, layers: int, steps: int, top_k: int, skew: float = 1.0) -> Trace:
    rng = np.random.default_rng(seed)
    taste = skew * rng.gumbel(size=(layers, experts))
    scores = taste + rng.gumbel(size=(steps, layers, experts))
    return decode_trace(experts, np.argsort(-scores, axis=2)[:, :, :top_k].tolist())


def perfect(trace: Trace, horizon: int) -> Predictions:
    """After every layer the exact needs of that layer in the next `horizon` steps."""
    rows, layers, k = trace.experts.shape
    said = np.full((rows, layers, horizon, k), trace.absent, trace.experts.dtype)
    for ahead in range(1, horizon + 1):
        said[: rows - ahead, :, ahead - 1] = trace.experts[ahead:]
    present = (said != trace.absent).astype(np.float16)
    return Predictions(tuple(range(layers)), tuple(layers * ahead for ahead in range(1, horizon + 1)), said, present)


def hits(residency: Residency, trace: Trace, said: Predictions | None = None) -> int:
    held = 0
    for step in range(trace.rows):
        row = slice(step, step + 1)
        residency.step_begins(step, predicted=None if said is None else said.at(-1, row))
        for layer in range(residency.layers):
            at_layer = None if said is None else said.at(layer, row)
            routed = residency.routed(layer, trace.experts[row, layer], predicted=at_layer)
            held += np.count_nonzero(routed.held)
            residency.fetch_plan(layer)
            residency.layer_done(layer)
    return held


def replay(trace: Trace, slots: Slots, said: Predictions) -> int:
    model = trace.meta.model
    eviction = ProbabilisticBelady()
    eviction.start(trace.meta, slots, None)
    return hits(Residency(len(model.moe_layers), model.experts, model.top_k, slots, eviction), trace, said)


@settings(max_examples=40)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 2))
def test_with_the_whole_future_forecast_it_is_belady(seed, layers, top_k):
    """Forced admission, in slots that hold two needed sets; forecasts name what is needed and nothing else."""
    trace = random_trace(seed, 8, layers, 30, top_k)
    for each in (2 * top_k, 2 * top_k + 1):
        slots = Slots((each,) * layers)
        belady = hits(Policy.load("belady-forced").residency(trace, slots), trace)
        assert replay(trace, slots, perfect(trace, 30)) == belady


def test_the_further_it_sees_the_nearer_it_comes_to_belady():
    trace, slots = random_trace(1, 16, 2, 200, 2), Slots((5, 5))
    found = [replay(trace, slots, perfect(trace, horizon)) for horizon in (1, 2, 4, 8, 32)]
    lru = hits(Policy.load("lru").residency(trace, slots), trace)
    belady = hits(Policy.load("belady-forced").residency(trace, slots), trace)
    assert lru < found[0] and found == sorted(found) and found[-1] <= belady
    assert belady - found[-1] <= 0.01 * belady


@settings(max_examples=60)
@given(data=st.data())
def test_the_score_is_the_expected_layer_step_of_the_next_use(data):
    """One token, forecasts for some of the next four steps, against the formula written out."""
    layers, experts = data.draw(st.integers(1, 3)), 5
    steps = sorted(data.draw(st.sets(st.integers(1, 4), min_size=1)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    named = np.array([rng.permutation(experts)[:3] for _ in steps])
    chance = rng.random(named.shape).astype(np.float16)
    trace = random_trace(0, experts, layers, 6, 2)
    eviction = ProbabilisticBelady()
    eviction.start(trace.meta, Slots((2,) * layers), None)
    residency = Residency(layers, experts, 2, Slots((2,) * layers), eviction)
    distances = tuple(layers * ahead for ahead in steps)
    said = Predictions((0,), distances, named.astype(np.uint8)[None, None], chance[None, None])
    residency.step_begins(0)
    routed: Routed = residency.routed(0, trace.experts[:1, 0], predicted=said.at(0, slice(0, 1)))
    rate = np.full(experts, 2 / experts)
    seen = 0.5 ** (1 / 64) + 1
    rate *= 1 - 1 / seen
    rate[routed.needed] += 1 / seen
    for expert in range(experts):
        expected, unused = 0.0, 1.0
        for ahead in range(1, steps[-1] + 1):
            speaks = next(i for i, step in enumerate(steps) if step >= ahead)
            at = np.flatnonzero(named[speaks] == expert)
            left = max(0, 2 - chance[speaks].astype(float).sum()) / np.delete(rate, named[speaks]).sum()
            p = float(chance[speaks, at[0]]) if len(at) else min(float(chance[speaks].min()), rate[expert] * left)
            expected += unused * p * ahead * layers
            unused *= 1 - p
        expected += unused * (steps[-1] + 1 / rate[expert]) * layers
        np.testing.assert_allclose(eviction.score[0, expert], -expected, rtol=1e-5)


def test_several_tokens_need_an_expert_when_any_of_them_does():
    trace = random_trace(0, 4, 1, 2, 1)
    eviction = ProbabilisticBelady()
    eviction.start(trace.meta, Slots((2,)), None)
    residency = Residency(1, 4, 1, Slots((2,)), eviction)
    residency.step_begins(0)
    said = Predictions(
        (0,), (1,), np.array([[[[0]]], [[[1]]], [[[0]]]], np.uint8), np.array([[[[0.5]]]] * 3, np.float16)
    )
    residency.routed(0, np.array([[2], [2], [3]], np.uint8), predicted=said.at(0, slice(0, 3)))
    chance = eviction._forecast[0, 1 % eviction._steps]
    rate = eviction._rate[0]
    open_0 = 0.5 * rate[0] / (rate.sum() - rate[1])  # what the second forecast leaves to 0
    open_1 = 0.5 * rate[1] / (rate.sum() - rate[0])
    np.testing.assert_allclose(chance[0], 1 - 0.25 * (1 - open_0), rtol=1e-5)
    np.testing.assert_allclose(chance[1], 1 - 0.5 * (1 - open_1) ** 2, rtol=1e-5)


def test_what_is_said_before_the_first_layer_is_heard_and_outlives_the_layers_before_its_target():
    """At step start 3 is announced for layer 1 of this step and of the next."""
    trace = random_trace(0, 4, 2, 3, 1)
    eviction = ProbabilisticBelady()
    eviction.start(trace.meta, Slots((2, 2)), None)
    residency = Residency(2, 4, 1, Slots((2, 2)), eviction)
    said = Predictions((-1,), (2, 4), np.full((1, 1, 2, 1), 3, np.uint8), np.ones((1, 1, 2, 1), np.float16))
    residency.step_begins(0, predicted=said.at(-1, slice(0, 1)))
    assert eviction.score[1, 3] == -1
    residency.routed(0, np.array([[0]], np.uint8))
    assert eviction.score[1, 3] == -1
    residency.routed(1, np.array([[3]], np.uint8))
    assert eviction.score[1, 3] == -3


def test_without_any_forecast_it_goes_by_how_often_an_expert_was_used():
    eviction = ProbabilisticBelady()
    trace = decode_trace(4, [[[0]], [[0]], [[1]], [[2]]])
    eviction.start(trace.meta, Slots((2,)), None)
    hits(Residency(1, 4, 1, Slots((2,)), eviction), trace)
    assert np.argsort(-eviction.score[0]).tolist() == [0, 2, 1, 3]  # twice; later of two; never
