"""The compiled engine against the events engine: every figure and every decision."""

from __future__ import annotations

import pytest
from cases import EVICTIONS, Case, cases, machines
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.sim.compiled import CompiledEngine, why_not
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.measurements import STEP_FIELDS
from test_engine_against_naive import setup_of

COMPILED = sorted(name for name, cls in EVICTIONS.items() if cls.touch_step is not None)


def assert_equal(case: Case, hardware, **others) -> None:
    expected = EventsEngine(setup_of(case, hardware, **others)).run()
    setup: Setup = setup_of(case, hardware, **others)
    assert (why := why_not(setup)) is None, why
    found = CompiledEngine(setup).run()
    for name in STEP_FIELDS:
        assert found.steps[name].tolist() == expected.steps[name].tolist(), name
    for name, values in expected.layers.items():
        assert found.layers[name].tolist() == values.tolist(), name
    for name in ("compute_busy_ps", "link_busy_ps", "ssd_reads", "decision_log_sha256"):
        assert getattr(found, name) == getattr(expected, name), name


@st.composite
def covered(draw, evict: str, **fixed) -> Case:
    """A case of the part that the engine covers."""
    prefetch = draw(st.sampled_from(("none", "oracle", "lookahead")))
    miss = draw(st.sampled_from(("wait", "wait", "cpu", "split")))
    case = draw(cases(evict=evict, prefetch=prefetch, miss=miss, arrivals=draw(st.booleans())))
    document = {**case.policy.document, "prefetch": {**case.policy.document["prefetch"], "in_flight": None}}
    return Case(case.trace, Policy.from_document(document), case.slots)


@pytest.mark.parametrize("evict", COMPILED)
@given(data=st.data())
@settings(max_examples=40, phases=[Phase.generate], deadline=None)
def test_all_figures_and_decisions_are_those_of_the_events_engine(evict, data):
    case, hardware = data.draw(covered(evict)), data.draw(machines())
    model = case.trace.meta.model
    in_ram = data.draw(st.sampled_from((None, None, 0, len(model.moe_layers) * model.experts // 2)))
    assert_equal(case, hardware, experts_in_ram=in_ram)
