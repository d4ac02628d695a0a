"""The predictive cache: the paper's worked example, its order of victims, and the queue of what found no slot."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from cases import cases, decode_trace, drive
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.execution_order import ExecutionOrder
from moeflow.policies.plec import PLEC
from moeflow.policies.policy import Policy
from moeflow.policies.predictor import Predictions
from moeflow.policies.residency import DEMAND, PREFETCH, Residency, Slots

DOCUMENT = {
    "cache": {"evict": "plec", "scope": "global"},
    "prefetch": {"kind": "execution-order"},
    "predict": {"kind": "next-gate"},
}


def path(*layers: list[int], width: int = 3, experts: int = 4) -> Predictions:
    """One token's path, said at step start, every expert with probability 1."""
    ids = np.full((1, 1, len(layers), width), 255, np.uint8)
    for layer, wanted in enumerate(layers):
        ids[0, 0, layer, : len(wanted)] = wanted
    return Predictions((-1,), tuple(range(1, len(layers) + 1)), ids, (ids < experts).astype(np.float16))


def run(trace, said: Predictions, slots: int, top_k: int) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """(layer, planned (kind, layer, expert)) of every plan of a step; the same is said of every step."""
    eviction, prefetch = PLEC(), ExecutionOrder(width=3)
    meta = trace.meta
    eviction.start(meta, Slots((slots,)), None)
    prefetch.start(meta, None)
    model = meta.model
    residency = Residency(len(model.moe_layers), model.experts, top_k, Slots((slots,)), eviction, prefetch)
    for step in range(trace.rows):
        residency.step_begins(step, predicted=said.at(-1, slice(0, 1)))
        yield -1, [tuple(row[:3]) for row in residency.fetch_plan(-1).tolist()]
        for layer in range(residency.layers):
            residency.routed(layer, trace.experts[step : step + 1, layer], predicted=None)
            yield layer, [tuple(row[:3]) for row in residency.fetch_plan(layer).tolist()]
            residency.layer_done(layer)


def test_the_papers_example():
    """2 layers x 4 experts, demand 3:2, 4 slots: e12, e13, e14 and e22 are loaded, e23 when layer 1 has ended.

    A residency keeps top-k (here 1) slots free of predictions, hence 5; it plans at gates, hence a layer that needs
    nothing in between, at whose gate the first layer has ended.
    """
    trace = decode_trace(4, [[[1, 2, 3], [], [1, 2]]], top_k=3)
    plans = list(run(trace, path([1, 2, 3], [], [1, 2]), slots=5, top_k=1))
    assert plans == [
        (-1, [(PREFETCH, 0, 1), (PREFETCH, 0, 2), (PREFETCH, 0, 3), (PREFETCH, 2, 1)]),
        (0, []),
        (1, [(PREFETCH, 2, 2)]),
        (2, []),
    ]


def test_what_was_predicted_in_vain_is_the_first_victim():
    """Layer 0 was to need 1 and needs 2: 1 gives way although layer 1's long unused 3 is older."""
    trace = decode_trace(4, [[[2], [3]], [[2], [3]], [[2], [0]]], top_k=1)
    eviction = PLEC()
    eviction.start(trace.meta, Slots((3,)), None)
    residency = Residency(2, 4, 1, Slots((3,)), eviction, ExecutionOrder())
    residency.prefetch.start(trace.meta, None)
    victims = []
    for step in range(3):
        said = path([1], [3] if step < 2 else [], width=1).at(-1, slice(0, 1))
        residency.step_begins(step, predicted=said)
        residency.fetch_plan(-1)
        for layer in range(2):
            residency.routed(layer, trace.experts[step : step + 1, layer])
            plan = residency.fetch_plan(layer)
            victims += plan[plan[:, 0] == DEMAND, 4].tolist()
            residency.layer_done(layer)
    assert victims[-1] == 1, "key 1 is layer 0's expert 1"


@given(data=st.data())
@settings(max_examples=40)
def test_a_prefetch_never_displaces_what_is_predicted_for_a_layer_to_come(data):
    case = data.draw(cases("plec", "execution-order"))
    residency = case.residency()
    experts, top_k = residency.experts, residency.top_k
    hoped: dict[int, set[int]] = {}  # by layer: keys predicted for it
    for moment in drive(residency, case.trace):
        rows = case.trace.step_starts[moment.step : moment.step + 2]
        if moment.routed is None:
            hoped.clear()
        hoped.pop(moment.layer, None)
        for i, distance in enumerate(case.trace.meta.lookahead_distances):
            target = moment.layer + distance
            if target < residency.layers:
                said = case.trace.lookahead[rows[0] : rows[1], moment.layer + 1, i, :top_k].ravel()
                chance = case.trace.lookahead_weights[rows[0] : rows[1], moment.layer + 1, i, :top_k].ravel()
                hoped[target] = {target * experts + int(e) for e in said[(said < experts) & (chance > 0)]}
        prefetched = moment.plan[moment.plan[:, 0] == PREFETCH]
        assert not set(prefetched[:, 4].tolist()) & set().union(*hoped.values())


def test_execution_order_proposes_the_nearest_layer_first_and_the_most_expected_expert_first():
    trace = decode_trace(4, [[[0], [0], [0]]], top_k=2)
    ids = np.array([[[[0, 1], [2, 3], [1, 0]]], [[[1, 2], [2, 0], [3, 1]]]], np.uint8)
    said = Predictions((-1,), (1, 2, 3), ids, np.full(ids.shape, 0.5, np.float16))
    prefetch = Policy.from_document(DOCUMENT).prefetch()
    prefetch.start(trace.meta, None)
    proposals = prefetch._queue(-1, said.at(-1, slice(0, 2)))
    assert [(layer, experts.tolist()) for layer, experts in proposals] == [
        (0, [1, 0, 2]),
        (1, [2, 0, 3]),
        (2, [1, 0, 3]),
    ]
    assert [layer for layer, _ in prefetch._queue(0, None)] == [1, 2], "the queue is what has not run"
    few = ExecutionOrder(width=1, least=0.5, reach=2)
    few.start(trace.meta, None)
    assert [(layer, e.tolist()) for layer, e in few._queue(-1, said.at(-1, slice(0, 2)))] == [(0, []), (1, [2])]
