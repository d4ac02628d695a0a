"""Batches in lockstep: every row once, each request's own passes in their order, groups one after the other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import decode_trace, traces
from hypothesis import given
from hypothesis import strategies as st
from moeflow.traces.lockstep import lockstep
from moeflow.traces.trace import Trace

from moeflow.errors import InputError


def passes(trace: Trace) -> dict[int, list[list[bytes]]]:
    """Per request its passes, each the rows' positions and routing."""
    found: dict[int, list[list[bytes]]] = {}
    for first, last in pairwise(trace.step_starts):
        for request in np.unique(trace.request[first:last]).tolist():
            rows = [r for r in range(first, last) if trace.request[r] == request]
            found.setdefault(request, []).append(
                [trace.position[r].tobytes() + trace.experts[r].tobytes() for r in rows]
            )
    return found


@given(trace=traces(), size=st.integers(1, 4))
def test_each_requests_passes_keep_their_rows_and_their_order(trace, size):
    batches = lockstep(trace, size)
    assert passes(batches) == passes(trace)
    assert (np.diff(batches.step) >= 0).all()
    for first, last in pairwise(batches.step_starts):
        assert len(np.unique(batches.request[first:last])) <= size


@given(trace=traces(), size=st.integers(1, 4))
def test_a_groups_requests_begin_together_and_leave_when_they_end(trace, size):
    batches = lockstep(trace, size)
    _, first = np.unique(trace.request, return_index=True)
    order = np.unique(trace.request)[np.argsort(first)].tolist()
    own = {request: len(found) for request, found in passes(trace).items()}
    expected = []
    for at in range(0, len(order), size):
        group = order[at : at + size]
        expected += [{r for r in group if own[r] > turn} for turn in range(max(own[r] for r in group))]
    assert [set(batches.request[a:b].tolist()) for a, b in pairwise(batches.step_starts)] == expected


def test_two_requests_by_hand():
    trace = decode_trace(8, [[[e]] for e in range(5)])
    trace = replace(trace, request=np.array([3, 3, 3, 1, 1], np.int32))
    batches = lockstep(trace, 2)
    assert batches.experts.ravel().tolist() == [0, 3, 1, 4, 2]
    assert batches.step.tolist() == [0, 0, 1, 1, 2]


def test_a_batch_of_none_is_refused():
    with pytest.raises(InputError, match="--batch 0: a batch has at least 1 request"):
        lockstep(decode_trace(2, [[[0]]]), 0)
