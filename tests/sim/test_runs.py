"""Whole runs: what must hold for every trace, machine, policy and budget."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import EVICTIONS, KIND, RTX4090, Case, cases, decode_trace, documents, machines, traces
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.residency import DEMAND, PREFETCH, STREAM, Slots
from moeflow.sim.bounds import resident_steps
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.result import Result, make_result
from moeflow.sim.run import simulate
from moeflow.traces.trace import Request

ABOVE = 1 + 1e-12  # sums of picoseconds pass through floats on their way into a result


def setup_of(case, hardware, **others) -> Setup:
    miss = case.policy.document["miss"]
    return Setup(
        case.trace, case.trace.meta.model, hardware, case.residency(),
        waves=miss["waves"], chunks=miss["chunks"], **others,
    )  # fmt: skip


def run(setup: Setup) -> Result:
    engine = EventsEngine(setup)
    return make_result(setup, engine.steps, engine.cost, engine.run(), {"notes": []})


def phases(result: Result) -> list[dict]:
    """The figures of the decode and of the prefill steps, as far as there are any."""
    return [result.values, *([result["prefill"]] if result["prefill"] else [])]


@pytest.mark.parametrize("miss", ["wait", "cpu", "split", "near-memory"])
@given(data=st.data())
@settings(max_examples=100)
def test_no_run_beats_its_bounds(miss, data):
    case = data.draw(cases(miss=miss, arrivals=data.draw(st.booleans())))
    in_ram = data.draw(st.sampled_from((None, None, 1)))  # sometimes the SSD is in the way
    pinned = data.draw(st.sampled_from((None, None, 0, 1)))  # or pageable copies are
    hardware = data.draw(machines(near=miss == "near-memory" or None))
    result = run(setup_of(case, hardware, experts_in_ram=in_ram, experts_pinned=pinned))
    for figures in phases(result):
        bounds, mean = figures["bounds"], figures["tpot_s"]["mean"]
        assert bounds["resident"]["tpot_s"] <= mean * ABOVE
        assert bounds["clairvoyant"]["tpot_s"] <= mean * ABOVE
        assert bounds["resident"]["tpot_s"] <= bounds["clairvoyant"]["tpot_s"] * ABOVE
        assert bounds["clairvoyant"]["wait_s_per_token"] <= figures["wait_s_per_token"] * ABOVE
        if case.policy.document["prefetch"]["kind"] == "none":
            assert figures["hit"] <= bounds["clairvoyant"]["hit"] + 1e-12


@given(data=st.data())
@settings(max_examples=80)
def test_no_step_is_shorter_than_with_everything_resident(data):
    case, hardware = data.draw(cases()), data.draw(machines())
    engine = EventsEngine(setup_of(case, hardware))
    times = engine.run().steps
    resident = resident_steps(case.trace, case.trace.meta.model, engine.steps, engine.cost)
    assert (times["end_ps"] - times["start_ps"] >= resident).all()


def test_a_layer_that_no_token_needs_costs_the_resident_bound_no_expert_kernel():
    """Entries may be absent; the engine launches no experts then. A free host, so that nothing else hides it."""
    trace = decode_trace(2, [[[0], []]] * 2)
    free = dict.fromkeys(("issue_s", "launch_latency_s", "sync_s", "sample_s", "policy_s"), 0.0)
    link = replace(RTX4090.link, submit_s=0.0)
    case = Case(trace, Policy.from_document({}), Slots((2, 2)))
    result = run(setup_of(case, replace(RTX4090, host=replace(RTX4090.host, **free), link=link)))
    times = result.measurements.steps
    assert (times["end_ps"] - times["start_ps"])[1] >= result.resident_ps[1]


@given(data=st.data())
@settings(max_examples=60)
def test_figures_add_up(data):
    case = data.draw(cases(arrivals=data.draw(st.booleans())))
    result = run(setup_of(case, data.draw(machines())))
    for figures in phases(result):
        assert sum(figures["time_share"].values()) == pytest.approx(1, abs=1e-12)
        assert min(figures["time_share"].values()) >= -1e-12
        assert figures["bytes_per_token"]["wasted"] <= figures["bytes_per_token"]["prefetch"]
        assert figures["tpot_s"]["p50"] <= figures["tpot_s"]["p90"] <= figures["tpot_s"]["p99"]
    steps = result.measurements.steps
    assert (steps["hit"] + steps["late"] + steps["miss"] == steps["needed"]).all()
    if steps["needed"][result.steps.decode].any() and result["prefill"]:
        assert result["hit"] + result["late"] + result["miss"] == pytest.approx(1)
    for name in ("needed", "hit", "late", "miss"):
        assert result.measurements.layers[name].sum() == steps[name].sum()
    assert (steps["end_ps"][:-1] <= steps["start_ps"][1:]).all()
    assert (steps["wait_ps"] + steps["busy_ps"] <= steps["end_ps"] - steps["start_ps"]).all()
    assert result["compute_utilisation"] <= 1


@given(data=st.data())
@settings(max_examples=80)
def test_bytes_moved_are_those_that_the_decisions_imply(data):
    case = data.draw(cases())
    setup = setup_of(case, data.draw(machines()))
    result = run(setup)
    planned = setup.residency.decision_log()[:, KIND]
    chunks = {kind: int((planned == kind).sum()) * setup.chunks for kind in (DEMAND, STREAM, PREFETCH)}
    sent = {name: int(result.measurements.steps[name].sum()) for name in ("demand", "stream", "prefetch", "wasted")}
    assert sent["stream"] == chunks[STREAM]
    assert sent["demand"] >= chunks[DEMAND]  # late experts join demand
    assert sent["demand"] + sent["prefetch"] <= chunks[DEMAND] + chunks[PREFETCH]  # what is cancelled may never be sent
    if case.policy.document["prefetch"]["kind"] == "none":
        assert sent["demand"] == chunks[DEMAND]
        assert sent["prefetch"] == sent["wasted"] == 0
    size, rows = setup.model.bytes_per_expert / setup.chunks, result.steps.tokens
    for name, total in sent.items():
        per_phase = zip(phases(result), (result.steps.decode, ~result.steps.decode), strict=False)
        if result["prefill"]:
            moved = sum(figures["bytes_per_token"][name] * rows[counted].sum() for figures, counted in per_phase)
        else:
            moved = result["bytes_per_token"][name] * rows.sum()
        assert moved == pytest.approx(total * size)


@pytest.mark.parametrize("evict", EVICTIONS)
@given(data=st.data())
@settings(max_examples=12)
def test_a_policy_that_declares_itself_timing_free_decides_alike_on_any_machine(evict, data):
    case = data.draw(cases(evict))
    assume(case.policy.timing_free)
    digests = set()
    for hardware in (data.draw(machines()), data.draw(machines())):
        engine = EventsEngine(setup_of(case, hardware))
        digests.add(engine.run().decision_log_sha256)
    assert len(digests) == 1


@given(data=st.data())
@settings(max_examples=30)
def test_two_runs_give_the_same_bytes(data):
    trace, hardware = data.draw(traces()), data.draw(machines())
    document = data.draw(documents(trace))
    model = trace.meta.model
    scopes = len(model.moe_layers) if document["cache"]["scope"] == "layer" else 1
    budget = document["miss"]["scratch"] + data.draw(st.integers(scopes, len(model.moe_layers) * model.experts))
    first, second = (simulate(trace, hardware, document, budget).to_json() for _ in range(2))
    assert first == second
    assert json.loads(first)["slots"]["held"] == budget - document["miss"]["scratch"]


@given(data=st.data())
@settings(max_examples=20)
def test_keeping_a_timeline_changes_nothing_but_the_timeline(data):
    case, hardware = data.draw(cases()), data.draw(machines())
    without, kept = (EventsEngine(setup_of(case, hardware, timeline_steps=n)).run() for n in (0, 3))
    for name in without.steps:
        np.testing.assert_array_equal(without.steps[name], kept.steps[name])
    assert kept.spans and not without.spans
    assert max(end for _, end, track, _ in kept.spans if track != "copy H2D") <= kept.steps["end_ps"][:3].max()
    for track in {span[2] for span in kept.spans}:
        spans = sorted(span[:2] for span in kept.spans if span[2] == track)
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), f"{track} overlaps itself"


def test_figures_of_a_run_without_decode_rows_are_those_of_prefill():
    trace = decode_trace(2, [[[0]], [[1]]])
    prompt = replace(trace, phase=np.zeros(2, np.int8))
    result = simulate(prompt, RTX4090, budget=0.5)
    assert result["prefill"] is None
    assert result["steps"] == 2
    assert result["ttft_s"]["p50"] == pytest.approx(result["duration_s"])
    decode = simulate(trace, RTX4090, budget=0.5)
    assert decode["ttft_s"] is None
    assert any("ttft_s is null" in note for note in decode["notes"])


def test_a_request_waits_for_its_arrival_and_its_first_token_counts_from_then():
    trace = decode_trace(2, [[[0]], [[1]]])
    meta = replace(trace.meta, requests=(Request(0, arrival_s=0.0), Request(1, arrival_s=5.0)))
    trace = replace(trace, meta=meta, request=np.array([0, 1], np.int32), phase=np.zeros(2, np.int8))
    result = simulate(trace, RTX4090, budget=0.5)
    starts, ends = (result.measurements.steps[name] for name in ("start_ps", "end_ps"))
    assert starts.tolist() == [0, 5 * 10**12]
    assert result["ttft_s"]["p99"] == pytest.approx(max(ends - starts) / 1e12)
    assert result["tpot_s"]["mean"] < 1, "waiting for an arrival is no token's time"


def test_a_policy_by_name_document_or_object_is_the_same_run():
    trace = decode_trace(4, [[[0, 1]], [[2, 3]], [[0, 1]]])
    by_name, by_document = (
        simulate(trace, RTX4090, "lfu", 0.5),
        simulate(trace, RTX4090, {"cache": {"evict": "lfu"}}, 0.5),
    )
    by_object = simulate(trace, RTX4090, Policy.load("lfu"), 0.5)
    assert by_name.to_json() == by_object.to_json()
    assert by_name["decision_log_sha256"] == by_document["decision_log_sha256"]
