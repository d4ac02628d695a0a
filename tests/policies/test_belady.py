"""Belady against exhaustive search over everything that the replay contract leaves to a policy."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from cases import decode_trace, drive, spec, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.residency import PREFETCH, Slots


def fewest_copies(events: list[dict[int, int]], capacity: int, bypass: bool) -> int:
    """Least copies of any victims (and, with bypass, any admissions) for one scope, cold start.

    `events` lists key -> tokens of each layer-step. What is needed and held stays until the layer is done; a victim
    goes only to make room; without bypass the first misses in demand order take slots.
    """

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(events):
            return 0
        tokens = events[at]
        missing = sorted(tokens.keys() - held, key=lambda key: (-tokens[key], key))
        evictable = held - tokens.keys()
        room = capacity - len(held) + len(evictable)
        numbers = range(min(room, len(missing)) + 1)
        admissions = [a for n in numbers for a in combinations(missing, n)] if bypass else [missing[: numbers[-1]]]
        rest = [
            best(at + 1, (held - set(victims)) | set(admitted))
            for admitted in admissions
            for victims in combinations(sorted(evictable), max(0, len(held) + len(admitted) - capacity))
        ]
        return len(missing) + min(rest)

    return best(0, frozenset())


def copies_of_belady(trace, slots: Slots, bypass: bool) -> int:
    scope = "global" if len(slots.per_scope) == 1 and len(trace.meta.model.moe_layers) > 1 else "layer"
    policy = Policy.from_document({"cache": {"evict": "belady", "bypass": bypass, "scope": scope}})
    return sum((moment.plan[:, 0] != PREFETCH).sum() for moment in drive(policy.residency(trace, slots), trace))


@st.composite
def batches(draw, layers: int, experts: int) -> np.ndarray:
    """[steps, tokens, layers, 2] ids; a choice of one expert names it twice, and counts twice."""
    shape = draw(st.tuples(st.integers(1, 8 // layers), st.integers(1, 2)))
    size = shape[0] * shape[1] * layers * 2
    ids = draw(st.lists(st.integers(0, experts - 1), min_size=size, max_size=size))
    return np.array(ids).reshape(*shape, layers, 2)


def events_of(ids: np.ndarray, experts: int) -> list[dict[int, int]]:
    """key -> tokens of every layer-step."""
    per_event = [layer * experts + step[:, layer].ravel() for step in ids for layer in range(ids.shape[2])]
    return [dict(zip(*(a.tolist() for a in np.unique(keys, return_counts=True)), strict=True)) for keys in per_event]


@pytest.mark.parametrize("layers, experts", [(1, 5), (2, 3)], ids=["one layer", "one pool for two layers"])
@given(data=st.data())
@settings(max_examples=150)
def test_with_bypass_nothing_copies_less(layers, experts, data):
    ids, capacity = data.draw(batches(layers, experts)), data.draw(st.integers(1, 4))
    found = copies_of_belady(trace_of(spec(layers, experts, 2), list(ids)), Slots((capacity,)), bypass=True)
    assert found == fewest_copies(events_of(ids, experts), capacity, bypass=True)


@pytest.mark.parametrize("layers, experts", [(1, 5), (2, 3)], ids=["one layer", "one pool for two layers"])
@given(data=st.data())
@settings(max_examples=150)
def test_with_forced_admission_nothing_copies_less_where_every_needed_set_fits(layers, experts, data):
    ids = data.draw(batches(layers, experts))
    events = events_of(ids, experts)
    capacity = max(map(len, events)) + data.draw(st.integers(0, 1))
    found = copies_of_belady(trace_of(spec(layers, experts, 2), list(ids)), Slots((capacity,)), bypass=False)
    assert found == fewest_copies(events, capacity, bypass=False)


def test_with_forced_admission_demand_order_can_beat_belady_where_a_needed_set_does_not_fit():
    """Who is admitted then depends on token counts, which no rule about next uses sees. The smallest case known."""
    ids = [[[[4, 2]]], [[[0, 0]]], [[[4, 4]], [[1, 2]]], [[[0, 1]]]]
    events = [{4: 1, 2: 1}, {0: 2}, {4: 2, 1: 1, 2: 1}, {0: 1, 1: 1}]
    trace = trace_of(spec(1, 5, 2), [np.array(step) for step in ids])
    assert (copies_of_belady(trace, Slots((2,)), bypass=False), fewest_copies(events, 2, bypass=False)) == (7, 6)


def test_of_two_experts_needed_next_at_the_same_time_the_one_needed_again_sooner_stays():
    """Both are needed at step 1, where one has to pass through scratch: it must not be 1, which step 2 needs."""
    trace = decode_trace(2, [[[0, 1]], [[0, 1]], [[1]]])
    assert copies_of_belady(trace, Slots((1,)), bypass=True) == 3


def test_exhaustive_search_on_a_case_done_by_hand():
    # one slot: 0 stays (its next use is nearer), 1 and 2 pass through, 0 is used again
    assert fewest_copies([{0: 1}, {1: 1}, {0: 1}, {2: 1}, {0: 1}], 1, bypass=True) == 3
    # every miss takes the slot, so nothing is ever found again
    assert fewest_copies([{0: 1}, {1: 1}, {0: 1}, {2: 1}, {0: 1}], 1, bypass=False) == 5


def test_bypass_keeps_what_is_needed_sooner():
    trace = decode_trace(3, [[[0]], [[1]], [[0]], [[2]], [[0]]])
    assert copies_of_belady(trace, Slots((1,)), bypass=True) == 3
    assert copies_of_belady(trace, Slots((1,)), bypass=False) == 5


def test_layer_steps_behind_the_last_need_ask_for_nothing():
    trace = decode_trace(3, [[[0], [1], [2], [0]], [[], [], [], []]])
    eviction = Policy.load("belady").residency(trace, Slots((1,) * 4)).eviction
    before = eviction.score.copy()
    nothing = np.zeros(0, np.int32)
    for event in range(4, 8):
        eviction.touch_step.function(event, event % 4, nothing, nothing, None, None, eviction.score, eviction.state)
    assert (eviction.score == before).all()
