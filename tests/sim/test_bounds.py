"""The clairvoyant bound against brute force, and the rules by which a run is cut into windows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from cases import cases, decode_trace, log_of, spec, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.fewest_copies import fewest_copies
from moeflow.policies.future import Future
from moeflow.sim.batches import recorded_steps
from moeflow.sim.bounds import _new_request_arrives, _windows, clairvoyant
from moeflow.traces.trace import Request


def optimum(events: list[set[int]], slots: int, cold: bool) -> int:
    """Least copies when anything held or needed may be kept after an event; a start that is not cold helps most."""

    @cache
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(events):
            return 0
        present = held | events[at]
        keeping = combinations(sorted(present), min(slots, len(present)))
        return len(events[at] - held) + min(best(at + 1, frozenset(kept)) for kept in keeping)

    everything = sorted(set().union(*events))
    starts = [()] if cold else combinations(everything, min(slots, len(everything)))
    return min(best(0, frozenset(start)) for start in starts)


def fewest(trace, window_of, slots: int) -> list[int]:
    future = Future(trace)
    uses = future.uses()
    keys = future.layers * future.experts
    steps = uses[:, 0] // future.layers
    return fewest_copies(steps, uses[:, 0], uses[:, 1], np.array(window_of), keys, slots).tolist()


@st.composite
def routed(draw):
    """[steps, 1, layers, 2] ids and as many experts."""
    layers, experts = draw(st.sampled_from(((1, 5), (2, 3))))
    steps = draw(st.integers(1, 8 // layers))
    size = steps * layers * 2
    ids = draw(st.lists(st.integers(0, experts - 1), min_size=size, max_size=size))
    return np.array(ids).reshape(steps, 1, layers, 2), experts


def events_of(ids: np.ndarray, experts: int) -> list[set[int]]:
    return [set((layer * experts + step[0, layer]).tolist()) for step in ids for layer in range(ids.shape[2])]


@given(routed(), st.integers(1, 4), st.data())
@settings(max_examples=200)
def test_thefewest_copies_are_the_optimum_of_every_window(case, slots, data):
    ids, experts = case
    layers = ids.shape[2]
    trace = trace_of(spec(layers, experts, 2), list(ids))
    cut = data.draw(st.integers(0, len(ids)))  # steps before it are one window, those after it another
    gap = data.draw(st.integers(0, len(ids) - cut))  # or not counted
    window_of = [0] * cut + [-1] * gap + [int(cut > 0)] * (len(ids) - cut - gap)
    events = events_of(ids, experts)
    first, second = events[: cut * layers], events[(cut + gap) * layers :]
    expected = [optimum(first, slots, cold=True)] if first else []
    expected += [optimum(second, slots, cold=cut + gap == 0)] if second else []
    assert fewest(trace, window_of, slots) == expected


def test_thefewest_copies_by_hand():
    trace = decode_trace(3, [[[0]], [[1]], [[0]], [[2]], [[1]], [[0]]])
    assert fewest(trace, [0] * 6, slots=1) == [4]  # 0 stays
    assert fewest(trace, [0] * 6, slots=2) == [3]  # and 1 too
    assert fewest(trace, [-1, 0, 0, 0, 1, 1], slots=1) == [2, 1]  # one of three is there, one of two


@given(data=st.data())
@settings(max_examples=150)
def test_no_policy_copies_less(data):
    case = data.draw(cases())
    least = fewest(case.trace, [0] * (len(case.trace.step_starts) - 1), case.slots.held)
    assert len(log_of(case.residency(), case.trace)) >= sum(least)


@pytest.mark.parametrize(
    "counted, breaks, length, windows",
    [
        ("1111", "0000", 4, [0, 0, 0, 0]),
        ("1111", "0000", 2, [0, 0, 1, 1]),
        ("11111", "00000", 2, [0, 0, 1, 1, 2]),
        ("0110", "0000", 4, [-1, 0, 0, -1]),
        ("1011", "0000", 4, [0, -1, 1, 1]),
        ("1111", "0010", 4, [0, 0, 1, 1]),
        ("1101", "0010", 4, [0, 0, -1, 1]),
        ("0000", "1111", 4, [-1, -1, -1, -1]),
    ],
)
def test_windows_are_contiguous_counted_and_cut_at_arrivals(counted, breaks, length, windows):
    flags = [np.array([c == "1" for c in text]) for text in (counted, breaks)]
    assert _windows(*flags, length).tolist() == windows


@pytest.mark.parametrize("arrival_s, breaks", [(None, [False, False, False]), (0.0, [True, False, True])])
def test_a_run_is_cut_where_a_request_with_an_arrival_time_begins(arrival_s, breaks):
    trace = decode_trace(2, [[[0]], [[1]], [[0]]])
    meta = replace(trace.meta, requests=(Request(0, arrival_s=arrival_s), Request(4, arrival_s=arrival_s)))
    trace = replace(trace, meta=meta, request=np.array([0, 0, 4], np.int32))
    assert _new_request_arrives(trace, recorded_steps(trace)).tolist() == breaks


def bound(resident_ps: list[int], copy_ps: int, slots: int = 1, tokens: int = 1):
    """Steps need experts 0 1 0 1 ..., each alone, on every one of `tokens` tokens."""
    ids = [np.full((tokens, 1, 1), step % 2) for step in range(len(resident_ps))]
    trace = trace_of(spec(1, 2), ids)
    steps = recorded_steps(trace)
    counted = np.ones(len(steps), bool)
    return clairvoyant(trace, Future(trace), steps, counted, np.array(resident_ps), slots, copy_ps)


def test_link_time_bounds_where_it_exceeds_compute():
    assert bound([10, 10, 10, 10], copy_ps=100).token_time_ps == 300  # one slot: 0 stays, 1 is copied twice
    assert bound([10, 10, 10, 10], copy_ps=100, slots=2).token_time_ps == 200


def test_compute_bounds_where_it_exceeds_link_time():
    assert bound([500, 500, 500, 500], copy_ps=100).token_time_ps == 2000


def test_a_steps_time_counts_once_for_each_of_its_tokens():
    assert bound([500, 500], copy_ps=1, tokens=3).token_time_ps == 3000
    assert bound([1, 1], copy_ps=100, tokens=3).token_time_ps == 600


def test_shorter_windows_are_used_where_they_prove_more():
    """40 steps that compute, then 40 that wait for the link: together neither would show."""
    sets = [[[0]]] * 48 + [[[step % 2]] for step in range(48)]
    trace = decode_trace(2, sets)
    steps = recorded_steps(trace)
    resident = np.array([1000] * 48 + [10] * 48)
    found = clairvoyant(trace, Future(trace), steps, np.ones(96, bool), resident, 1, 500)
    # three windows of 16 that compute 16,000 each; three in which 0 stays and 1 is copied 8 times
    assert found.token_time_ps == 48_000 + 3 * 8 * 500
    assert found.copies.tolist() == [1, 0, 0, 8, 8, 8]


def test_the_least_wait_is_what_the_link_needs_beyond_everything_else():
    found = bound([10, 10, 10, 10], copy_ps=100)
    duration, wait = np.array([200, 200, 200, 200]), np.array([150, 150, 150, 150])
    assert found.wait_ps(duration, wait) == 300 - 4 * 50
    assert found.wait_ps(duration, wait - 100) == 0
