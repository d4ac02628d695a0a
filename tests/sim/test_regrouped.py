"""Runs whose batches were formed anew: what is charged, and what a result may still say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import RTX4090, decode_trace
from moeflow.policies.schedule import Regrouped, Schedule
from moeflow.sim.cost import CostModel
from moeflow.sim.run import simulate
from moeflow.sim.summary_plot import summary_png
from moeflow.sim.table import print_result
from moeflow.traces.trace import Trace

DOCUMENT = {
    "cache": {"evict": "plec", "scope": "global"},
    "prefetch": {"kind": "execution-order"},
    "predict": {"kind": "next-gate"},
    "schedule": {"kind": "two-medoid"},
}


@pytest.fixture
def trace() -> Trace:
    """Four requests of six tokens; the gate on the embedding knows two layers; 1st and 4th, 2nd and 3rd are alike."""
    kind = [0, 1, 1, 0]
    sets = [[[4 * kind[r] + e for e in (0, 1 + t % 3)]] * 2 for r in range(4) for t in range(6)]
    alone = decode_trace(8, sets)
    rows = np.arange(24)
    ahead = np.full((24, 3, 2, 2), 255, np.uint8)
    ahead[:, 0] = alone.experts
    ahead[:, 1, 0] = alone.experts[:, 1]
    columns = {
        "request": (rows // 6).astype(np.int32),
        "position": (rows % 6 + 10).astype(np.int32),
        "lookahead": ahead,
    }
    return replace(alone, meta=replace(alone.meta, lookahead_distances=(1, 2)), **columns)


def test_regrouping_saves_experts_and_is_labelled(trace):
    kept = simulate(trace, RTX4090, {**DOCUMENT, "schedule": {"kind": "two-medoid", "rounds": 0}}, "8 slots", batch=2)
    split = simulate(trace, RTX4090, DOCUMENT, "8 slots", batch=2)
    assert split.measurements.steps["needed"].sum() < kept.measurements.steps["needed"].sum()
    assert split["bounds"] is None
    assert split["exactness"] == "numeric"
    assert any("no bounds" in note for note in split["notes"])
    assert any("lockstep" in note for note in split["notes"])
    assert split["schedule"]["splits"] == 6
    assert split["schedule"]["moved_sequences"] == 2
    per_token = trace.meta.model.kv_bytes_per_token
    assert split["schedule"]["copied_kv_bytes"] == split["schedule"]["moved_kv_bytes"] == 20 * per_token
    reindexed = {**DOCUMENT, "schedule": {"kind": "two-medoid", "merge": "reindex"}}
    assert simulate(trace, RTX4090, reindexed, "8 slots", batch=2)["schedule"]["copied_kv_bytes"] == 0


def test_a_result_without_bounds_can_be_shown(trace, capsys):
    result = simulate(trace, RTX4090, DOCUMENT, "8 slots", batch=2)
    print_result(result)
    shown = capsys.readouterr().out
    assert "tokens per second" in shown
    assert "clairvoyant" not in shown
    assert summary_png(result).startswith(b"\x89PNG")


def test_a_schedule_without_pairs_changes_nothing(trace):
    with_it, without = simulate(trace, RTX4090, DOCUMENT), simulate(trace, RTX4090, {**DOCUMENT, "schedule": {}})
    assert with_it["decision_log_sha256"] == without["decision_log_sha256"]
    assert with_it["tpot_s"] == without["tpot_s"]
    assert with_it["bounds"] == without["bounds"]
    assert with_it["schedule"] is None
    assert with_it["exactness"] == "bit"


class Costly(Schedule):
    """The trace's own steps, each after a second of thought and a thousand copied tokens."""

    thought, copied = 0.0, 0

    def regroup(self, trace, predictions):
        steps = len(trace.step_starts) - 1
        moved = np.full(steps, self.copied)
        return Regrouped(np.arange(trace.rows), trace.step, np.full(steps, self.thought), moved, moved, moved)


def test_thought_and_copies_are_charged_to_every_step(trace, monkeypatch):
    document = {"schedule": {"kind": f"{__name__}:Costly"}}
    free = simulate(trace, RTX4090, document)["tpot_s"]["mean"]
    assert free == simulate(trace, RTX4090, {})["tpot_s"]["mean"]
    monkeypatch.setattr(Costly, "thought", 1.0)
    assert simulate(trace, RTX4090, document)["tpot_s"]["mean"] == pytest.approx(free + 1, rel=1e-9)
    monkeypatch.setattr(Costly, "thought", 0.0)
    monkeypatch.setattr(Costly, "copied", 10**9)
    bytes_moved = 2 * 10**9 * trace.meta.model.kv_bytes_per_token
    least = bytes_moved / (RTX4090.device.memory_bandwidth * RTX4090.device.memory_achieved)
    assert simulate(trace, RTX4090, document)["tpot_s"]["mean"] == pytest.approx(free + least, rel=1e-3)
    assert CostModel(RTX4090, trace.meta.model).merge(10**9).device_ps >= least * 1e12
