"""Replays without a clock: `Residency`'s counts to the last one, and libCacheSim's where the semantics coincide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cases import EVICTIONS, drive, slots_for, spec, trace_of, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.residency import STREAM, Slots
from moeflow.sim.needs import needs_of
from moeflow.sim.replay import replay, replay_scoring
from moeflow.sim.scoring import scoring_of
from moeflow.traces.trace import Trace

from moeflow.errors import InputError

COMPILED = [name for name, cls in EVICTIONS.items() if cls.touch_step is not None]
SHORT = {"lfu-aged": {"halve_every": 3}, "lcp": {"window": 4.0}, "lrfu": {"half_life": 2.0}}  # so that short traces age


def policy_of(evict: str, scope: str, **parameters: object) -> Policy:
    return Policy.from_document({"cache": {"evict": evict, "scope": scope, **SHORT.get(evict, {}), **parameters}})


def counts_of_residency(trace: Trace, policy: Policy, slots: Slots) -> tuple[list[int], list[int]]:
    """Misses and streams by layer, from the state machine itself."""
    residency = policy.residency(trace, slots)
    misses, streams = [0] * residency.layers, [0] * residency.layers
    for moment in drive(residency, trace):
        if moment.routed is not None:
            misses[moment.layer] += int((~moment.routed.held).sum())
            streams[moment.layer] += int((moment.plan[:, 0] == STREAM).sum())
    return misses, streams


@pytest.mark.parametrize("evict", COMPILED)
@given(data=st.data())
@settings(max_examples=60)
def test_counts_are_those_of_residency(evict, data):
    trace = data.draw(traces(lookahead=False))
    bypass = {"bypass": data.draw(st.booleans())} if evict == "belady" else {}
    policy = policy_of(evict, data.draw(st.sampled_from(("layer", "global"))), **bypass)
    slots = data.draw(slots_for(trace, policy))
    found = replay(trace, policy, slots)
    assert (found.misses.tolist(), found.streams.tolist()) == counts_of_residency(trace, policy, slots)
    assert (found.hits + found.misses == found.accesses).all()


@given(trace=traces(lookahead=False))
def test_needs_are_the_distinct_experts_of_each_layer_step(trace):
    needs, starts, experts = needs_of(trace), trace.step_starts, trace.meta.model.experts
    for event in range(len(needs.begin) - 1):
        step, layer = divmod(event, needs.layers)
        ids = trace.experts[starts[step] : starts[step + 1], layer]
        distinct, tokens = np.unique(ids[ids < experts], return_counts=True)
        part = slice(needs.begin[event], needs.begin[event + 1])
        assert needs.expert[part].tolist() == distinct.tolist()
        assert needs.tokens[part].tolist() == tokens.tolist()
        by_demand = sorted(zip(distinct.tolist(), tokens.tolist(), strict=True), key=lambda one: (-one[1], one[0]))
        assert needs.demand[part].tolist() == [expert for expert, _ in by_demand]


def test_a_case_by_hand():
    """Two slots. 0 and 1 miss; 2 puts out 0; 1 is found; 0 puts out 2; of {1, 2, 3} 1 is held, 2 fits, 3 does not."""
    trace = trace_of(
        spec(1, 4, 3), [np.array([[ids]]) for ids in ([0, 1, -1], [2, -1, -1], [1, -1, -1], [0, -1, -1], [1, 2, 3])]
    )
    found = replay(trace, "lru", Slots((2,)))
    assert (found.accesses.tolist(), found.misses.tolist(), found.streams.tolist()) == ([8], [6], [1])
    assert found.hit_rate == 0.25


def test_a_replay_leaves_its_inputs_as_they_were():
    trace = trace_of(spec(2, 6, 2), list(np.random.default_rng(0).integers(0, 6, (20, 1, 2, 2))))
    needs = needs_of(trace)
    scoring = scoring_of(policy_of("moeflow", "layer"), trace, needs, Slots((3, 3)))
    first, second = (replay_scoring(needs, scoring, Slots((3, 3))) for _ in range(2))
    assert first.misses.tolist() == second.misses.tolist()


@pytest.mark.parametrize(
    "document, words",
    [
        ({"cache": {"evict": "sieve"}}, "no compiled step"),
        ({"prefetch": {"kind": "oracle"}}, "prefetch"),
        ({"miss": {"kind": "cpu"}}, "miss"),
        ({"miss": {"prefill": "auto"}}, r"miss\.prefill: a replay without a clock selects"),
        ({"cache": {"stale": 1}}, r"cache\.stale: a replay without a clock has fresh scores"),
    ],
)
def test_what_a_replay_cannot_do_is_refused(document, words):
    with pytest.raises(InputError, match=words):
        replay(trace_of(spec(), [np.zeros((1, 1, 1))]), Policy.from_document(document), Slots((1,)))


def test_slots_for_another_model_are_a_mistake():
    with pytest.raises(ValueError, match="3 scopes"):
        replay(trace_of(spec(2), [np.zeros((1, 2, 1))]), "lru", Slots((1, 1, 1)))


def one_at_a_time(accesses: int = 5000, experts: int = 64) -> Trace:
    """Sets of one expert, where serving a set at once and one by one is the same."""
    rng = np.random.default_rng(7)
    ids = np.minimum(rng.zipf(1.3, accesses) - 1, rng.integers(0, experts, accesses))
    return trace_of(spec(1, experts, 1), list(ids.reshape(-1, 1, 1, 1)))


# Misses that libCacheSim 0.3.5 counts on `one_at_a_time`, by slots. Its LFU forgets an evicted object's uses and
# cannot be compared; its Belady admits every miss.
LIBCACHESIM = {
    "lru": {1: 4520, 2: 4146, 4: 3503, 8: 2711, 16: 1916, 32: 1032, 48: 451},
    "fifo": {1: 4520, 2: 4183, 4: 3645, 8: 2984, 16: 2189, 32: 1232, 48: 562},
    "belady": {1: 4520, 2: 3401, 4: 2506, 8: 1741, 16: 1067, 32: 469, 48: 192},
}
NAMES = {"lru": "LRU", "fifo": "FIFO", "belady": "Belady"}


@pytest.mark.parametrize("evict", LIBCACHESIM)
def test_misses_are_those_that_libcachesim_counted(evict):
    trace = one_at_a_time()
    policy = policy_of(evict, "global", **({"bypass": False} if evict == "belady" else {}))
    for slots, misses in LIBCACHESIM[evict].items():
        assert replay(trace, policy, Slots((slots,))).misses.sum() == misses


@pytest.mark.parametrize("evict", NAMES)
def test_libcachesim_still_counts_the_pinned_misses(evict, tmp_path: Path):
    library = pytest.importorskip("libcachesim", reason="libcachesim is not installed: its counts are pinned above")
    keys = needs_of(one_at_a_time()).keys()
    record = np.zeros(len(keys), [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    record["time"], record["id"], record["size"], record["next"] = np.arange(len(keys)), keys, 1, -1
    following: dict[int, int] = {}
    for at in range(len(keys) - 1, -1, -1):
        record["next"][at] = following.get(int(keys[at]), -1)
        following[int(keys[at])] = at
    record.tofile(tmp_path / "trace.bin")
    for slots, misses in LIBCACHESIM[evict].items():
        reader = library.TraceReader(
            str(tmp_path / "trace.bin"),
            library.TraceType.ORACLE_GENERAL_TRACE,
            library.ReaderInitParam(ignore_obj_size=True),
        )
        ratio, _ = getattr(library, NAMES[evict])(slots, hashpower=10).process_trace(reader)
        assert round(ratio * len(keys)) == misses
