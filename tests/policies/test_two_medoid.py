"""The token scheduler: the split itself, what it may never do, and its bookkeeping."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from cases import decode_trace, traces
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from moeflow.policies.policy import Policy
from moeflow.policies.predictor import Predictions
from moeflow.policies.two_medoid import TwoMedoid, better_split, optimal_split, two_medoid, union_cost
from moeflow.traces.lockstep import lockstep
from moeflow.traces.trace import DECODE, Trace

from moeflow.errors import InputError

PATHS = st.tuples(st.integers(2, 9), st.integers(1, 12)).flatmap(lambda shape: arrays(np.bool_, shape))


def recorded(trace: Trace) -> Predictions:
    """The recorded routing as if it had been predicted at step start."""
    ids = trace.experts[:, None]
    return Predictions((-1,), tuple(range(1, ids.shape[2] + 1)), ids, np.ones(ids.shape, np.float16))


@given(paths=PATHS, rounds=st.integers(0, 30))
def test_halves_differ_by_at_most_one(paths, rounds):
    labels = two_medoid(paths, rounds)
    assert set(labels.tolist()) <= {0, 1}
    assert abs(int((labels == 0).sum()) - int((labels == 1).sum())) <= 1


@given(paths=PATHS, data=st.data())
def test_never_worse_than_before_never_better_than_the_optimum(paths, data):
    before = np.array(data.draw(st.permutations([i % 2 for i in range(len(paths))])))
    after = better_split(paths, before)
    assert union_cost(paths, optimal_split(paths)) <= union_cost(paths, after) <= union_cost(paths, before)


def test_two_kinds_of_tokens_are_told_apart_whatever_their_order():
    rng = np.random.default_rng(0)
    kinds = np.zeros((2, 40), np.bool_)
    kinds[0, :10] = kinds[1, 20:30] = True
    for _ in range(20):
        kind = rng.permutation([0, 1] * 5)
        paths = kinds[kind].copy()
        paths[np.arange(10), rng.integers(0, 40, 10)] ^= True
        labels = better_split(paths, np.arange(10) % 2)
        assert len(set(zip(kind.tolist(), labels.tolist(), strict=True))) == 2
        assert union_cost(paths, labels) == union_cost(paths, optimal_split(paths))


def test_the_optimum_of_recorded_like_paths_is_near():
    """Paths that repeat a few experts, as routers do; the bound is loose."""
    rng = np.random.default_rng(1)
    gaps = []
    for _ in range(20):
        scores = rng.gumbel(size=(8, 4, 16)) + 2 * rng.gumbel(size=(3, 4, 16))[rng.integers(0, 3, 8)]
        paths = (scores >= np.sort(scores, axis=2)[:, :, -3, None]).reshape(8, -1)
        best = union_cost(paths, optimal_split(paths))
        gaps.append(union_cost(paths, better_split(paths, np.arange(8) // 4)) / best - 1)
    assert np.mean(gaps) < 0.05


@given(trace=traces(), size=st.integers(2, 3), rounds=st.sampled_from((0, 30)))
@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])  # most have too few requests for pairs
def test_every_row_once_each_requests_passes_in_order_and_never_torn(trace, size, rounds):
    batches = lockstep(trace, size)
    regrouped = TwoMedoid(rounds).regroup(batches, recorded(batches))
    assume(regrouped is not None)
    assert sorted(regrouped.order.tolist()) == list(range(trace.rows))
    after = regrouped.trace(batches)
    for request in np.unique(trace.request):
        own = regrouped.order[after.request == request]
        assert (np.diff(own) > 0).all()
        steps = [batches.step[own], after.step[after.request == request]]
        torn, whole = (np.diff(step) != 0 for step in steps)
        np.testing.assert_array_equal(torn, whole)
    np.testing.assert_array_equal(after.experts, batches.experts[regrouped.order])
    moved = regrouped.predictions(recorded(batches))
    np.testing.assert_array_equal(moved.experts[:, 0], after.experts)
    assert len(regrouped.seconds) == len(after.step_starts) - 1
    assert (rounds > 0) or not regrouped.seconds.any()


def test_what_is_decided_about_a_pair_uses_nothing_of_later_ones():
    trace, said = four_requests()
    whole = TwoMedoid().regroup(trace, said)
    kept = np.flatnonzero(trace.position < 13)  # the first three steps of both groups
    cut = trace.reordered(kept, trace.step[kept])
    part = TwoMedoid().regroup(cut, recorded(cut))
    first = whole.order[: len(kept)]
    np.testing.assert_array_equal(kept[part.order], first)


def four_requests() -> tuple[Trace, Predictions]:
    """Two pairs of requests in lockstep, 6 steps each; the 1st is like the 4th, the 2nd like the 3rd."""
    kind = [0, 1, 1, 0]
    sets = [[[4 * kind[r] + e for e in (0, 1 + t % 3)]] for r in range(4) for t in range(6)]
    trace = decode_trace(8, sets)
    rows = np.arange(24)
    columns = {"request": (rows // 6).astype(np.int32), "position": (rows % 6 + 10).astype(np.int32)}
    trace = lockstep(replace(trace, **columns), 2)
    return trace, recorded(trace)


def test_alike_requests_come_together_and_what_moves_is_counted():
    trace, said = four_requests()
    regrouped = TwoMedoid().regroup(trace, said)
    after = regrouped.trace(trace)
    together = [sorted(after.request[a:b].tolist()) for a, b in pairwise(after.step_starts)]
    assert together == [[0, 3], [1, 2]] * 6 or together == [[1, 2], [0, 3]] * 6
    assert regrouped.moved.tolist() == [2] + [0] * 11
    assert regrouped.moved_tokens.tolist() == [20] + [0] * 11
    assert regrouped.copied_tokens.tolist() == regrouped.moved_tokens.tolist()
    assert np.count_nonzero(regrouped.seconds) == 6
    assert regrouped.seconds[0] == TwoMedoid.seconds(4, 8)
    assert not TwoMedoid(merge="reindex").regroup(trace, said).copied_tokens.any()


def test_without_rounds_groups_alternate_as_they_are():
    trace, said = four_requests()
    after = TwoMedoid(0).regroup(trace, said).trace(trace)
    assert [after.request[a:b].tolist() for a, b in pairwise(after.step_starts)] == [[0, 1], [2, 3]] * 6


def test_single_requests_are_left_alone():
    trace, _ = four_requests()
    alone = lockstep(trace, 1)
    assert (alone.phase == DECODE).all()
    assert TwoMedoid().regroup(alone, recorded(alone)) is None


@pytest.mark.parametrize("wrong", [{"rounds": -1}, {"merge": "swap"}])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Policy.from_document({"schedule": {"kind": "two-medoid", **wrong}, "predict": {"kind": "next-gate"}})


def test_it_needs_a_predictor():
    with pytest.raises(InputError, match=r"predict\.kind: TwoMedoid reads predictions"):
        Policy.from_document({"schedule": {"kind": "two-medoid"}})
