"""Whole layers ahead of their routers: against the naive engine, by hand, and when `auto` takes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import EVICTIONS, PREFETCHES, RTX4090, Case, cases, drive, machines, spec, trace_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.prefill import Prefill
from moeflow.policies.prices import LayerPrices, Prices
from moeflow.policies.residency import DEMAND, KIND, LAYER, LENT, SLOT, STREAM, VICTIM, WHOLE, Slots
from moeflow.sim.compiled import why_not
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.replay import replay
from moeflow.sim.run import simulate
from moeflow.traces.trace import PREFILL, Trace
from test_continuous import assert_equal, drawn_passes, tight
from test_engine_against_naive import assert_equal_to_naive, setup_of

from moeflow.errors import InputError

LOSSLESS = ("wait", "cpu", "split", "near-memory")
CAUSAL = [name for name, cls in EVICTIONS.items() if "future" not in cls.needs]
AHEAD = [name for name, cls in PREFETCHES.items() if "future" not in cls.needs]
NS, US = 1000, 1_000_000


@st.composite
def streamed(draw, kinds: tuple[str, ...] = ("stream", "stream", "auto"), **given_of_case) -> Case:
    """A case whose policy streams and whose slots hold two layers."""
    case = draw(cases(**given_of_case))
    miss = case.policy.document["miss"]
    kind = draw(st.sampled_from(kinds if miss["kind"] == "wait" else ("stream",)))
    policy = Policy.from_document({**case.policy.document, "miss": {**miss, "prefill": kind}})
    scopes = case.slots.per_scope
    lacking = max(0, 2 * case.trace.meta.model.experts - sum(scopes))
    each = -(-lacking // len(scopes))
    return Case(case.trace, policy, Slots(tuple(slots + each for slots in scopes), case.slots.scratch))


# --- the naive engine


@pytest.mark.parametrize("miss", LOSSLESS)
@given(data=st.data())
@settings(max_examples=15, phases=[Phase.generate], deadline=None)
def test_times_labels_and_traffic_are_those_of_the_naive_engine(miss, data):
    case, hardware = data.draw(streamed(miss=miss)), data.draw(machines(near=miss == "near-memory" or None))
    total = len(case.trace.meta.model.moe_layers) * case.trace.meta.model.experts
    in_ram = data.draw(st.one_of(st.none(), st.integers(0, total - 1)))
    pinned = data.draw(st.one_of(st.none(), st.integers(0, total if in_ram is None else in_ram)))
    assert_equal_to_naive(lambda: setup_of(case, hardware, experts_in_ram=in_ram, experts_pinned=pinned))


@given(data=st.data())
@settings(max_examples=60, phases=[Phase.generate], deadline=None)
def test_so_they_are_where_prompts_join_others_and_prefetches_are_under_way(data):
    evict, prefetch = data.draw(st.sampled_from(CAUSAL)), data.draw(st.sampled_from(AHEAD))
    case = data.draw(streamed(evict=evict, prefetch=prefetch, miss="wait", arrivals=True))
    case = replace(case, trace=drawn_passes(case.trace, np.random.default_rng(data.draw(st.integers(0, 99)))))
    hardware, budget = data.draw(machines()), data.draw(st.integers(1, 9))
    assert_equal(lambda: tight(setup_of(case, hardware, token_budget=budget), 12))


# --- decisions


@given(data=st.data())
@settings(max_examples=60, phases=[Phase.generate], deadline=None)
def test_what_a_streamed_step_needs_is_held_or_in_a_buffer_and_lent_slots_stay_empty(data):
    case = data.draw(streamed(kinds=("stream",), miss="wait"))
    residency = case.policy.residency(case.trace, case.slots)
    experts, lent = residency.experts, set(residency.prefill.slots.tolist())
    assert len(lent) == 2 * experts and residency.prefill.lent.sum() == 2 * experts
    buffered: dict[int, dict[int, int]] = {}
    for moment in drive(residency, case.trace):
        kinds = moment.plan[:, KIND]
        held = residency.slot_of >= 0
        taken = residency.slot_of[held]
        assert len(set(taken.tolist())) == len(taken)
        assert residency._guarded.sum() == (residency.guard > 0).sum() == ((residency.guard > 0) & held).sum()
        if not residency.streaming:
            assert not np.isin(kinds, (LENT, WHOLE)).any()
            continue
        assert not lent & set(taken.tolist())
        assert not (kinds == LENT).any() or moment.routed is None
        assert set(moment.plan[kinds == LENT, SLOT].tolist()) <= lent
        for _, layer, expert, slot, victim in moment.plan[kinds == WHOLE].tolist():
            buffered.setdefault(layer, {})[expert] = slot
            assert victim == -1 and slot in lent
        if moment.routed is not None:
            layer, buffer = moment.layer, buffered.pop(moment.layer, {})
            missing = moment.routed.needed[~moment.routed.held].tolist()
            got = moment.plan[np.isin(kinds, (DEMAND, STREAM))]
            assert sorted(got[:, 2].tolist()) == missing and set(missing) <= set(buffer)
            for kind, at, expert, slot, _ in got.tolist():
                assert at == layer and (slot == buffer[expert]) == (kind == STREAM)
            assert set(moment.plan[kinds == WHOLE, LAYER].tolist()) <= {layer + 2}
            assert len(set(buffer.values())) == len(buffer)


@given(data=st.data())
@settings(max_examples=40, phases=[Phase.generate], deadline=None)
def test_decisions_of_stream_do_not_depend_on_the_machine(data):
    case = data.draw(streamed(kinds=("stream",), evict="lru", prefetch="none", miss="wait"))
    one, other = (EventsEngine(setup_of(case, data.draw(machines(near=False)))).run() for _ in range(2))
    assert one.decision_log_sha256 == other.decision_log_sha256


def test_every_scope_lends_in_proportion_and_at_least_two_layers_in_all():
    prefill = Prefill("stream", 4, 1, (3, 3, 6))
    assert prefill.lent.tolist() == [2, 2, 4]
    assert prefill.slots.tolist() == [1, 2, 4, 5, 8, 9, 10, 11]
    assert prefill.buffers.tolist() == [[1, 2, 4, 5], [8, 9, 10, 11]]
    assert Prefill("stream", 2, 1, (3, 2)).lent.tolist() == [2, 2]
    with pytest.raises(ValueError, match="two buffers take 8 slots, there are 7"):
        Prefill("stream", 4, 1, (7,))


# --- by hand: 3 layers of 4 experts, a free host, a copy of 1000 ns in one chunk


def prompt(tokens: int) -> Trace:
    """One step in which token t needs expert t % 4 of every layer."""
    trace = trace_of(spec(3, 4, 1), [np.tile(np.arange(tokens)[:, None, None] % 4, (1, 3, 1))])
    return replace(trace, phase=np.full(tokens, PREFILL, np.int8))


def by_hand(prefill: str, tokens: int, copy_ps: int = 1000 * NS, flops: float = 1e18, slots: int = 3) -> Setup:
    trace = prompt(tokens)
    model, free = (
        trace.meta.model,
        dict.fromkeys(("issue_s", "launch_latency_s", "sync_s", "sample_s", "policy_s"), 0.0),
    )
    h2d = replace(RTX4090.link.h2d, alpha_s=0.0, bandwidth=model.bytes_per_expert / (copy_ps * 1e-12))
    machine = replace(
        RTX4090,
        device=replace(RTX4090.device, op_latency_s=0.0, memory_bandwidth=1e18, flops=flops),
        host=replace(RTX4090.host, memory_bandwidth=1e18, **free),
        link=replace(RTX4090.link, h2d=h2d, submit_s=0.0, submit_batched_s=0.0),
    )
    policy = Policy.from_document({"miss": {"prefill": prefill, "waves": "1"}})
    return Setup(
        trace, model, machine, policy.residency(trace, Slots((slots,) * 3)), waves="1", chunks=1, timeline_steps=1
    )


def link_of(setup: Setup) -> list[tuple[int, int, str]]:
    spans = EventsEngine(setup).run().spans
    return sorted((start, end, what) for start, end, track, what in spans if track == "copy H2D")


def test_all_layers_cross_the_link_without_a_gap_before_any_router_is_waited_for():
    """12 copies of 1000 ns, begun before the first router: layer 0's buffer is free before layer 1 is across."""
    found = link_of(by_hand("stream", 2))
    assert [what for _, _, what in found] == [f"stream {key}" for key in range(12)]
    assert found[0][0] < 1000  # picoseconds: only the embedding comes before
    assert [start - found[0][0] for start, _, _ in found] == [1000 * NS * i for i in range(12)]
    selected = link_of(by_hand("select", 2))
    assert [what for _, _, what in selected] == [f"demand {key}" for key in (0, 1, 4, 5, 8, 9)]


def test_a_layer_waits_for_all_of_itself_and_the_buffer_for_the_computing_of_what_it_held():
    """Two tokens at 1e9 FLOP/s: computing takes far longer than copies of 1 ns, so the link waits for buffers."""
    setup = by_hand("stream", 2, copy_ps=NS, flops=1e9)
    spans = EventsEngine(setup).run().spans
    done = {what: end for _, end, track, what in spans if track == "experts"}
    begins = {what: start for start, _, track, what in spans if track == "copy H2D"}
    assert begins["stream 4"] < done["layer 0"] and begins["stream 8"] == done["layer 0"]
    held = by_hand("stream", 2)
    spans = EventsEngine(held).run().spans
    starts = {what: start for start, _, track, what in spans if track == "experts"}
    assert starts["layer 0"] == sorted(end for _, end, track, _ in spans if track == "copy H2D")[3]


def test_what_is_kept_is_what_demand_keeps_and_the_rest_is_computed_in_the_buffer():
    """9 slots lend 8: layer 0 and 1 keep none of theirs or one; the others of a layer's 4 needed are not held."""
    setup = by_hand("stream", 4)
    assert setup.residency.prefill.lent.tolist() == [3, 3, 2]
    measured = EventsEngine(setup).run()
    assert measured.steps["stream"].tolist() == [12] and measured.steps["demand"].tolist() == [0]
    assert [len(setup.residency.held(layer)) for layer in range(3)] == [0, 0, 1]
    assert measured.steps["miss"].tolist() == [12] and measured.steps["wasted"].tolist() == [0]
    assert EventsEngine(by_hand("stream", 1)).run().steps["wasted"].tolist() == [9]  # one of four is needed


# --- auto


def told(copy: int, dense: int, pair: int, launch: int = 0) -> Prices:
    none = np.zeros((3, 4), bool)
    return Prices(np.full((3, 4), copy), 0, none, 0, 0, 0, 0, LayerPrices(dense, 0, 0, pair, launch))


def test_expected_nanoseconds_by_hand():
    """Top-2 of 4: two tokens need 4 (1 - 1/4) = 3 experts of a layer, in expectation."""
    prefill, empty = Prefill("auto", 4, 2, (3, 3, 3)), np.full(9, -1)
    prefill.priced(told(copy=100, dense=50, pair=10))
    assert prefill.selecting_ns(2, empty) == 3 * (50 + 300)
    # across at 400, 800, 1200: the third layer's buffer is free at 440
    assert prefill.streaming_ns(2, empty) == 1200 + 40
    assert not prefill.streams(2, empty)
    assert prefill.selecting_ns(16, empty) == 3 * (50 + 399)  # 4 (1 - 2^-16): rounded down
    assert prefill.streaming_ns(16, empty) == 1200 + 320  # 320 for 32 pairs: hidden but for the last layer
    prefill.priced(told(copy=100, dense=450, pair=10))
    assert prefill.streaming_ns(2, empty) == 3 * (450 + 40) and prefill.selecting_ns(2, empty) == 3 * 750
    assert prefill.streams(2, empty)
    holds = empty.copy()
    holds[[0, 3, 6]] = 0, 4, 8  # one expert of each layer; slots 0 to 2, 3 to 5 and 7 to 8 are lent
    assert prefill.selecting_ns(2, holds) == 3 * (450 + 225)
    prefill.priced(told(copy=100, dense=50, pair=10))
    assert prefill.streaming_ns(2, holds) == 1100 + 40  # only the third layer's is kept
    few = Prefill("auto", 4, 2, (2, 3, 3))
    few.priced(told(copy=100, dense=50, pair=10, launch=500))
    assert few.selecting_ns(2, np.full(8, -1)) == 3 * (50 + 300) + 40 + 500 - 300, "one of three has no slot"


def test_buffers_that_are_computed_late_hold_the_link_back():
    prefill, empty = Prefill("auto", 4, 2, (3, 3, 3)), np.full(9, -1)
    prefill.priced(told(copy=1, dense=0, pair=100))
    # layer 0 ends at 404, 1 at 804; the third begins to cross at 404
    assert prefill.streaming_ns(2, empty) == 4 + 3 * 400


@given(st.integers(1, 5000), st.integers(0, 2**20), st.integers(0, 10**7), st.integers(0, 10**6))
def test_auto_takes_what_is_expected_to_end_first(tokens, copy, dense, pair):
    prefill, empty = Prefill("auto", 4, 2, (3, 3, 3)), np.full(9, -1)
    prefill.priced(told(copy, dense, pair))
    stream, select = prefill.streaming_ns(tokens, empty), prefill.selecting_ns(tokens, empty)
    assert prefill.streams(tokens, empty) == (stream < select)
    assert stream >= max(12 * copy, 3 * dense) and select >= 3 * dense
    assert prefill.selecting_ns(tokens + 1, empty) >= select


def test_auto_needs_to_be_told():
    with pytest.raises(ValueError, match="auto needs prices"):
        Prefill("auto", 4, 2, (9,)).streams(2, np.full(9, -1))


def test_one_token_is_selected_and_many_are_streamed():
    for tokens, streamed_steps in ((1, 0), (100, 1)):
        auto = EventsEngine(by_hand("auto", tokens, flops=1e12))
        end = auto.run().steps["end_ps"][0]
        others = [
            EventsEngine(by_hand(kind, tokens, flops=1e12)).run().steps["end_ps"][0] for kind in ("select", "stream")
        ]
        assert auto.residency.streamed_steps == streamed_steps
        assert end == min(others) < max(others)


# --- whole runs and bad input


def test_a_long_prompt_comes_sooner_and_a_result_says_how_often_layers_were_streamed():
    kinds = {}
    trace = prompt(2048)
    for kind in ("select", "stream", "auto"):
        kinds[kind] = simulate(trace, RTX4090, {"miss": {"prefill": kind}}, 11, engine="events")
    assert kinds["stream"]["decision_log_sha256"] != kinds["select"]["decision_log_sha256"]
    assert "miss.prefill stream: 1 steps streamed whole layers" in kinds["stream"]["notes"]
    assert not any("miss.prefill" in note for note in kinds["select"]["notes"])
    assert kinds["auto"]["ttft_s"] in (kinds["select"]["ttft_s"], kinds["stream"]["ttft_s"])


def test_too_few_slots_are_refused_and_auto_then_selects():
    trace = prompt(8)
    with pytest.raises(
        InputError, match=r"stream lends the slots of two layers' experts \(8\), and the budget holds 6"
    ):
        simulate(trace, RTX4090, {"miss": {"prefill": "stream"}}, 8)
    auto, select = (simulate(trace, RTX4090, {"miss": {"prefill": kind}}, 8) for kind in ("auto", "select"))
    assert auto["decision_log_sha256"] == select["decision_log_sha256"] and auto["ttft_s"] == select["ttft_s"]
    assert auto["engine"] == "compiled"


@pytest.mark.parametrize(
    ("miss", "why"),
    [
        ({"prefill": "whole"}, "miss.prefill"),
        ({"prefill": "stream", "kind": "skip"}, "miss.prefill: stream computes whatever the router says"),
        ({"prefill": "auto", "kind": "low-bit"}, "take wait, cpu or split"),
        ({"prefill": "auto", "kind": "cpu"}, "auto weighs copies against copies"),
    ],
)
def test_a_document_that_cannot_be_says_why(miss, why):
    with pytest.raises(InputError, match=why):
        Policy.from_document({"miss": miss})


def test_who_cannot_stream_says_so():
    trace, policy = prompt(8), Policy.from_document({"miss": {"prefill": "stream"}})
    with pytest.raises(InputError, match=r"--devices 2: miss\.prefill stream streams layers to one device"):
        simulate(trace, RTX4090, policy, 11, devices=2)
    with pytest.raises(InputError, match="--engine compiled: whole-layer streaming"):
        simulate(trace, RTX4090, policy, 11, engine="compiled")
    with pytest.raises(InputError, match="a replay without a clock selects"):
        replay(trace, policy, Slots((9,) * 3))
    assert why_not(by_hand("select", 1)) is None and VICTIM == 4
