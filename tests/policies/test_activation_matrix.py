"""Activation matrices as prefetches, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import decode_trace, drive
from moeflow.policies.activation_matrix import ActivationMatrixPrefetch
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots


def test_a_request_like_an_earlier_one_is_given_what_that_one_used_nearest_layer_first():
    """Requests 0 and 1 differ; 2 begins like 0. Of layer 2, request 0 used expert 3 twice and 4 once."""
    zero = [[[0], [1], [3]], [[0], [1], [3]], [[0], [1], [4]]]
    one = [[[5], [5], [5]]]
    two = [[[0], [1], [3]], [[0], [1], [3]]]
    trace = decode_trace(6, zero + one + two)
    trace = replace(trace, request=np.array([0, 0, 0, 1, 2, 2], np.int32))
    prefetch = ActivationMatrixPrefetch(distance=2, width=2)
    prefetch.start(trace.meta, None)
    policy, said, begun = Policy.load("lru"), {}, set()
    for moment in drive(policy.residency(trace, Slots((3, 3, 3))), trace):
        if moment.routed is None:
            continue
        request = int(moment.routed.requests[0])
        if request not in begun:
            for before in begun:
                if before == request - 1:
                    prefetch.request_ends(before)
            begun.add(request)
            prefetch.request_begins(request)
        said[moment.step, moment.layer] = [(t, e.tolist()) for t, e in prefetch.propose(moment.routed)]
    assert said[0, 0] == []  # nothing is known
    assert said[1, 0] == [(1, [1]), (2, [3])]  # a request predicts itself
    # priorities: expert 1 of layer 1: 1 * 2/3; 3 and 4 of layer 2: 2/3 * 1/3 and 1/3 * 1/3
    assert said[5, 0] == [(1, [1]), (2, [3, 4])]
    assert said[5, 1] == [(2, [3, 4])]
    assert said[5, 2] == []


@pytest.mark.parametrize("wrong", [{"distance": 0}, {"width": 0}, {"capacity": 0}])
def test_parameters_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        ActivationMatrixPrefetch(**wrong)
