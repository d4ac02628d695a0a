"""Expert maps against a slow search, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import decode_trace, drive, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies import expert_map
from moeflow.policies.expert_map import ExpertMapPrefetch, MapStore
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots
from moeflow.policies.routed import Routed
from moeflow.sim.run import simulate
from moeflow.traces.bundled import BUNDLED_TRACE, PRICED_AS
from moeflow.traces.reader import load_trace
from moeflow.traces.trace import Trace


class SlowStore:
    """The same store, one cosine at a time over whole trajectories in double precision."""

    def __init__(self, layers: int, experts: int, capacity: int) -> None:
        self.shape, self.capacity = (layers, experts), capacity
        self.maps: list[np.ndarray] = []
        self.running: dict[int, np.ndarray] = {}
        self.step = -1

    def see(self, routed: Routed) -> dict[int, list[float]]:
        """Per request the cosine with every stored map."""
        if routed.step != self.step:
            for _, whole in sorted(self.running.items()):
                self.store(whole)
            self.step = routed.step
            self.running = {r: np.zeros(self.shape) for r in set(routed.requests.tolist())}
        for row, request in enumerate(routed.requests.tolist()):
            gates = np.zeros(self.shape[1])
            if "probs" in routed.columns:
                gates += routed.columns["probs"][row].astype(np.float64)
            else:
                for i, expert in enumerate(routed.ids[row].tolist()):
                    if expert < self.shape[1]:
                        gates[expert] += 1 if routed.weights is None else float(routed.weights[row, i])
            self.running[request][routed.layer] += gates / max(gates.sum(), 1e-6)
        for whole in self.running.values():
            whole[routed.layer] /= whole[routed.layer].sum() or 1
        upto = routed.layer + 1
        return {r: [cosine(w[:upto], m[:upto]) for m in self.maps] for r, w in sorted(self.running.items())}

    def store(self, whole: np.ndarray) -> None:
        if len(self.maps) < self.capacity:
            self.maps.append(whole)
        else:
            self.maps[int(np.argmax([cosine(whole, m) for m in self.maps]))] = whole


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt(max((a * a).sum() * (b * b).sum(), 1e-12)))


@settings(max_examples=60)
@given(data=st.data())
def test_the_nearest_map_is_the_one_a_slow_search_finds(data):
    """To single precision; with a full store too as long as what is replaced is no tie."""
    trace: Trace = data.draw(traces())
    model = trace.meta.model
    columns = data.draw(st.sampled_from(("ids", "weights", "probs")))
    store, slow = MapStore(50), SlowStore(len(model.moe_layers), model.experts, 50)
    store.start(trace.meta)
    for moment in drive(Policy.load("lru").residency(trace, Slots((1,) * len(model.moe_layers))), trace):
        routed = moment.routed
        if routed is None:
            continue
        routed.columns = routed.columns if columns == "probs" else {}
        routed.weights = routed.weights if columns == "weights" else None
        found, cosines = store.match(routed), slow.see(routed)
        assert len(found) == len(cosines)
        for number, similarity, of_all in zip(found, store.similarity, cosines.values(), strict=True):
            assert (number < 0) == (not of_all)
            if of_all:
                assert of_all[number] == pytest.approx(max(of_all), abs=1e-4)
                assert similarity == pytest.approx(max(of_all), abs=1e-4)
                np.testing.assert_allclose(store.layer_of(int(number), 0), slow.maps[number][0], atol=1e-4)


def test_a_full_store_replaces_the_map_most_like_the_new_one():
    sets = [[[0], [0]], [[1], [1]], [[0], [2]], [[3], [3]]]  # the third is half like the first
    trace, store = decode_trace(4, sets), MapStore(2)
    store.start(trace.meta)
    for moment in drive(Policy.load("lru").residency(trace, Slots((1, 1))), trace):
        if moment.routed is not None:
            store.match(moment.routed)
    assert store.layer_of(0, 1).tolist() == [0, 0, 1, 0]
    assert store.layer_of(1, 1).tolist() == [0, 1, 0, 0]


PATHS = [[[0], [1], [2], [3]], [[3], [2], [1], [0]]]


def test_a_path_seen_before_is_fetched_ahead_and_nothing_before_it_was_seen():
    trace = decode_trace(4, [PATHS[0], PATHS[1], PATHS[0], PATHS[1]])
    proposals = ExpertMapPrefetch(distance=2)
    proposals.start(trace.meta, None)
    said = {}
    for moment in drive(Policy.load("lru").residency(trace, Slots((3,) * 4)), trace):
        if moment.routed is not None:
            said[moment.step, moment.layer] = [(t, e.tolist()) for t, e in proposals.propose(moment.routed)]
    assert said[0, 0] == []
    assert said[1, 0] == [(2, [2])]  # of one map only, and it is wrong
    assert said[2, 0] == [(2, [2])] and said[2, 1] == [(3, [3])] and said[2, 2] == []
    assert said[3, 0] == [(2, [1])] and said[3, 1] == [(3, [0])]


def test_the_less_similar_the_match_the_more_is_fetched_but_at_least_top_k():
    chances = np.array([0.1, 0.4, 0.0, 0.3, 0.2], np.float32)
    for threshold, least, kept in ((0.0, 1, [1]), (0.5, 1, [1, 3]), (0.75, 1, [1, 3, 4]), (1.0, 9, [0, 1, 3, 4])):
        chosen = np.zeros(5, np.float32)
        expert_map._choose(chances, threshold, least, chosen)
        assert np.flatnonzero(chosen).tolist() == kept


def test_probability_times_frequency_decides_who_goes():
    """The stored step used 0, then 2; a step that begins like it keeps 2 although 1 was used as often."""
    trace = decode_trace(4, [[[0], [2]], [[3], [1]], [[0], [3]]])
    policy = Policy.from_document({"cache": {"evict": "expert-map"}})
    residency = policy.residency(trace, Slots((4, 2)), keep_log=True)
    for _ in drive(residency, trace):
        pass
    assert residency.decision_log()[-1].tolist() == [5, 0, 1, 3, 5, 4 + 1]


def test_a_store_without_room_is_refused():
    with pytest.raises(ValueError, match="at least 1 map"):
        MapStore(0)


def test_the_simulator_gives_it_gate_weights_where_the_trace_has_them_and_runs_without():
    trace = load_trace(BUNDLED_TRACE).of_requests(range(2))
    digests = [
        simulate(t, "a100-80g", "expert-map", 0.25, model=PRICED_AS).values["decision_log_sha256"]
        for t in (trace, replace(trace, weights=None))
    ]
    assert digests[0] != digests[1]
