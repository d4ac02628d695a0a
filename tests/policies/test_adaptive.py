"""The adaptive step size, by hand: one token, experts of 1000 bytes, layers of 1000 ns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import PREFETCHES, decode_trace, drive
from hypothesis import given
from hypothesis import strategies as st
from moeflow.policies.adaptive import Adaptive, Average, spread
from moeflow.policies.policy import Policy
from moeflow.policies.predictor import Predicted
from moeflow.policies.residency import Slots
from moeflow.policies.routed import Routed, StepBegun

from moeflow.errors import InputError

LAYERS, EXPERTS = 8, 16
FAR = 4  # layers that the predictions reach


def said(demanded: int = 4, tokens: int = 1) -> Predicted:
    """At every distance the same `demanded` experts, equally likely."""
    ids = np.tile(np.arange(demanded, dtype=np.uint8), (tokens, FAR, 1))
    return Predicted(tuple(range(1, FAR + 1)), ids, np.full(ids.shape, 0.5, np.float16))


def begun(step: int, said: Predicted, embedding=None, phase: int = 1) -> StepBegun:
    columns = {} if embedding is None else {"embedding": np.array(embedding, np.float16)}
    return StepBegun(step * LAYERS - 1, step, phase, None, None, None, None, said, columns)


def routed(event: int, needed, said: Predicted | None = None) -> Routed:
    needed = np.array(needed, np.int32)
    ones, held = np.ones(len(needed), np.int32), np.zeros(len(needed), np.bool_)
    step, layer = divmod(event, LAYERS)
    return Routed(event, step, layer, needed[None], None, None, None, needed, ones, held, {}, None, said)


def measured(copy_ns: int, layer_ns: int = 1000, stall_ns: int = 0, **parameters) -> Adaptive:
    """A policy that has seen one copy and one layer, at the beginning of step 1."""
    policy = Adaptive(**{"tau": 1.0, **parameters})
    policy.start(decode_trace(EXPERTS, [[[0]] * LAYERS]).meta, None)
    policy.propose_first(begun(0, said()))
    policy.copied(0, 0, 1000, copy_ns)
    policy.stalled(1, stall_ns)
    policy.layer_took(1, layer_ns + stall_ns)
    return policy


def size(policy: Adaptive, prediction: Predicted | None = None, **others) -> int:
    policy.propose_first(begun(1, prediction or said(), **others))
    return policy.size


def test_before_anything_is_measured_it_looks_one_layer_ahead():
    policy = Adaptive()
    policy.start(decode_trace(EXPERTS, [[[0]] * LAYERS]).meta, None)
    assert [target for target, _ in policy.propose_first(begun(0, said()))] == [0]
    assert policy.step_sizes == [(-1, 1)]


@pytest.mark.parametrize("copy_ns, expected", [(1, 1), (250, 1), (251, 2), (500, 2), (501, 3), (1000, 4), (9000, 4)])
def test_the_step_size_is_the_time_of_a_layers_copies_over_its_compute(copy_ns, expected):
    """ceil(4 experts * copy_ns / 1000), never beyond what is predicted."""
    assert size(measured(copy_ns)) == expected


def test_more_demanded_experts_and_a_faster_layer_look_further():
    assert size(measured(250), said(8)) == 2
    assert size(measured(250, layer_ns=500)) == 2


def test_waiting_is_no_compute():
    assert size(measured(250, layer_ns=1000, stall_ns=5000)) == 1
    assert size(measured(500, layer_ns=1000, stall_ns=5000)) == 2


def test_tau_counts_the_experts_that_hold_that_share_of_the_mass():
    prediction = said(4)
    prediction.probability[0, :] = [0.5, 0.25, 0.125, 0.125]
    for tau, experts in ((0.5, 1), (0.6, 2), (0.75, 2), (0.8, 3), (1.0, 4)):
        policy = measured(250, tau=tau)
        proposals = policy.propose_first(begun(1, prediction))
        assert {len(wanted) for _, wanted in proposals} == {experts}


def test_prefill_and_decode_are_timed_apart():
    policy = measured(500)
    assert size(policy, phase=0) == 1  # nothing measured of prefill: S stays what it was
    policy.stalled(2, 0)
    policy.layer_took(2, 100)
    assert size(policy, phase=0) == FAR
    assert size(policy, phase=1) == 2


def test_stalls_raise_it_up_to_what_is_predicted():
    policy = measured(250, stall_threshold=2)
    sizes = []
    for event in range(LAYERS, LAYERS + 12):
        policy.stalled(event % LAYERS, 10)
        policy.propose(routed(event, [], said()))
        sizes.append(policy.size)
    assert sizes == [1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4, 4]
    assert [s for _, s in policy.step_sizes] == [1, 2, 3, 4]


def test_a_layer_that_did_not_wait_is_no_stall():
    policy = measured(250, stall_threshold=1)
    policy.stalled(1, 0)
    policy.propose(routed(LAYERS, [], said()))
    assert policy.size == 1


def test_overfetching_lowers_it_down_to_one_layer():
    policy = measured(1000, overfetch_threshold=3)
    assert size(policy) == 4
    sizes = []
    for event in range(LAYERS, 2 * LAYERS):
        policy.planned(event % LAYERS, np.array([1, 2, 3]))
        policy.propose(routed(event, [1], said()))  # 2 and 3 were not needed
        sizes.append(policy.size)
    assert sizes == [4, 3, 3, 2, 2, 1, 1, 1]


def test_what_was_needed_or_only_proposed_is_no_overfetch():
    policy = measured(1000, overfetch_threshold=1)
    policy.propose_first(begun(1, said()))
    policy.planned(0, np.array([1, 2]))
    policy.propose(routed(LAYERS, [1, 2], said()))
    assert policy.size == 4


def test_feedback_comes_back_at_once_however_long_it_pushed():
    policy = measured(250, stall_threshold=1, overfetch_threshold=1)
    for event in range(LAYERS, 2 * LAYERS):
        policy.stalled(event % LAYERS, 10)
        policy.propose(routed(event, [], said()))
    policy.planned(0, np.array([5]))
    policy.propose(routed(2 * LAYERS, [], said()))
    assert policy.size == FAR - 1


def test_a_batch_more_diverse_than_usual_looks_further():
    usual, diverse = [[0.0], [1.0]], [[0.0], [3.0]]
    policy = measured(125, average=0.5)
    assert size(policy, said(tokens=2), embedding=usual) == 1
    assert size(policy, said(tokens=2), embedding=diverse) == 1  # 4 * 9 / 5 = 7.2 experts, 900 ns
    assert size(measured(250), said(tokens=2), embedding=usual) == 1
    policy = measured(250, average=0.5)
    size(policy, said(tokens=2), embedding=usual)
    assert size(policy, said(tokens=2), embedding=diverse) == 2
    assert size(policy, said(tokens=2)) == 1  # without the column


def test_nearest_layers_are_proposed_first():
    policy = measured(1000)
    policy.propose_first(begun(1, said()))
    backwards = Predicted((4, 3, 2, 1), said().experts, said().probability)
    assert [target for target, _ in policy.propose(routed(LAYERS + 2, [], backwards))] == [3, 4, 5, 6]


@given(st.lists(st.lists(st.floats(-4, 4), min_size=2, max_size=2), min_size=1, max_size=6))
def test_spread_is_the_sum_over_pairs_of_squared_distances(vectors):
    vectors = np.array(vectors, np.float16)
    values = vectors.astype(float)
    pairs = sum(((a - b) ** 2).sum() for i, a in enumerate(values) for b in values[:i])
    assert spread(vectors) == pytest.approx(pairs, abs=1e-6)


def test_an_average_starts_at_its_first_value():
    average = Average(0.25)
    for value, expected in ((8, 8), (4, 7), (7, 7)):
        average.add(value)
        assert average.value == expected


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"tau": 1.5}, {"average": 0.0}, {"stall_threshold": 0}])
def test_impossible_parameters_are_refused(wrong):
    document = {"prefetch": {"kind": "adaptive", **wrong}, "predict": {"kind": "next-gate"}}
    with pytest.raises(InputError, match="prefetch: adaptive"):
        Policy.from_document(document)


def test_it_needs_a_predictor():
    assert PREFETCHES["adaptive"] is Adaptive
    with pytest.raises(InputError, match=r"predict\.kind"):
        Policy.from_document({"prefetch": {"kind": "adaptive"}})


def test_only_what_is_copied_counts_as_planned():
    """Layer 0 wants 0 and 1 of layer 1; 0 is held by then, so that only 1 is copied."""
    trace = decode_trace(4, [[[2], [0]], [[3], [2]]], top_k=2)
    ahead = np.full((2, 3, 1, 2), 255, np.uint8)
    ahead[1, 1, 0] = [0, 1]
    meta = replace(trace.meta, lookahead_distances=(1,))
    trace = replace(trace, meta=meta, lookahead=ahead)
    policy = Policy.from_document({"prefetch": {"kind": "adaptive", "tau": 1.0}, "predict": {"kind": "next-gate"}})
    residency = policy.residency(trace, Slots((4, 4)))
    noted = []
    residency.prefetch.planned = lambda layer, experts: noted.append((layer, experts.tolist()))
    for _ in drive(residency, trace):
        pass
    assert noted == [(1, [1])]
