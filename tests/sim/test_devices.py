"""Several devices: the events engine against the naive one, moments by hand, and what sharing can and cannot do."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from cases import MISS_SERVICES, RTX4090, Case, cases, decode_trace, machines, spec
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from moeflow.hwprofiles.profile import CopyDirection
from moeflow.policies.miss_service import MissService
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.placement import place
from moeflow.sim.result import make_result
from moeflow.sim.run import simulate
from test_engine_against_naive import assert_equal_to_naive

from moeflow.errors import InputError

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
def placements(draw, model, least=1, parallel=None):
    parallel = parallel or draw(st.sampled_from(("layer", "expert")))
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


@pytest.mark.parametrize("parallel", ["layer", "expert"])
@given(data=st.data())
@settings(max_examples=50, phases=[Phase.generate])
def test_times_labels_and_traffic_are_those_of_the_naive_engine(parallel, data):
    case = data.draw(cases(miss=data.draw(st.sampled_from(("wait", *SERVICES))), arrivals=data.draw(st.booleans())))
    model, hardware = case.trace.meta.model, data.draw(linked())
    placement = data.draw(placements(model, parallel=parallel))
    slots = data.draw(slots_on(placement, case.policy))
    in_ram = data.draw(st.sampled_from((None, None, 1, len(model.moe_layers) * model.experts // 2)))
    pinned = data.draw(st.sampled_from((None, None, 0, 1)))
    resting = {"experts_in_ram": in_ram, "experts_pinned": pinned}
    measured = assert_equal_to_naive(lambda: setup_on(case, hardware, placement, slots, **resting))
    for name, values in measured.steps.items():
        assert (values >= 0).all(), name
    times = measured.steps
    accounted = times["wait_ps"] + times["busy_ps"] + times["peer_ps"]
    assert (accounted <= times["end_ps"] - times["start_ps"]).all()


@given(data=st.data())
@settings(max_examples=40)
def test_no_run_beats_its_bounds(data):
    case = data.draw(cases(miss=data.draw(st.sampled_from(("wait", "cpu", "split")))))
    placement = data.draw(placements(case.trace.meta.model, least=2))
    result = run(setup_on(case, data.draw(linked()), placement, data.draw(slots_on(placement, case.policy))))
    for figures in (result.values, *([result["prefill"]] if result["prefill"] else [])):
        bounds, mean = figures["bounds"], figures["tpot_s"]["mean"] * (1 + 1e-12)
        assert bounds["resident"]["tpot_s"] <= mean
        assert bounds["clairvoyant"]["tpot_s"] <= mean
        assert bounds["clairvoyant"]["wait_s_per_token"] <= figures["wait_s_per_token"] * (1 + 1e-12)
        if case.policy.document["prefetch"]["kind"] == "none":
            assert figures["hit"] <= bounds["clairvoyant"]["hit"] + 1e-12
        assert sum(figures["time_share"].values()) == pytest.approx(1, abs=1e-12)
        assert min(figures["time_share"].values()) >= -1e-12
    times, on_host = result.measurements.steps, case.policy.miss_service().on_host
    assert on_host or (times["end_ps"] - times["start_ps"] >= result.resident_ps).all()
    for name in ("needed", "hit", "late", "miss"):
        assert sum(getattr(device, name) for device in result.measurements.devices) == times[name].sum()


@given(data=st.data())
@settings(max_examples=40)
def test_nothing_is_held_or_copied_where_it_is_not_computed(data):
    case = data.draw(cases())
    placement = data.draw(placements(case.trace.meta.model, least=2))
    setup = setup_on(case, data.draw(machines()), placement, data.draw(slots_on(placement, case.policy)))
    EventsEngine(setup).run()
    for device, residency in enumerate(setup.residencies):
        log = residency.decision_log()
        assert (placement.owner[log[:, 2], log[:, 3]] == device).all()
        assert (placement.owner[residency.slot_of >= 0] == device).all()


@given(data=st.data())
@settings(max_examples=40)
def test_devices_whose_experts_nobody_needs_change_nothing(data):
    """Expert parallel, and every token chooses experts of device 0."""
    case = data.draw(cases(prefetch="none", miss=data.draw(st.sampled_from(("wait", *SERVICES)))))
    trace, model = case.trace, case.trace.meta.model
    devices = data.draw(st.integers(2, min(3, model.experts)))
    trace = replace(trace, experts=np.where(trace.experts % devices == 0, trace.experts, trace.absent))
    placement, case = place(model, devices, "expert"), replace(case, trace=trace)
    slots = data.draw(slots_on(placement, case.policy))
    machine = data.draw(machines())
    machine = replace(machine, host=replace(machine.host, memory_bandwidth=1e18))
    alone = replace(case, slots=slots[0])
    one, several = (
        run(setup_on(alone, machine, place(model, 1, None), slots[:1])),
        run(setup_on(case, machine, placement, slots)),
    )
    for name, values in one.measurements.steps.items():
        assert values.tolist() == several.measurements.steps[name].tolist(), name
    assert several.measurements.devices[1].compute_busy_ps == several.measurements.devices[1].link_busy_ps == 0


@given(data=st.data())
@settings(max_examples=40)
def test_a_layer_split_with_nothing_to_pay_for_is_one_device_with_all_the_slots(data):
    """Per layer and without prefetch: devices take turns, and each copy has a link to itself either way."""
    case = data.draw(
        cases(evict=data.draw(st.sampled_from(("lru", "lfu", "arc", "moeflow", "belady"))), prefetch="none")
    )
    assume(case.policy.scope == "layer")
    model = case.trace.meta.model
    assume(len(model.moe_layers) > 1)
    placement = place(model, data.draw(st.integers(2, len(model.moe_layers))), "layer")
    slots = data.draw(slots_on(placement, case.policy))
    together = Slots(tuple(np.sum([each.per_scope for each in slots], axis=0).tolist()), case.policy.scratch)
    machine = data.draw(machines())
    machine = replace(
        machine,
        host=replace(machine.host, memory_bandwidth=1e18),
        link=replace(machine.link, peer=FREE_PEER, submit_s=0.0),
    )
    one, several = (
        run(setup_on(case, machine, place(model, 1, None), [together])),
        run(setup_on(case, machine, placement, slots)),
    )
    for name, values in one.measurements.steps.items():
        assert values.tolist() == several.measurements.steps[name].tolist(), name


NS = 1000


def hand(sets, devices: int, parallel: str | None, slots: Slots, copy_ns: int = 1000, peer_ns: int = 300):
    """[(start, end, wait, peer) in ns] of steps whose kernels and host calls take no time; and the run."""
    trace = decode_trace(4, sets)
    model = trace.meta.model
    link, size = RTX4090.link, model.bytes_per_expert
    machine = replace(
        RTX4090,
        device=replace(RTX4090.device, op_latency_s=0.0, flops=1e30, memory_bandwidth=1e30),
        host=replace(RTX4090.host, memory_bandwidth=1e30, **FREE_HOST),
        link=replace(
            link, h2d=replace(link.h2d, alpha_s=0.0, bandwidth=size / (copy_ns * 1e-9)), submit_s=0.0,
            submit_batched_s=0.0, peer=CopyDirection(peer_ns * 1e-9, 1e30),
        ),
    )  # fmt: skip
    placement = place(model, devices, parallel)
    case = Case(trace, Policy.from_document({"miss": {"chunks": 1}}), slots)
    each = [
        Slots(
            tuple(
                int(n) if mine else 0
                for n, mine in zip(slots.per_scope, (placement.owner == d).any(axis=1), strict=True)
            )
        )
        for d in range(devices)
    ]
    result = run(setup_on(case, machine, placement, each, timeline_steps=9))
    steps = result.measurements.steps
    columns = [(steps[name] // NS).tolist() for name in ("start_ps", "end_ps", "wait_ps", "peer_ps")]
    return list(zip(*columns, strict=True)), result


def test_expert_parallel_by_hand():
    """Experts 0 and 1 are copied over a link each, at once; then both are hits and only rows and sums travel.

    Rows reach device 1 at 300, its expert at 1000, its sum is back at 1300; it had waited 700, so all of the lead's
    last 300 are for an expert. In the second step rows and sum take 600, and nobody waits for an expert.
    """
    found, result = hand([[[0, 1]], [[0, 1]]], 2, "expert", Slots((2,)))
    assert found == [(0, 1300, 1300, 0), (1300, 1900, 0, 600)]
    assert [device.hit for device in result.measurements.devices] == [1, 1]
    assert [device.link_busy_ps for device in result.measurements.devices] == [1000 * NS, 1000 * NS]
    one, _ = hand([[[0, 1]], [[0, 1]]], 1, None, Slots((4,)))
    assert one == [(0, 2000, 2000, 0), (2000, 2000, 0, 0)]


def test_what_comes_back_to_the_lead_comes_one_after_the_other():
    """Three devices with a hit each: rows arrive at 300 and 600, sums leave then and are back at 600 and 900."""
    found, _ = hand([[[0, 1, 2]], [[0, 1, 2]]], 3, "expert", Slots((2,)))
    assert found[1][1] - found[1][0] == 900


def test_who_is_done_first_sends_first_and_the_last_to_come_says_what_the_lead_waited_for():
    """Devices 0 and 2 have hits, device 1 a miss; rows are at 1 at 300 and at 2 at 600.

    A copy of 1000: 2 is back at 900 and 1 at 1300, of which it had waited 700. A copy of 400: 1 is back at 700, and 2,
    ready at 600, at 1000; what 1 waited was not what the lead waited for.
    """
    sets = [[[0, 2]], [[0, 1, 2]]]
    (_, slow), _ = hand(sets, 3, "expert", Slots((2,)))
    assert (slow[1] - slow[0], slow[2], slow[3]) == (1300, 700, 600)
    (_, fast), _ = hand(sets, 3, "expert", Slots((2,)), copy_ns=400)
    assert (fast[1] - fast[0], fast[2], fast[3]) == (1000, 0, 1000)


def test_layer_split_by_hand():
    """Each layer waits 1000 for its expert; between them the hidden states take 300."""
    found, result = hand([[[0], [0]], [[0], [0]]], 2, "layer", Slots((2, 2)))
    assert found == [(0, 2300, 2000, 300), (2300, 2600, 0, 300)]
    tracks = {track for _, _, track, _ in result.measurements.spans}
    assert {"copy H2D", "copy H2D 1", "experts", "experts 1", "between devices"} <= tracks


@given(data=st.data())
@settings(max_examples=60)
def test_layers_are_cut_where_the_largest_run_is_smallest(data):
    model = data.draw(cases()).trace.meta.model
    devices = data.draw(st.integers(1, len(model.moe_layers)))
    size = [model.layer_dense_bytes(layer) for layer in range(model.layers)]
    size = [n + (layer in model.moe_layers) * model.experts * model.bytes_per_expert for layer, n in enumerate(size)]
    size[0] += model.head_bytes
    size[-1] += model.head_bytes

    def largest(home):
        runs = [[layer for layer, device in enumerate(home) if device == d] for d in range(devices)]
        if not all(any(layer in model.moe_layers for layer in each) for each in runs):
            return np.inf
        return max(sum(size[layer] for layer in each) for each in runs)

    cuts = combinations(range(1, model.layers), devices - 1)
    every = [tuple(np.searchsorted(cut, np.arange(model.layers), side="right").tolist()) for cut in cuts]
    home = place(model, devices, "layer" if devices > 1 else None).home
    assert list(home) == sorted(home)
    assert largest(home) == min(map(largest, every))


@pytest.mark.parametrize("parallel", ["layer", "expert"])
def test_each_device_holds_its_part_and_all_of_them_the_model(parallel):
    model = spec(4, 5, 2, dense_intermediate=48, shared_intermediate=32)
    placement = place(model, 3, parallel)
    assert sum(placement.dense_bytes(device, model) for device in range(3)) == model.dense_bytes
    assert sum(placement.here(device).sum() for device in range(3)) == 4 * 5
    kv = sum(placement.kv_bytes_per_token(device, model) for device in range(3))
    assert model.kv_bytes_per_token <= kv < model.kv_bytes_per_token + 3


def test_a_fraction_is_of_each_devices_experts_and_slots_are_each_devices():
    trace = decode_trace(8, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    for parallel, halves in (("layer", ((4, 0), (0, 4))), ("expert", ((2, 2), (2, 2)))):
        result = simulate(trace, RTX4090, "lru", 0.5, devices=2, parallel=parallel)
        assert [device["slots"]["held"] for device in result["devices"]] == [sum(half) for half in halves]
        assert result["slots"] == {"held": 8, "scratch": 4, "per_scope": [4, 4]}
    each = simulate(trace, RTX4090, "lru", 6, devices=2, parallel="layer")["devices"]
    assert [device["slots"] for device in each] == [{"held": 4, "scratch": 2}] * 2
    lead, other = simulate(trace, RTX4090, "lru", vram="1.6GiB", devices=2, parallel="expert")["devices"]
    assert lead["peak_bytes"] > other["peak_bytes"]


def test_one_device_is_the_same_run_with_or_without_being_asked_for():
    trace = decode_trace(8, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    asked = simulate(trace, RTX4090, "lru", 0.5, devices=1)
    assert asked.to_json() == simulate(trace, RTX4090, "lru", 0.5).to_json()
    assert "devices" not in asked.values and "devices" not in asked["hardware"]


def test_two_runs_give_the_same_bytes_and_decisions_are_those_of_every_device():
    trace = decode_trace(8, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    first, second = (simulate(trace, RTX4090, "lru", 0.5, devices=2, parallel="expert") for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first["decision_log_sha256"] != simulate(trace, RTX4090, "lru", 0.5)["decision_log_sha256"]


@pytest.mark.parametrize(
    "others, message",
    [
        ({"devices": 0}, "--devices 0: a run needs at least one device"),
        ({"devices": 2, "parallel": "tensor"}, "--parallel 'tensor': expected layer or expert"),
        ({"parallel": "layer"}, "--parallel layer: one device shares nothing"),
        ({"devices": 3, "parallel": "layer"}, "--devices 3: test has 2 layers with experts"),
        ({"devices": 9, "parallel": "expert"}, "--devices 9: test has 8 experts"),
        ({"devices": 2, "batching": "continuous"}, "--devices 2: --batching continuous keeps every request's KV cache"),
        ({"devices": 2, "engine": "compiled"}, "--engine compiled: several devices are not compiled"),
        ({"devices": 2, "hw": "jetson-orin"}, "one memory for host and device"),
        ({"devices": 2, "near_memory": "cxl-ndp"}, "how devices share a near-memory unit is not modelled"),
        ({"devices": 2, "policy": {"miss": {"prefill": "auto"}}}, "miss.prefill auto streams layers to one device"),
        (
            {"devices": 2, "policy": {"schedule": {"kind": "two-medoid"}, "predict": {"kind": "next-gate"}}},
            "a schedule",
        ),
        ({"devices": 2, "policy": "lru-dp"}, "cache.split dp shares out the slots of one device"),
        ({"devices": 2, "policy": {"miss": {"kind": "substitute"}}}, "miss.kind substitute changes routing"),
        ({"devices": 2, "budget": 2}, "2 slots is too little: the least is 3 slots"),
    ],
)
def test_what_several_devices_cannot_do_is_refused_in_one_sentence(others, message):
    trace = decode_trace(8, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    lookahead = np.zeros((2, 3, 1, 2), np.uint8)
    columns = {"weights": np.full((2, 2, 2), 0.5, np.float16), "lookahead": lookahead}
    trace = replace(trace, meta=replace(trace.meta, lookahead_distances=(1,)), **columns)
    with pytest.raises(InputError, match="^(?s:.)*" + message):
        simulate(trace, **({"policy": "lru", "budget": 0.5} | others))
