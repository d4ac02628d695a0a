"""The compiled engine against the events engine: every figure and every decision."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cases import EVICTIONS, RTX4090, Case, cases, decode_trace, machines
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moeflow.hwprofiles.profile import load_hardware
from moeflow.policies.lru import LRU
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots
from moeflow.sim import compiled
from moeflow.sim.compiled import CompiledEngine, why_not
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.measurements import STEP_FIELDS
from moeflow.sim.run import simulate
from test_continuous import drawn_passes, tight
from test_engine_against_naive import setup_of

from moeflow.errors import InputError

COMPILED = sorted(name for name, cls in EVICTIONS.items() if cls.touch_step is not None)

CAUSAL = [name for name in COMPILED if "future" not in EVICTIONS[name].needs]
AHEAD = ("none", "lookahead")
NEAR = load_hardware("rtx4090", near_memory="cxl-ndp")


def assert_equal(make_setup: Callable[[], Setup]) -> None:
    events = EventsEngine(make_setup())
    expected, setup = events.run(), make_setup()
    assert (why := why_not(setup)) is None, why
    engine = CompiledEngine(setup)
    found = engine.run()
    assert engine.setup.trace.position.tolist() == events.setup.trace.position.tolist()
    assert engine.steps.batches == events.steps.batches
    for name in STEP_FIELDS:
        assert found.steps[name].tolist() == expected.steps[name].tolist(), name
    for name, values in expected.layers.items():
        assert found.layers[name].tolist() == values.tolist(), name
    for name in ("compute_busy_ps", "link_busy_ps", "ssd_reads", "most_keys", "tiers", "decision_log_sha256"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.devices == expected.devices


@st.composite
def covered(draw, evict: str, prefetches: tuple[str, ...] = ("none", "oracle", "lookahead")) -> Case:
    """A case of the part that the engine covers."""
    prefetch = draw(st.sampled_from(prefetches))
    miss = draw(st.sampled_from(("wait", "wait", "cpu", "split")))
    case = draw(cases(evict=evict, prefetch=prefetch, miss=miss, arrivals=draw(st.booleans())))
    document = {**case.policy.document, "prefetch": {**case.policy.document["prefetch"], "in_flight": None}}
    return Case(case.trace, Policy.from_document(document), case.slots)


@pytest.mark.parametrize("evict", COMPILED)
@given(data=st.data())
@settings(max_examples=40, phases=[Phase.generate], deadline=None)
def test_all_figures_and_decisions_are_those_of_the_events_engine(evict, data):
    case, hardware = data.draw(covered(evict)), data.draw(machines(near=False))
    half = len(case.trace.meta.model.moe_layers) * case.trace.meta.model.experts // 2
    rest = [{}, {}, {"experts_pinned": 0}, {"experts_in_ram": 0}]
    if case.policy.document["miss"]["kind"] == "wait":
        rest += [{"experts_in_ram": half}, {"experts_pinned": half // 2, "experts_in_ram": half}]
    resting = data.draw(st.sampled_from(rest))
    assert_equal(lambda: setup_of(case, hardware, **resting))


@given(data=st.data())
@settings(max_examples=60, phases=[Phase.generate], deadline=None)
def test_so_they_are_when_requests_are_batched_as_they_arrive(data):
    case, hardware = data.draw(covered(data.draw(st.sampled_from(CAUSAL)), AHEAD)), data.draw(machines(near=False))
    case = replace(case, trace=drawn_passes(case.trace, np.random.default_rng(data.draw(st.integers(0, 99)))))
    budget, slack = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 12))
    assert_equal(lambda: tight(setup_of(case, hardware, token_budget=budget), slack))


def test_who_waits_for_machine_code_is_told_why(monkeypatch):
    told, sentences = threading.Event(), []
    monkeypatch.setattr(compiled, "SLOW_START_S", 0.0)
    make = compiled._run_steps
    monkeypatch.setattr(compiled, "_run_steps", lambda rest: make(rest) if told.wait(30) else pytest.fail("silent"))
    trace = decode_trace(4, [[[0, 1]], [[2]]])
    simulate(
        trace, RTX4090, "lru", 4, engine="compiled", notice=lambda sentence: (sentences.append(sentence), told.set())
    )
    assert sentences == ["compiling the engine: half a minute or so, once; kept for later runs"]


def test_a_policy_that_overrides_what_a_step_says_is_not_compiled():
    class Reversed(LRU):
        def touch(self, routed):
            self.score[routed.layer, routed.needed] = -routed.event

    case = Case(decode_trace(4, [[[0]], [[1]]]), Policy.from_document({}), Slots((2,)))
    setup = setup_of(case, RTX4090)
    assert why_not(setup) is None
    setup.residency.eviction = Reversed()
    assert why_not(setup) == "eviction test-compiled-engine has no compiled step"


@pytest.mark.parametrize(
    ("policy", "machine", "resting", "why"),
    [
        ({"cache": {"stale": 1}}, RTX4090, {}, "stale scores are not compiled"),
        ({}, NEAR, {}, "near memory is not compiled"),
        ({}, RTX4090, {"experts_pinned": 1}, None),
        ({}, RTX4090, {"experts_pinned": 0, "experts_in_ram": 1}, None),
        ({"miss": {"kind": "cpu"}}, RTX4090, {"experts_in_ram": 1}, "beside copies from several tiers are not"),
        ({}, RTX4090, {"experts_in_ram": 1}, None),
        ({"miss": {"kind": "cpu"}}, RTX4090, {"experts_pinned": 0}, None),
    ],
)
def test_where_experts_rest_may_be_more_than_is_compiled(policy, machine, resting, why):
    case = Case(decode_trace(4, [[[0]], [[1]]]), Policy.from_document(policy), Slots((2,)))
    found = why_not(setup_of(case, machine, **resting))
    assert found is None if why is None else why in found


@pytest.mark.parametrize("engine", ["events", "compiled"])
def test_a_named_engine_says_so_in_its_result(engine):
    result = simulate(hw="rtx4090", policy="lru", engine=engine)
    assert result["engine"] == engine
    assert {**result.values, "engine": ""} == {**simulate(hw="rtx4090", policy="lru").values, "engine": ""}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"engine": "fast"}, "--engine 'fast': expected one of auto, events, compiled"),
        ({"engine": "compiled", "policy": "arc"}, "eviction arc has no compiled step; use --engine auto or events"),
        ({"engine": "compiled", "policy": "transition"}, "prefetch transition has no compiled step"),
        ({"engine": "compiled", "policy": "low-bit"}, "miss service low-bit is not compiled"),
    ],
)
def test_what_cannot_be_is_said(given, why):
    with pytest.raises(InputError, match=why):
        simulate(**{"hw": "rtx4090", **given})


def test_auto_says_why_it_takes_the_events_engine():
    result = simulate(hw="rtx4090", policy="arc")
    assert result["engine"] == "events"
    assert "events engine: eviction arc has no compiled step" in result["notes"]


def test_a_timeline_is_that_of_the_events_engine():
    auto, events = (simulate(hw="rtx4090", engine=engine, timeline_steps=3) for engine in ("auto", "events"))
    assert auto["engine"] == "compiled"
    assert auto.measurements.spans == events.measurements.spans
