"""The two-level cache against two lists kept by hand."""

from __future__ import annotations

import numpy as np
from cases import Case, cases, decode_trace, drive, log_of, note_proposals
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots
from moeflow.policies.routed import Routed
from moeflow.policies.two_level import TwoLevel

EXAMPLES = 40


def fresh(layers: int = 3, experts: int = 6) -> TwoLevel:
    policy = TwoLevel()
    policy.start(decode_trace(experts, [[[0]] * layers]).meta, Slots((3,) * layers), None)
    return policy


def use(policy: TwoLevel, event: int, *needed: int) -> None:
    step, layer = divmod(event, len(policy.score))
    ids = np.array(needed, np.int32)
    ones, held = np.ones(len(ids), np.int32), np.zeros(len(ids), np.bool_)
    policy.touch(Routed(event, step, layer, ids[None], None, None, None, ids, ones, held, {}))


def order(policy: TwoLevel, layer: int) -> list[int]:
    """Experts of a layer, first victim first."""
    return np.argsort(policy.score[layer], kind="stable").tolist()


def test_low_goes_before_high_and_each_by_last_use():
    policy = fresh()
    for step, needed in enumerate([(5,), (4, 3), (2,)]):
        use(policy, 3 * step, *needed)
    assert order(policy, 0) == [0, 1, 5, 3, 4, 2]
    policy.proposed(7, [(0, np.array([0, 5]))])
    assert order(policy, 0) == [1, 3, 4, 2, 0, 5]


def test_a_wrong_prediction_falls_to_the_place_of_its_last_use():
    policy = fresh()
    use(policy, 0, 1)
    use(policy, 3, 2)
    policy.proposed(5, [(0, np.array([0, 1]))])
    use(policy, 6, 2)
    assert order(policy, 0) == [0, 3, 4, 5, 1, 2]


def test_a_new_proposal_replaces_the_older_one_for_its_layer_only():
    policy = fresh()
    policy.proposed(0, [(1, np.array([1])), (2, np.array([1]))])
    policy.proposed(1, [(2, np.array([3]))])
    assert order(policy, 1)[-1] == 1
    assert order(policy, 2)[-1] == 3
    assert order(policy, 2).index(1) == 1


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_without_prefetch_it_is_lru_within_a_layer(data):
    case = data.draw(cases("two-level", prefetch="none"))
    assume(case.policy.scope == "layer")
    lru = Policy.from_document({**case.policy.document, "cache": {"evict": "lru", "scope": "layer"}})
    expected = log_of(Case(case.trace, lru, case.slots).residency(), case.trace)
    np.testing.assert_array_equal(log_of(case.residency(), case.trace), expected)


@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_no_high_expert_is_evicted_while_a_low_one_could_be(data):
    """High: used when its layer was last routed, or proposed since, by the newest proposal for its layer."""
    case = data.draw(cases("two-level"))
    experts = case.trace.meta.model.experts
    residency = case.residency()
    proposals = note_proposals(residency)
    used: dict[int, set[int]] = {}
    hoped: dict[int, set[int]] = {}
    held: set[int] = set()
    for moment in drive(residency, case.trace):
        if moment.routed is not None:
            used[moment.layer], hoped[moment.layer] = set(moment.routed.needed.tolist()), set()
            high = {layer * experts + e for known in (used, hoped) for layer, ids in known.items() for e in ids}
            needed = {moment.layer * experts + e for e in used[moment.layer]}
            promised = {key for key in held if residency.guard.ravel()[key] & 2}
            for kind, layer, expert, _, victim in moment.plan.tolist():
                if kind == 0 and victim in high:
                    scope = {k for k in held if case.policy.scope == "global" or k // experts == layer}
                    assert not scope - high - needed - promised
                held.discard(victim)
                if kind != 1:
                    held.add(layer * experts + expert)
        else:
            for _, layer, expert, _, victim in moment.plan.tolist():
                held.discard(victim)
                held.add(layer * experts + expert)
        for layer, ids in proposals:
            hoped[layer] = set(ids.tolist())
        proposals.clear()
