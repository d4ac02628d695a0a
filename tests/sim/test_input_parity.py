"""Measured time enters decisions as logged input events and in no other way."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import RTX4090, Case, cases, machines, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.next_gate import NextGate
from moeflow.policies.policy import Policy, preset_names
from moeflow.policies.prefetch import BEFORE_FIRST_LAYER
from moeflow.policies.residency import COMPUTED, COPIED, STALLED, TOOK, Residency, Slots
from moeflow.sim.events import EventsEngine, Setup
from moeflow.traces.model_spec import Attention, ModelSpec
from moeflow.traces.trace import DECODE, PREFILL, Trace

TIMED = [name for name in preset_names() if not Policy.load(name).timing_free]
UNTIMED = [name for name in preset_names() if Policy.load(name).timing_free]


def simulated(case: Case, hardware=RTX4090) -> Residency:
    """The residency after a run of the events engine; predictions are the next gates'."""
    predictions = NextGate().predict(case.trace) if case.policy.predictor() is not None else None
    setup = Setup(case.trace, case.trace.meta.model, hardware, case.residency(), predictions=predictions)
    EventsEngine(setup).run()
    return setup.residency


def replayed(case: Case, inputs: np.ndarray) -> Residency:
    """A fresh residency driven by the trace's routing and `inputs`, without a clock."""
    residency, trace, layers = case.residency(), case.trace, range(len(case.trace.meta.model.moe_layers))
    said = NextGate().predict(trace) if case.policy.predictor() is not None else None
    ahead, chances, embedding = trace.lookahead, trace.lookahead_weights, trace.embedding
    waiting = inputs.tolist()

    def feed(event: int) -> None:
        while waiting and waiting[0][0] == event:
            _, kind, layer, expert, size, ns = waiting.pop(0)
            if kind == TOOK:
                residency.layer_done(layer, ns)
            elif kind == STALLED:
                residency.stalled(layer, ns)
            else:
                {COPIED: residency.copied, COMPUTED: residency.computed}[kind](layer, expert, size, ns)

    seen: set[int] = set()
    for step, (first, last) in enumerate(pairwise(trace.step_starts)):
        rows, requests = slice(first, last), trace.request[first:last]
        for request in sorted(set(requests.tolist()) - seen):
            residency.request_begins(request)
            seen.add(request)
        phase = DECODE if (trace.phase[rows] == DECODE).all() else PREFILL
        at = lambda values, source, rows=rows: None if values is None else values[rows, source]  # noqa: E731
        residency.step_begins(
            step, trace.token[rows], requests, phase, at(ahead, 0), at(chances, 0),
            None if said is None else said.at(BEFORE_FIRST_LAYER, rows),
            {} if embedding is None else {"embedding": embedding[rows]},
        )  # fmt: skip
        residency.fetch_plan(BEFORE_FIRST_LAYER)
        if step == 0:
            feed(-1)
        for layer in layers:
            columns = {} if trace.probs is None else {"probs": trace.probs[rows, layer]}
            residency.routed(
                layer, trace.experts[rows, layer], at(trace.weights, layer), requests, at(ahead, layer + 1), columns,
                at(chances, layer + 1), None if said is None else said.at(layer, rows),
            )  # fmt: skip
            residency.fetch_plan(layer)
            if waiting:
                feed(step * len(layers) + layer)
        for request in sorted(set(requests.tolist()) - set(trace.request[last:].tolist())):
            residency.request_ends(request)
    assert not waiting
    return residency


def rich_trace() -> Trace:
    """40 tokens of 3 layers with every column that a policy reads, of experts that take a while to copy."""
    rng = np.random.default_rng(0)
    model = ModelSpec("test", 3, (0, 1, 2), 8, 2, 512, 512, Attention("gqa", 2, 1, 8), 100)
    ids = np.argsort(rng.gumbel(size=(40, 3, 8)) + np.linspace(0, 2, 8), axis=-1)[..., :2]
    trace = trace_of(model, list(ids[:, None]))
    ahead = np.full((40, 4, 2, 2), trace.absent, trace.experts.dtype)
    for source in range(4):
        for i, target in enumerate((source, source + 1)):
            if target < 3:
                ahead[:, source, i] = np.where(rng.random((40, 1)) < 0.7, ids[:, target], (ids[:, target] + 1) % 8)
    columns = {
        "weights": np.tile(np.array([0.6, 0.4], np.float16), (40, 3, 1)),
        "probs": rng.random((40, 3, 8)).astype(np.float16),
        "candidates": np.argsort(rng.random((40, 3, 8)), axis=-1).astype(np.uint8),
        "candidate_logits": -np.sort(-rng.random((40, 3, 8)), axis=-1).astype(np.float16),
        "lookahead": ahead,
        "lookahead_weights": np.tile(np.array([0.6, 0.4], np.float16), (40, 4, 2, 1)),
    }
    return replace(trace, meta=replace(trace.meta, lookahead_distances=(1, 2)), **columns)


def machine(bandwidth: float):
    """A 4090 behind a link of so many bytes per second."""
    h2d = replace(RTX4090.link.h2d, bandwidth=bandwidth)
    return replace(RTX4090, link=replace(RTX4090.link, h2d=h2d))


@given(data=st.data())
@settings(max_examples=30)
def test_the_logged_inputs_reproduce_the_decisions_of_a_policy_that_reads_time(data):
    case = data.draw(cases(prefetch="adaptive"))
    first = simulated(case, data.draw(machines()))
    second = replayed(case, first.input_log())
    assert second.decision_log_sha256 == first.decision_log_sha256
    np.testing.assert_array_equal(second.decision_log(), first.decision_log())
    assert second.prefetch.step_sizes == first.prefetch.step_sizes


@pytest.mark.parametrize("preset", TIMED)
@pytest.mark.parametrize("bandwidth", [1e9, 1e11])
def test_so_they_do_for_every_preset_that_reads_time(preset, bandwidth):
    case = Case(rich_trace(), Policy.load(preset), Slots((4, 4, 4), 2))
    first = simulated(case, machine(bandwidth))
    inputs = first.input_log()
    assert {COPIED, STALLED, TOOK} <= set(inputs[:, 1].tolist())
    assert replayed(case, inputs).decision_log_sha256 == first.decision_log_sha256


def test_other_inputs_may_lead_to_other_decisions():
    """Otherwise the tests above would say nothing."""
    case = Case(rich_trace(), Policy.load("adaptive"), Slots((5, 5, 5), 2))
    fast = simulated(case, machine(1e12))
    slow = simulated(case, machine(1e8))
    assert fast.prefetch.step_sizes != slow.prefetch.step_sizes
    assert fast.decision_log_sha256 != slow.decision_log_sha256


@pytest.mark.parametrize("preset", UNTIMED)
def test_a_policy_that_is_timing_free_decides_the_same_on_every_machine(preset):
    case = Case(rich_trace(), Policy.load(preset), Slots((4, 4, 4), 2))
    fast, slow = simulated(case, machine(1e12)), simulated(case, machine(1e7))
    assert fast.decision_log_sha256 == slow.decision_log_sha256
    assert len(fast.decision_log())
    assert not len(fast.input_log())
