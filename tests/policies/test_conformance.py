"""What must hold for every policy in policies/, whichever they are: files are discovered, not listed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from cases import (
    EVENT,
    EVICTIONS,
    EXPERT,
    KIND,
    LAYER,
    PREFETCHES,
    SLOT,
    VICTIM,
    Case,
    cases,
    decode_trace,
    drive,
    log_of,
    note_proposals,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies import residency as residency_module
from moeflow.policies.policy import Policy
from moeflow.policies.residency import DEMAND, PREFETCH, STREAM, Residency, Slots
from moeflow.traces.trace import Trace

EXAMPLES = 20


def scope_of(case: Case, layer: int) -> int:
    return layer if len(case.slots.per_scope) > 1 else 0


def held_in(held: dict[int, int], case: Case, scope: int) -> set[int]:
    """Keys of a scope in a held map (slot -> key)."""
    return {key for key in held.values() if scope_of(case, key // case.trace.meta.model.experts) == scope}


class Ledger:
    """Who is held, where and protected by whom, rebuilt from the decision log alone."""

    def __init__(self, case: Case) -> None:
        self.case, self.experts = case, case.trace.meta.model.experts
        self.held: dict[int, int] = {}  # slot -> key
        self.promised: set[int] = set()  # prefetched, target not yet routed

    def apply(self, row: np.ndarray) -> None:
        kind, layer, expert, slot, victim = (int(row[c]) for c in (KIND, LAYER, EXPERT, SLOT, VICTIM))
        key = layer * self.experts + expert
        if kind == STREAM:
            assert self.case.slots.held <= slot < self.case.slots.total, "a stream passes through a scratch slot"
            assert victim == -1
            return
        first = sum(self.case.slots.per_scope[: scope_of(self.case, layer)])
        assert first <= slot < first + self.case.slots.per_scope[scope_of(self.case, layer)], "slot of another scope"
        assert key not in self.held.values(), "planned while held"
        assert self.held.get(slot, -1) == victim, "the victim is whoever held the slot"
        self.held[slot] = key
        if kind == PREFETCH:
            self.promised.add(key)


def rows_of(residency: Residency, before: int) -> np.ndarray:
    return residency.decision_log()[before:]


def test_every_file_of_the_folder_is_covered():
    assert {"lru", "lfu", "fifo", "static", "belady", "lfu-aged"} <= EVICTIONS.keys()
    assert {"lookahead", "oracle"} <= PREFETCHES.keys()
    assert not EVICTIONS.keys() & {"eviction", "prefetch", "residency"}


@pytest.mark.parametrize("evict", EVICTIONS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_log_and_state_agree_and_nothing_protected_is_evicted(evict, data):
    case = data.draw(cases(evict))
    residency = case.residency()
    ledger, experts = Ledger(case), case.trace.meta.model.experts
    seen = 0
    for moment in drive(residency, case.trace):
        needed: set[int] = set()
        if moment.routed is not None:
            needed = {moment.layer * experts + int(e) for e in moment.routed.needed}
            ledger.promised -= set(range(moment.layer * experts, (moment.layer + 1) * experts))
            was_held = [moment.layer * experts + int(e) in ledger.held.values() for e in moment.routed.needed]
            assert moment.routed.held.tolist() == was_held
        protected = needed & set(ledger.held.values())
        for row in rows_of(residency, seen):
            assert row[VICTIM] not in protected | ledger.promised
            assert row[EVENT] == moment.step * residency.layers + moment.layer
            ledger.apply(row)
            if row[KIND] == DEMAND:
                protected.add(row[LAYER] * experts + row[EXPERT])
        seen = len(residency.decision_log())
        of_slots = np.full(residency.slot_of.size, -1)
        of_slots[list(ledger.held.values())] = list(ledger.held)
        np.testing.assert_array_equal(residency.slot_of.ravel(), of_slots)


@pytest.mark.parametrize("evict", EVICTIONS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_every_miss_is_planned_once_in_demand_order(evict, data):
    case = data.draw(cases(evict))
    residency = case.residency()
    for moment in drive(residency, case.trace):
        own = moment.plan[moment.plan[:, 0] != PREFETCH]
        if moment.routed is None:
            assert not len(own)
            continue
        tokens = dict(zip(moment.routed.needed.tolist(), moment.routed.tokens.tolist(), strict=True))
        missing = sorted(moment.routed.needed[~moment.routed.held].tolist(), key=lambda e: (-tokens[e], e))
        planned = {kind: own[own[:, 0] == kind, 2].tolist() for kind in (DEMAND, STREAM)}
        assert own[:, 0].tolist() == [DEMAND] * len(planned[DEMAND]) + [STREAM] * len(planned[STREAM])
        assert (own[:, 1] == moment.layer).all()
        assert sorted(planned[DEMAND] + planned[STREAM]) == sorted(missing)
        for experts in planned.values():
            assert experts == [e for e in missing if e in set(experts)]
        if not residency.eviction.bypass:
            assert planned[DEMAND] + planned[STREAM] == missing


@pytest.mark.parametrize("evict", EVICTIONS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_tokens_are_counted_per_expert_and_absent_entries_skipped(evict, data):
    case = data.draw(cases(evict, prefetch="none"))
    starts, experts = case.trace.step_starts, case.trace.meta.model.experts
    for moment in drive(case.residency(), case.trace):
        if moment.routed is None:
            continue
        ids = case.trace.experts[starts[moment.step] : starts[moment.step + 1], moment.layer]
        expected = Counter(int(e) for e in ids.ravel() if e < experts)
        counted = dict(zip(moment.routed.needed.tolist(), moment.routed.tokens.tolist(), strict=True))
        assert counted == expected
        assert moment.routed.needed.tolist() == sorted(expected)


@pytest.mark.parametrize("evict", EVICTIONS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_a_miss_is_streamed_only_when_no_slot_can_be_had(evict, data):
    """With bypass also when it is worth no more than any expert that could make room."""
    case = data.draw(cases(evict))
    residency = case.residency()
    experts, proposed = case.trace.meta.model.experts, note_proposals(residency)
    hoped: set[int] = set()  # whatever was proposed for a layer to come may be protected
    for moment in drive(residency, case.trace):
        if moment.routed is not None:
            hoped -= set(range(moment.layer * experts, (moment.layer + 1) * experts))
            needed = {moment.layer * experts + int(e) for e in moment.routed.needed}
            streams = moment.plan[moment.plan[:, 0] == STREAM]
            if len(streams):
                scope = scope_of(case, moment.layer)
                in_scope = set(np.flatnonzero(residency.slot_of >= 0).tolist())  # undo the prefetches, last first
                for kind, layer, expert, _, victim in moment.plan[::-1].tolist():
                    if kind == PREFETCH:
                        in_scope = in_scope - {layer * experts + expert} | ({victim} - {-1})
                in_scope = {key for key in in_scope if scope_of(case, key // experts) == scope}
                assert len(in_scope) == case.slots.per_scope[scope], "streamed although a slot was free"
                evictable = [divmod(int(key), experts) for key in in_scope - needed - hoped]
                score = residency.eviction.score
                dearest = max(score[moment.layer, streams[:, 2]])
                assert not evictable or (residency.eviction.bypass and min(score[key] for key in evictable) >= dearest)
        hoped |= {target * experts + int(e) for target, wanted in proposed for e in wanted}
        proposed.clear()


@pytest.mark.parametrize("prefetch", PREFETCHES)
@given(data=st.data())
@settings(max_examples=2 * EXAMPLES)
def test_prefetch_leaves_top_k_slots_free_or_evictable(prefetch, data):
    case = data.draw(cases(prefetch=prefetch))
    residency = case.residency()
    ledger, experts = Ledger(case), case.trace.meta.model.experts
    seen = 0
    for moment in drive(residency, case.trace):
        needed: set[int] = set()
        if moment.routed is not None:
            needed = {moment.layer * experts + int(e) for e in moment.routed.needed}
            ledger.promised -= set(range(moment.layer * experts, (moment.layer + 1) * experts))
        for row in rows_of(residency, seen):
            ledger.apply(row)
            if row[KIND] == PREFETCH:
                scope = scope_of(case, int(row[LAYER]))
                surely_protected = held_in(ledger.held, case, scope) & (needed | ledger.promised)
                assert case.slots.per_scope[scope] - len(surely_protected) >= residency.top_k
        seen = len(residency.decision_log())


FORMS = {
    "int64": lambda ids: ids.astype(np.int64),
    "int32": lambda ids: ids.astype(np.int32),
    "not contiguous": lambda ids: np.repeat(ids, 2, axis=1)[:, ::2],
    "column-major": np.asfortranarray,
}


@pytest.mark.parametrize("evict", EVICTIONS)
@given(data=st.data())
@settings(max_examples=EXAMPLES // 2)
def test_the_form_of_the_ids_does_not_matter(evict, data):
    case = data.draw(cases(evict))
    log = log_of(case.residency(), case.trace)
    for form in FORMS.values():
        np.testing.assert_array_equal(log_of(case.residency(), case.trace, form), log)


@pytest.mark.parametrize("evict, prefetch", [*((e, "none") for e in EVICTIONS), *(("lru", p) for p in PREFETCHES)])
def test_ids_may_come_as_lists_per_row(evict, prefetch):
    rng = np.random.default_rng(0)
    sets = [[rng.permutation(6)[:2].tolist() for _ in range(3)] for _ in range(20)]
    trace = decode_trace(6, sets)
    columns = {
        "weights": np.tile(np.array([0.6, 0.4], np.float16), (20, 3, 1)),
        "probs": rng.random((20, 3, 6)).astype(np.float16),
        "lookahead": np.repeat(trace.experts[:, :1], 4, axis=1)[:, :, None],
    }
    trace = replace(trace, meta=replace(trace.meta, lookahead_distances=(1,)), **columns)
    document = {"cache": {"evict": evict}, "prefetch": {"kind": prefetch}, "predict": {"kind": "next-gate"}}
    policy = Policy.from_document(document)
    case = Case(trace, policy, Slots((3, 3, 3), 2))
    log = log_of(case.residency(), trace)
    assert len(log)
    np.testing.assert_array_equal(log_of(case.residency(), trace, lambda ids: ids.tolist()), log)


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_two_runs_decide_the_same_and_the_digest_covers_every_decision(data):
    case = data.draw(cases())
    first, second = case.residency(), case.residency()
    np.testing.assert_array_equal(log_of(first, case.trace), log_of(second, case.trace))
    assert first.decision_log_sha256 == second.decision_log_sha256
    nothing = case.residency().decision_log_sha256
    assert (first.decision_log_sha256 == nothing) == (len(first.decision_log()) == 0)


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_plain_python_decides_as_the_compiled_functions_do(data):
    case = data.draw(cases())
    compiled = {name: f for name, f in vars(residency_module).items() if hasattr(f, "py_func")}
    if not compiled:
        pytest.skip("numba is not installed: there is only one of them")
    log = log_of(case.residency(), case.trace)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in compiled.items():
            patch.setattr(residency_module, name, function.py_func)
        np.testing.assert_array_equal(log_of(case.residency(), case.trace), log)


def test_planning_or_ending_a_layer_that_was_not_routed_is_an_error():
    case = Case(*_smallest())
    residency = case.residency()
    residency.step_begins(0)
    with pytest.raises(ValueError, match="has not been routed"):
        residency.fetch_plan(0)
    with pytest.raises(ValueError, match="has not been routed"):
        residency.layer_done(0)


@pytest.mark.parametrize("per_scope, scratch", [((0, 1), 1), ((1, 1), 0), ((1, 1, 1), 1)])
def test_impossible_slots_are_refused(per_scope, scratch):
    trace, policy, _ = _smallest()
    with pytest.raises(ValueError, match="slot"):
        policy.residency(trace, Slots(per_scope, scratch))


def _smallest() -> tuple[Trace, Policy, Slots]:
    return decode_trace(2, [[[0], [1]]]), Policy.from_document({}), Slots((1, 1), 1)
