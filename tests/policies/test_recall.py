"""Recall, precision, exact sets and batch unions against sets in plain Python."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import numpy as np
import pytest
from cases import traces
from hypothesis import given, settings
from moeflow.policies.next_gate import NextGate
from moeflow.policies.predictor import Predictions
from moeflow.policies.recall import recall_table


def by_hand(predictions: Predictions, trace, distances) -> dict[str, float]:
    experts, k, layers = trace.meta.model.experts, trace.experts.shape[2], trace.experts.shape[1]
    needed_sum, right, proposed_sum = (dict.fromkeys(("k", "1.5k", "2k"), 0) for _ in range(3))
    sets = exact = union_needed = union_right = 0
    for i, distance in enumerate(predictions.distances):
        for column, moment in enumerate(predictions.moments):
            if distance not in distances or moment + distance >= layers:
                continue
            for first, last in pairwise(trace.step_starts):
                unions = [set(), set()]
                for row in range(first, last):
                    truth = {int(e) for e in trace.experts[row, moment + distance] if e < experts}
                    said = [int(e) for e in predictions.experts[row, column, i] if e < experts]
                    for name, width in (("k", k), ("1.5k", ceil(1.5 * k)), ("2k", 2 * k)):
                        # a place in the list counts even where an absent entry holds it
                        within = {int(e) for e in predictions.experts[row, column, i][:width] if e < experts}
                        needed_sum[name] += len(truth)
                        proposed_sum[name] += len(within)
                        right[name] += len(truth & within)
                    top = {e for e in said if e in set(predictions.experts[row, column, i][:k].tolist())}
                    sets, exact = sets + 1, exact + (top == truth)
                    unions[0] |= truth
                    unions[1] |= top
                union_needed += len(unions[0])
                union_right += len(unions[0] & unions[1])
    found = {f"recall@{n}": right[n] / max(1, needed_sum[n]) for n in right}
    found |= {f"precision@{n}": right[n] / max(1, proposed_sum[n]) for n in right}
    return found | {"exact_set": exact / max(1, sets), "union_recall@k": union_right / max(1, union_needed)}


@given(trace=traces(lookahead=True))
@settings(max_examples=40)
def test_every_figure_is_what_counting_sets_gives(trace):
    predictions = NextGate().predict(trace)
    table = recall_table(predictions, trace)
    if not table:
        return
    assert table["overall"] == pytest.approx(by_hand(predictions, trace, predictions.distances))
    for distance, figures in table["by_distance"].items():
        assert figures == pytest.approx(by_hand(predictions, trace, [int(distance)]))


def test_saying_what_will_be_needed_is_perfect():
    from cases import decode_trace

    trace = decode_trace(6, [[[0, 1], [2, 3]], [[4, 5], [0, 1]]])
    said = np.stack([trace.experts[:, 0], trace.experts[:, 1]], axis=1)[:, :, None]
    table = recall_table(Predictions((-1, 0), (1,), said, np.ones(said.shape, np.float16)), trace)
    assert set(table["overall"].values()) == {1.0}
