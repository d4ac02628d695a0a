"""Experts that are computed where they lie: the choice by hand, and what must hold for any run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import RTX4090, Case, cases, decode_trace, drive, machines, spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moeflow.hwprofiles.profile import load_hardware
from moeflow.policies.near_memory import NearMemory
from moeflow.policies.policy import Policy
from moeflow.policies.prices import Prices
from moeflow.policies.residency import DEMAND, KIND, NEAR, PREFETCH, STREAM, Slots
from moeflow.policies.routed import Routed
from moeflow.sim.cost import CostModel
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.measurements import STEP_FIELDS
from moeflow.sim.run import simulate
from moeflow.sim.tiers import near_experts, tiers_of
from moeflow.traces.models import load_model_spec
from moeflow.traces.trace import TraceMeta

NO_SCORE = np.zeros(8)
NEAR_CASES = {"kind": "near-memory", "promote": 0}


def prices(copy: int = 100, expert: int = 30, token: int = 1, exchange: int = 20, near: int = 8) -> Prices:
    """One layer of eight experts, the first `near` in near memory; the first copy takes 10 more."""
    return Prices(np.full((1, 8), copy), 10, np.arange(8)[None] < near, exchange, 0, expert, token)


def served(told: Prices, tokens: list[int]) -> str:
    """How experts 0, 1, ... are served, each needed by that many tokens: n near, f fetched; in demand order."""
    service = NearMemory()
    service.start(TraceMeta(spec(1, 8)))
    service.priced(told)
    needed = np.arange(len(tokens), dtype=np.int32)
    counts = np.array(tokens, np.int32)
    ids = np.repeat(needed, counts)[:, None]
    routed = Routed(0, 0, 0, ids, None, None, None, needed, counts, np.zeros(len(tokens), bool), {})
    services = service.serve(routed, needed, NO_SCORE)
    return "".join("n" if kind else "f" for kind in services)


def test_one_expert_runs_near_when_that_ends_before_its_copy():
    assert served(prices(), [1]) == "n"  # 20 + 30 against 110
    assert served(prices(expert=89), [1]) == "n"
    assert served(prices(expert=90), [1]) == "f"  # as soon: the copy also fills a slot


def test_many_tokens_go_to_the_device():
    assert served(prices(token=3), [29]) == "n"
    assert served(prices(token=3), [30]) == "f"


def test_each_goes_to_the_side_that_would_finish_it_first():
    # the unit would end at 50, 80, 110 against the first copy's 110; then at 110 to 200 against the second's 210
    assert served(prices(), [1] * 8) == "nnfnnnnf"


def test_what_the_unit_does_not_hold_is_fetched_and_makes_the_link_s_queue_longer():
    assert served(prices(near=1), [1, 1, 1]) == "nff"
    assert served(prices(exchange=85, near=8), [1]) == "f"
    told = prices(exchange=85)
    told = replace(told, near=np.arange(8)[None] > 0)
    assert served(told, [1, 1]) == "fn"


def test_without_a_unit_or_without_prices_all_are_fetched():
    service = NearMemory()
    service.start(TraceMeta(spec(1, 8)))
    routed = Routed(0, 0, 0, np.array([[1]]), None, None, None, np.array([1]), np.array([1]), np.array([False]), {})
    assert service.serve(routed, np.array([1]), NO_SCORE) is None
    service.priced(prices(near=0))
    assert service.serve(routed, np.array([1]), NO_SCORE) is None


@pytest.mark.parametrize("model, tokens", [("mixtral-8x7b", 321), ("qwen3-30b-a3b", 254)])
def test_where_fetching_begins_to_win_is_where_the_closed_form_says(model, tokens):
    """T_near = T_move for an unqueued expert, latencies left out: 8 TFLOP/s and 512 GB/s near, a link of 25 GB/s."""
    machine = load_hardware("rtx4090", near_memory="cxl-ndp")
    direction = replace(machine.link.h2d, alpha_s=0.0, bandwidth=25e9)
    machine = replace(
        machine,
        device=replace(machine.device, op_latency_s=0.0, memory_bandwidth=1e18),
        link=replace(machine.link, h2d=direction, d2h=direction),
        near_memory=replace(machine.near_memory, internal_bandwidth=512e9, alpha_s=0.0),
    )
    priced = load_model_spec(model)
    layers, experts = len(priced.moe_layers), priced.experts
    told = CostModel(machine, priced).prices(tiers_of(layers, experts, near=near_experts(priced, machine)))
    one = replace(told, copy=told.copy[:1, :1], near=told.near[:1, :1])
    chosen = [served(one, [n]) for n in range(1, 2 * tokens)]
    assert chosen == sorted(chosen, reverse=True), "near up to some number of tokens, fetched from there on"
    assert chosen.count("n") == pytest.approx(tokens, abs=16)


# --- whole runs


def setup_of(case: Case, hardware, miss: dict | None = None) -> Setup:
    policy = case.policy
    if miss is not None:
        policy = Policy.from_document({**policy.document, "miss": {**waves_of(policy), **miss}})
    return Setup(
        case.trace, case.trace.meta.model, hardware, replace(case, policy=policy).residency(),
        waves=case.policy.document["miss"]["waves"], chunks=case.policy.document["miss"]["chunks"],
    )  # fmt: skip


def waves_of(policy: Policy) -> dict:
    return {key: policy.document["miss"][key] for key in ("waves", "scratch", "chunks")}


@given(data=st.data())
@settings(max_examples=40)
def test_every_missing_expert_is_computed_once_wherever_that_is(data):
    case = data.draw(cases(miss="near-memory"))
    hardware = data.draw(machines(near=True))
    model = case.trace.meta.model
    layers, residency = len(model.moe_layers), case.residency()
    tiers = tiers_of(layers, model.experts, near=near_experts(model, hardware))
    residency.miss_service.priced(CostModel(hardware, model).prices(tiers))
    for moment in drive(residency, case.trace):
        if moment.routed is None:
            continue
        own = moment.plan[moment.plan[:, KIND] != PREFETCH]
        assert set(own[:, KIND].tolist()) <= {DEMAND, STREAM, NEAR}
        assert sorted(own[:, 2].tolist()) == moment.routed.needed[~moment.routed.held].tolist()


@given(data=st.data())
@settings(max_examples=40)
def test_an_infinitely_slow_unit_is_never_used(data):
    case, hardware = data.draw(cases(prefetch="none")), data.draw(machines(near=True))
    slow = replace(hardware, near_memory=replace(hardware.near_memory, internal_bandwidth=1e-3))
    waiting, near = (EventsEngine(setup_of(case, slow, miss)).run() for miss in (None, {"kind": "near-memory"}))
    assert near.decision_log_sha256 == waiting.decision_log_sha256
    for name in STEP_FIELDS:
        np.testing.assert_array_equal(near.steps[name], waiting.steps[name], name)
    assert near.link_busy_ps == waiting.link_busy_ps


@given(data=st.data())
@settings(max_examples=40)
def test_with_an_infinitely_fast_unit_nothing_moves(data):
    case, hardware = data.draw(cases(prefetch="none")), data.draw(machines(near=True))
    model, tokens = case.trace.meta.model, int(np.diff(case.trace.step_starts).max())
    assume(1.01 * tokens * model.hidden * 2 < model.bytes_per_expert)  # else activations are more bytes than an expert
    unit = replace(
        hardware.near_memory, internal_bandwidth=1e18, flops=1e21, capacity_bytes=10**12, alpha_s=0.0,
        write_bandwidth=1e18, read_bandwidth=1e6,
    )  # fmt: skip
    device = replace(hardware.device, op_latency_s=0.0, memory_bandwidth=1e15, unified_memory=True)
    fast = replace(hardware, device=device, near_memory=unit)
    measured = EventsEngine(setup_of(case, fast, NEAR_CASES)).run()
    moved = {name: int(measured.steps[name].sum()) for name in ("demand", "stream", "prefetch")}
    assert moved == {"demand": 0, "stream": 0, "prefetch": 0}
    assert measured.steps["near"].sum() == measured.steps["needed"].sum() == measured.steps["miss"].sum()
    assert measured.link_busy_ps == 0


def test_a_run_with_a_unit_reports_it():
    trace = decode_trace(8, [[[0, 1, 7]], [[2, 3, 6]], [[0, 4, 5]]])
    size = trace.meta.model.bytes_per_expert
    unit = load_hardware("rtx4090", near_memory="gddr6-aim").near_memory
    link = replace(RTX4090.link, h2d=replace(RTX4090.link.h2d, bandwidth=1e6))
    machine = replace(RTX4090, link=link, near_memory=replace(unit, capacity_bytes=6 * size))
    result = simulate(trace, machine, {"miss": {**NEAR_CASES}}, 0.5, timeline_steps=3)
    steps = result.measurements.steps
    assert steps["near"].tolist() == [2, 2, 3]  # 6 and 7 do not fit the unit
    assert steps["miss"].tolist() == [3, 3, 3]
    assert result["near"] == pytest.approx(7 / 9)
    assert result["tiers"] == {"pinned": {"experts": 2, "wanted": 2}, "near": {"experts": 6, "wanted": 7}}
    assert result["exactness"] == "numeric" and result["hardware"]["near_memory"] == "gddr6-aim"
    assert {span[2] for span in result.measurements.spans} >= {"near memory", "copy H2D"}
    cpu = simulate(trace, machine, {"miss": {"kind": "cpu", "promote": 0}}, 0.5)
    assert (cpu["on_host"], cpu["near"]) == (1.0, 0.0)


def test_a_service_that_sends_an_expert_where_it_does_not_lie_is_told():
    trace = decode_trace(4, [[[3]]])
    residency = Policy.from_document({"miss": {**NEAR_CASES}}).residency(trace, Slots((2,)))
    unit = load_hardware("rtx4090", near_memory="cxl-ndp").near_memory
    machine = replace(RTX4090, near_memory=replace(unit, capacity_bytes=trace.meta.model.bytes_per_expert))
    engine = EventsEngine(Setup(trace, trace.meta.model, machine, residency))
    residency.miss_service.priced(Prices(np.full((1, 4), 100), 0, np.ones((1, 4), bool), 0, 0, 1, 1))
    with pytest.raises(ValueError, match="expert 3 is not in near memory"):
        engine.run()
