"""How misses are served: rules by hand, and what must hold for every service; guards on what is copied ahead."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from cases import MISS_SERVICES, cases, decode_trace, drive, log_of, spec, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.biased_routing import BiasedRouting
from moeflow.policies.low_bit import LowBit
from moeflow.policies.miss_service import FETCH, LOW_BIT, ON_CPU, SKIP, better_ranked
from moeflow.policies.policy import Policy
from moeflow.policies.residency import COPIED, CPU, DEMAND, LOW, NEAR, PREFETCH, SKIPPED, STREAM, Slots
from moeflow.policies.routed import Routed
from moeflow.policies.skip import Skip
from moeflow.policies.split import ONE, Split
from moeflow.policies.substitute import Substitute
from moeflow.traces.trace import TraceMeta

META = TraceMeta(spec(1, 6, 3))
ELSEWHERE = {"near-memory": {NEAR}, "cpu": {CPU}, "split": {CPU}, "low-bit": {LOW, SKIPPED}, "skip": {SKIPPED}}
NO_SCORE = np.zeros(6)


def routed_of(ids, weights=None) -> Routed:
    ids = np.array(ids)
    needed, tokens = np.unique(ids[ids < 6], return_counts=True)
    weights = None if weights is None else np.array(weights, np.float16)
    held = np.zeros(len(needed), bool)
    return Routed(0, 0, 0, ids, weights, None, None, needed.astype(np.int32), tokens.astype(np.int32), held, {})


@pytest.mark.parametrize("miss", MISS_SERVICES)
@given(data=st.data())
@settings(max_examples=25)
def test_every_miss_is_served_once_by_a_way_of_its_service(miss, data):
    case = data.draw(cases(miss=miss))
    residency = case.residency()
    allowed = {DEMAND, STREAM} | ELSEWHERE.get(miss, set())
    for moment in drive(residency, case.trace):
        if moment.routed is None:
            continue
        own = moment.plan[moment.plan[:, 0] != PREFETCH]
        assert set(own[:, 0].tolist()) <= allowed
        assert Counter(own[:, 2].tolist()) == Counter(moment.routed.needed[~moment.routed.held].tolist())
        assert (own[np.isin(own[:, 0], (CPU, SKIPPED, NEAR)), 3:] == -1).all()
        scratch = own[np.isin(own[:, 0], (STREAM, LOW)), 3]
        assert ((scratch >= case.slots.held) & (scratch < case.slots.total)).all()


@pytest.mark.parametrize("miss", MISS_SERVICES)
@given(data=st.data())
@settings(max_examples=10)
def test_two_runs_decide_the_same_however_misses_are_served(miss, data):
    case = data.draw(cases(miss=miss))
    np.testing.assert_array_equal(log_of(case.residency(), case.trace), log_of(case.residency(), case.trace))


@pytest.mark.parametrize("miss", ["substitute", "biased-routing"])
@given(data=st.data())
@settings(max_examples=25)
def test_changed_routing_keeps_distinct_experts_of_the_model(miss, data):
    case = data.draw(cases(miss=miss))
    experts = case.trace.meta.model.experts
    for moment in drive(case.residency(), case.trace):
        if moment.routed is not None:
            rows = case.trace.experts[slice(*case.trace.step_starts[moment.step : moment.step + 2]), moment.layer]
            for before, after in zip(rows, moment.routed.ids, strict=True):
                present = after[after < experts].tolist()
                assert len(set(present)) == len(present) == np.count_nonzero(before < experts)


def test_only_services_that_change_nothing_claim_bit_exactness():
    exact = {name for name, cls in MISS_SERVICES.items() if cls.exactness == "bit"}
    assert exact == {"wait"}
    numeric = {name for name, cls in MISS_SERVICES.items() if cls.exactness == "numeric"}
    assert numeric == {"cpu", "split", "near-memory"}


def test_what_the_host_computes_is_promoted_one_at_a_time():
    policy = Policy.from_document({"miss": {"kind": "cpu", "promote": 1}})
    trace = decode_trace(6, [[[0, 1, 2]], [[0, 1, 2]], [[3, 4, 5]], [[3, 4, 5]]])
    log = log_of(policy.residency(trace, Slots((5,)), keep_log=True), trace)
    assert log[:, 1:4].tolist() == [
        *([CPU, 0, e] for e in (0, 1, 2)), [PREFETCH, 0, 0],
        *([CPU, 0, e] for e in (1, 2)), [PREFETCH, 0, 1],
        *([CPU, 0, e] for e in (3, 4, 5)), [PREFETCH, 0, 3],
        *([CPU, 0, e] for e in (4, 5)), [PREFETCH, 0, 4],
    ]  # fmt: skip


def test_split_shares_misses_so_that_both_ends_finish_together():
    split = Split(share=0.5)
    split.start(META)
    missing = np.arange(6, dtype=np.int32)
    routed = routed_of([[0, 1, 2], [3, 4, 5]])
    assert split.serve(routed, missing, NO_SCORE).tolist() == [FETCH] * 3 + [ON_CPU] * 3
    split.copied(0, 0, 1000, 1000)
    assert split.serve(routed, missing, NO_SCORE).tolist() == [FETCH] * 3 + [ON_CPU] * 3, "one end unknown"
    split.computed(0, 0, 1000, 5000)  # the host takes five times as long: 5 of 6 cross the link
    assert split.serve(routed, missing, NO_SCORE).tolist() == [FETCH] * 5 + [ON_CPU]
    for _ in range(100):
        split.computed(0, 0, 1000, 100)
    assert split.serve(routed, missing, NO_SCORE).tolist() == [FETCH] + [ON_CPU] * 5
    assert split.serve(routed, missing[:1], NO_SCORE[:1]).tolist() == [FETCH], "a lone miss is never left to the host"


def test_split_fetches_what_most_tokens_need_then_what_is_worth_most():
    split = Split(share=0.5)
    split.start(META)
    routed = routed_of([[0, 1, 2], [3, 4, 2]])
    missing, score = np.array([2, 0, 1, 3], np.int32), np.array([0.0, 1.0, 3.0, 2.0])
    assert split.serve(routed, missing, score).tolist() == [FETCH, ON_CPU, FETCH, ON_CPU]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 10**9), st.integers(0, 10**12)), max_size=30))
def test_split_decides_with_whole_numbers_only(reports):
    split = Split()
    split.start(META)
    for copied, size, ns in reports:
        (split.copied if copied else split.computed)(0, 0, size, ns)
    assert isinstance(split._link, int) and isinstance(split._host, int)
    for missing in range(1, 9):
        assert 1 <= split._fetched(missing) <= missing
    assert ONE == 2**16


def test_unimportance_is_the_weight_of_better_ranked_experts():
    np.testing.assert_allclose(better_ranked(routed_of([[0, 1, 2]], [[0.5, 0.25, 0.25]])), [[0, 0.5, 0.75]], rtol=1e-3)


def test_low_bit_follows_the_two_thresholds_and_the_token_that_cares_most():
    service = LowBit(first=0.6, second=0.9)
    one = routed_of([[0, 1, 2]], [[0.7, 0.25, 0.05]])
    assert service.serve(one, np.array([0, 1, 2]), NO_SCORE).tolist() == [FETCH, LOW_BIT, SKIP]
    two = routed_of([[0, 1, 2], [2, 3, 4]], [[0.7, 0.25, 0.05], [0.9, 0.06, 0.04]])
    assert service.serve(two, np.array([2, 1]), NO_SCORE).tolist() == [FETCH, LOW_BIT]


def test_skip_leaves_out_what_no_token_weighs():
    routed = routed_of([[0, 1, 2], [2, 3, 4]], [[0.8, 0.15, 0.05], [0.5, 0.45, 0.05]])
    assert Skip(0.1).serve(routed, np.array([1, 2, 4]), NO_SCORE).tolist() == [FETCH, FETCH, SKIP]


def test_a_lossy_service_that_reads_weights_says_when_it_gets_none():
    for service in (LowBit(), Skip()):
        with pytest.raises(ValueError, match="weights"):
            service.serve(routed_of([[0, 1, 2]]), np.array([0]), NO_SCORE)


def test_a_buddy_replaces_a_missing_expert_of_low_rank():
    service = Substitute(keep=1)
    service.start(META)
    everything, held = np.ones(6, bool), np.array([False, False, False, True, True, True])
    for chosen in ([0, 1, 4], [0, 1, 4], [2, 1, 5]):
        service.reroute(0, np.array([chosen]), everything, {})
    assert service.reroute(0, np.array([[0, 1, 2]]), held, {}).tolist() == [[0, 4, 5]]
    assert service.reroute(0, np.array([[0, 1, 4]]), held, {}).tolist() == [[0, 5, 4]], "not the one it has already"


def test_biased_routing_prefers_what_is_held_but_keeps_the_best():
    columns = {
        "candidates": np.array([[0, 1, 2, 3, 4, 5]]),
        "candidate_logits": np.array([[5.0, 4.0, 3.0, 2.9, 1.0, 0.0]]),
    }
    held = np.array([False, False, False, True, False, True])
    for strength, expected in ((0.0, [0, 1, 2]), (0.05, [0, 1, 3]), (10.0, [0, 3, 5])):
        service = BiasedRouting(strength=strength, keep=1)
        service.start(META)
        assert service.reroute(0, np.array([[0, 1, 2]]), held, columns).tolist() == [expected]


@pytest.mark.parametrize(
    "document, part",
    [
        ({"kind": "cpu", "promote": -1}, "promote"),
        ({"kind": "split", "share": 1.5}, "share"),
        ({"kind": "near-memory", "promote": -1}, "promote"),
        ({"kind": "low-bit", "first": 0.9, "second": 0.1}, "first"),
        ({"kind": "low-bit", "bits": 0}, "bits"),
        ({"kind": "skip", "share": -1.0}, "share"),
        ({"kind": "substitute", "keep": -1}, "keep"),
        ({"kind": "biased-routing", "strength": -1.0}, "strength"),
    ],
)
def test_impossible_parameters_are_refused(document, part):
    with pytest.raises(Exception, match=part) as caught:
        Policy.from_document({"miss": document})
    assert type(caught.value).__name__ == "InputError"


# --- guards


def prefetching(**guards) -> tuple[Policy, np.ndarray]:
    """Two layers; an oracle knows that every step needs other experts of the second one."""
    document = {"prefetch": {"kind": "oracle", "distance": 1, **guards}}
    sets = [[[0, 1], [(2 * step) % 6, (2 * step + 1) % 6]] for step in range(6)]
    trace = decode_trace(6, sets)
    policy = Policy.from_document(document)
    return policy, log_of(policy.residency(trace, Slots((4, 4)), keep_log=True), trace)


def test_at_most_so_many_copies_are_planned_ahead_per_layer():
    _, free = prefetching()
    _, guarded = prefetching(per_layer=1)
    ahead = [np.bincount(log[log[:, 1] == PREFETCH, 0] + 1) for log in (free, guarded)]
    assert ahead[0].max() == 2
    assert ahead[1].max() == 1


def test_a_copy_ahead_does_not_evict_what_has_just_come():
    """Steps since a victim was given its slot, over every prefetch."""
    shortest = {}
    for dwell in (0, 3):
        _, log = prefetching(dwell=dwell)
        since: dict[int, int] = {}
        stayed = []
        for event, kind, _, _, slot, victim in log.tolist():
            if kind == PREFETCH and victim >= 0:
                stayed.append(event // 2 - since[slot])
            since[slot] = event // 2
        shortest[dwell] = min(stayed, default=dwell)
    assert shortest[0] < 3 <= shortest[3]


def test_copies_under_way_hold_further_ones_back_until_they_are_reported():
    policy = Policy.from_document({"prefetch": {"kind": "oracle", "distance": 1, "in_flight": 2}})
    assert not policy.timing_free
    trace = decode_trace(9, [[[0, 1, 2], [3, 4, 5]], [[0, 1, 2], [6, 7, 8]]])
    residency = policy.residency(trace, Slots((6, 9)), keep_log=True)
    plans = []
    for moment in drive(residency, trace):
        plans.append(moment.plan[moment.plan[:, 0] == PREFETCH, 2].tolist())
        if (moment.step, moment.layer) == (0, 0):
            residency.copied(1, 3, 10, 10)
    assert plans[1] == [3, 4], "the third one finds two under way"
    assert residency.input_log()[0].tolist() == [0, COPIED, 1, 3, 10, 10]


def test_absent_entries_are_no_misses():
    trace = trace_of(spec(1, 6, 2), [np.full((1, 1, 2), -1)])
    for miss in ("cpu", "split"):
        residency = Policy.from_document({"miss": {"kind": miss}}).residency(trace, Slots((3,)), keep_log=True)
        assert not len(log_of(residency, trace))
