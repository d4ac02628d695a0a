"""Miss-ratio curves: at every capacity exactly what a cache of that size misses, also where needed sets do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cases import EVICTIONS, spec, trace_of, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots
from moeflow.sim.miss_ratio import MissCurve, curve_of, miss_ratio_curve, stack_scoring
from moeflow.sim.needs import needs_of
from moeflow.sim.replay import replay, replay_scoring
from moeflow.traces.trace import Trace
from moeflow.traces.writer import write_trace
from test_cli import random_trace, sim
from test_replay import LIBCACHESIM, counts_of_residency, one_at_a_time, policy_of

from moeflow.errors import InputError

ON_A_STACK = [name for name, cls in EVICTIONS.items() if cls.routing_only]


def slots_at(curve: MissCurve, capacity: int) -> Slots:
    return Slots((capacity,) * (1 if curve.scope == "global" else curve.layers))


def by_group(curve: MissCurve, misses: list[int]) -> list[int]:
    return [sum(misses)] if curve.scope == "global" else misses


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("evict", ["lru", "lfu", "belady"])
@given(data=st.data())
@settings(max_examples=8)
def test_residency_misses_as_much_at_every_capacity(evict, scope, data):
    trace = data.draw(traces(lookahead=False))
    policy = policy_of(evict, scope, **({"bypass": data.draw(st.booleans())} if evict == "belady" else {}))
    curve = miss_ratio_curve(trace, policy, scope)
    for capacity in range(1, curve.misses.shape[1]):
        misses, _ = counts_of_residency(trace, policy, slots_at(curve, capacity))
        assert curve.misses[:, capacity].tolist() == by_group(curve, misses)


@pytest.mark.parametrize("evict", ON_A_STACK)
@given(data=st.data())
@settings(max_examples=50)
def test_a_replay_misses_as_much_at_every_capacity(evict, data):
    """As above, for more traces and policies: `test_replay` holds replays against `Residency`."""
    trace, scope = data.draw(traces(lookahead=False)), data.draw(st.sampled_from(("layer", "global")))
    needs = needs_of(trace)
    scoring = stack_scoring(policy_of(evict, scope), trace, needs)
    curve = curve_of(needs, scoring, scope)
    for capacity in range(1, curve.misses.shape[1]):
        found = replay_scoring(needs, scoring, slots_at(curve, capacity))
        assert curve.misses[:, capacity].tolist() == by_group(curve, found.misses.tolist())


@pytest.mark.parametrize("scope", ["layer", "global"])
@given(seed=st.integers(0, 2**16), layers=st.integers(1, 3), most=st.integers(1, 6), pace=st.sampled_from((0.1, 1, 4)))
@settings(max_examples=40)
def test_many_experts_and_small_sets(scope, seed, layers, most, pace):
    """Where LRU's depths come from recency (recency.py), over enough steps for its row to fill up many times."""
    rng = np.random.default_rng(seed)
    scores = np.cumsum(rng.normal(0, pace, (150, 1, layers, 24)), axis=0) + rng.gumbel(size=(150, 1, layers, 24))
    ids = np.argsort(-scores, axis=-1, kind="stable")[..., :most]
    ids[..., 1:][rng.random(ids[..., 1:].shape) < 0.2] = -1
    trace = trace_of(spec(layers, 24, most), list(ids))
    needs = needs_of(trace)
    for evict in ("lru", "lfu", "belady"):
        scoring = stack_scoring(policy_of(evict, scope), trace, needs)
        curve = curve_of(needs, scoring, scope)
        for capacity in {*range(1, 10), *range(10, curve.misses.shape[1], 7), curve.misses.shape[1] - 1}:
            found = replay_scoring(needs, scoring, slots_at(curve, capacity))
            assert curve.misses[:, capacity].tolist() == by_group(curve, found.misses.tolist())


@given(trace=traces(lookahead=False), evict=st.sampled_from(ON_A_STACK), scope=st.sampled_from(("layer", "global")))
def test_more_slots_never_miss_more_and_all_slots_miss_first_uses_alone(trace, evict, scope):
    curve = miss_ratio_curve(trace, policy_of(evict, scope), scope)
    assert (curve.misses[:, 0] == curve.accesses).all()
    assert (np.diff(curve.misses, axis=1) <= 0).all()
    assert curve.total[-1] == np.unique(needs_of(trace).keys()).size
    assert curve.ratio[0] in (0, 1)  # 0: a trace of absent entries


def test_belady_misses_least_at_every_capacity():
    trace = random_trace(steps=60)
    belady, lru = (miss_ratio_curve(trace, evict).total for evict in ("belady-forced", "lru"))
    bypassing = miss_ratio_curve(trace, "belady").total
    assert (belady[8:] <= lru[8:]).all()  # below, demand order may admit what no rule would choose
    assert (bypassing <= lru).all() and (bypassing[8:] <= belady[8:]).all()


@pytest.mark.parametrize("evict", ["lru", "belady"])
def test_sets_of_one_have_libcachesims_misses(evict):
    policy = policy_of(evict, "global", **({"bypass": False} if evict == "belady" else {}))
    total = miss_ratio_curve(one_at_a_time(), policy, "global").total
    assert {slots: int(total[slots]) for slots in LIBCACHESIM[evict]} == LIBCACHESIM[evict]


def test_a_case_by_hand():
    """{0, 1}, {2}, {0}, {1, 2}: what is found with C slots, ties to the lowest id going first."""
    trace = trace_of(spec(1, 3, 2), [np.array([[ids]]) for ids in ([0, 1], [2, -1], [0, -1], [1, 2])])
    # 1 slot: 0 | 2 | 0 | 1, nothing found. 2 slots: {0, 1}, {1, 2}, {0, 2}: 2 is found. 3 slots: all but first uses.
    assert miss_ratio_curve(trace, "lru").total.tolist() == [6, 6, 5, 3]


@pytest.mark.parametrize("evict", ["fifo", "least-stale", "window-swap"])
def test_a_policy_without_inclusion_is_refused(evict):
    with pytest.raises(InputError, match="more slots may miss more"):
        miss_ratio_curve(one_at_a_time(50), evict)


def test_fifo_really_misses_more_with_more_slots():
    """Belady's anomaly (Belady, Nelson and Shedler 1969): why there is no curve for it."""
    steps = [np.array([[[e]]]) for e in (0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 3, 4)]
    trace = trace_of(spec(1, 5, 1), steps)
    assert [int(replay(trace, "fifo", Slots((slots,))).misses.sum()) for slots in (3, 4)] == [9, 10]


def test_a_scope_that_is_none():
    with pytest.raises(InputError, match="layer or global"):
        miss_ratio_curve(one_at_a_time(50), "lru", "pool")


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    path, trace = tmp_path_factory.mktemp("traces") / "random.parquet", random_trace()
    write_trace(path, trace)
    return path, trace


def test_the_command_prints_a_table_and_writes_a_plot(trace_file, tmp_path):
    done = sim("mrc", "--trace", trace_file[0], "--policy", "lru,belady", "--out", tmp_path / "mrc.png")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    ratio = miss_ratio_curve(trace_file[1], "lru").ratio
    assert ["25", "%", "16", f"{ratio[16]:.4f}"] in [line[:4] for line in lines]
    assert (tmp_path / "mrc.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["mrc.png"]


def test_json_has_every_capacity(trace_file):
    done = sim("mrc", "--trace", trace_file[0], "--policy", "lfu", "--scope", "global", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["policies"]["lfu"]["misses"] == miss_ratio_curve(trace_file[1], "lfu", "global").total.tolist()
    assert len(values["policies"]["lfu"]["misses"]) == 16 * 64 + 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--policy", "fifo"), "more slots may miss more"),
        (("--policy", "lru,nonsense"), "nonsense"),
        (("--policy", "oracle"), "prefetch"),
        (("--scope", "pool"), "layer or global"),
        (("--out", "mrc.pdf"), "ending in .png"),
        (("--out", "nowhere/at/all/mrc.png"), "cannot be written"),
    ],
)
def test_a_mistake_is_one_sentence(trace_file, arguments, words):
    done = sim("mrc", "--trace", trace_file[0], *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr


def test_the_policys_own_scope_does_not_matter():
    trace = random_trace(steps=20)
    first, second = (miss_ratio_curve(trace, Policy.load(name), "global").total for name in ("lru", "lru-global"))
    assert first.tolist() == second.tolist()
