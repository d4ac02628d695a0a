"""Several devices: the events engine against the naive one, moments by hand, and what sharing can and cannot do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import MISS_SERVICES, RTX4090, Case, cases, decode_trace, machines, spec
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from moeflow.errors import InputError
from moeflow.hwprofiles.profile import CopyDirection
from moeflow.policies.miss_service import MissService
from moeflow.policies.policy import Policy
from moeflow.policies.residency import PREFETCH, Slots
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.placement import on_device, part, place
from moeflow.sim.result import make_result
from moeflow.sim.run import simulate
from test_engine_against_naive import assert_equal_to_naive

SERVICES = [name for name, cls in MISS_SERVICES.items() if cls.reroute is MissService.reroute]
FREE_HOST = dict.fromkeys(("issue_s", "launch_latency_s", "sync_s", "sample_s", "policy_s"), 0.0)
FREE_PEER = CopyDirection(0.0, 1e30)


@st.composite
def linked(draw):
    """Machines whose devices reach each other directly or through the host, whose memory may be the wall."""
    machine = draw(machines())
    peer = draw(st.sampled_from((None, FREE_PEER, CopyDirection(1e-5, 1e6))))
    memory = draw(st.sampled_from((1e8, 62e9)))
    return replace(
        machine, link=replace(machine.link, peer=peer), host=replace(machine.host, memory_bandwidth=memory)
    )  # fmt: skip


@st.composite
def placements(draw, model, least=1):
    parallel = draw(st.sampled_from(("layer", "expert")))
    most = min(3, len(model.moe_layers) if parallel == "layer" else model.experts)
    assume(most >= least)
    devices = draw(st.integers(least, most))
    return place(model, devices, parallel if devices > 1 else None)


@st.composite
def slots_on(draw, placement, policy):
    """One `Slots` per device: unequal shares of what each has."""
    found = []
    for device in range(placement.devices):
        mine = (placement.owner == device).sum(axis=1)
        if policy.scope == "global":
            per_scope = (draw(st.integers(1, int(mine.sum()))),)
        else:
            per_scope = tuple(draw(st.integers(1, int(most))) if most else 0 for most in mine)
        found.append(Slots(per_scope, policy.scratch))
    return found


def setup_on(case, hardware, placement, slots, **others) -> Setup:
    miss, predictor = case.policy.document["miss"], case.policy.predictor()
    if predictor is not None:
        others |= {"predictions": predictor.predict(case.trace), "predictor_gates": predictor.gates}
        others["predictor_s"] = 7e-6
    residencies = [
        case.policy.residency(case.trace, each, keep_log=True, here=placement.here(device))
        for device, each in enumerate(slots)
    ]
    return Setup(
        case.trace, case.trace.meta.model, hardware, residencies[0], waves=miss["waves"], chunks=miss["chunks"],
        placement=placement, others=tuple(residencies[1:]), **others,
    )  # fmt: skip


def run(setup: Setup):
    engine = EventsEngine(setup)
    return make_result(setup, engine.steps, engine.cost, engine.run(), {"notes": []})


@given(data=st.data())
@settings(max_examples=150, phases=[Phase.generate])
def test_times_labels_and_traffic_are_those_of_the_naive_engine(data):
    case = data.draw(cases(miss=data.draw(st.sampled_from(("wait", *SERVICES))), arrivals=data.draw(st.booleans())))
    model, hardware = case.trace.meta.model, data.draw(linked())
    placement = data.draw(placements(model))
    slots = data.draw(slots_on(placement, case.policy))
    in_ram = data.draw(st.sampled_from((None, None, 1, len(model.moe_layers) * model.experts // 2)))
    measured = assert_equal_to_naive(lambda: setup_on(case, hardware, placement, slots, experts_in_ram=in_ram))
    for name, values in measured.steps.items():
        assert (values >= 0).all(), name
    times = measured.steps
    accounted = times["wait_ps"] + times["busy_ps"] + times["peer_ps"]
    assert (accounted <= times["end_ps"] - times["start_ps"]).all()
