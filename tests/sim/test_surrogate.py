"""Surrogate routing: as local as what was measured, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.sim.surrogate import (
    GRID,
    Locality,
    load_sources,
    localities,
    positions_wanted,
    reuse,
    surrogate,
)
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.models import load_model_spec

import moeflow

TINY = replace(load_model_spec("olmoe-1b-7b"), layers=6, moe_layers=tuple(range(6)))


def hits(share: np.ndarray, fraction: float) -> float:
    curve = np.concatenate(([0.0], np.cumsum(share))) / np.sum(share)
    return float(np.interp(fraction * len(share), np.arange(len(curve)), curve))


@pytest.mark.parametrize("locality", localities(), ids=lambda locality: locality.name)
@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.5, 0.75])
def test_the_lru_hit_curve_is_that_of_the_source(locality: Locality, fraction: float) -> None:
    made = reuse(surrogate(TINY, locality, 128, 512))
    assert hits(made, fraction) == pytest.approx(np.interp(fraction, GRID, locality.hits), abs=0.02)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_simulated_lru_hits_as_often_as_the_curve_says(fraction: float) -> None:
    for locality in localities():
        result = moeflow.simulate(surrogate(TINY, locality, 64, 256), "rtx4090", "lru", fraction)
        assert result["hit"] == pytest.approx(np.interp(fraction, GRID, locality.hits), abs=0.03)


def test_positions_are_the_capacities_at_which_lru_begins_to_hit() -> None:
    trace = moeflow.load_trace(BUNDLED_TRACE).of_requests(range(24))
    share = reuse(trace)
    assert share.sum() == pytest.approx(trace.meta.model.top_k)
    for slots in (16, 32, 48):
        result = moeflow.simulate(trace, "rtx4090", "lru", slots * 16 + 2)
        assert result["hit"] == pytest.approx(share[:slots].sum() / share.sum(), abs=0.02)  # its cache begins empty


def test_the_table_is_what_the_bundled_recording_measures() -> None:
    bundled = next(source for source in load_sources() if source["name"] == "bundled tiny MoE")
    share = reuse(moeflow.load_trace(BUNDLED_TRACE))
    assert np.allclose(bundled["share"], share / share.sum(), atol=1e-6)


def test_the_table_is_what_the_recordings_measure(shared_traces: Path, tmp_path: Path) -> None:
    from moeflow.traces.importers import import_trace

    for name in ("dsv2lite_nvmoe", "olmoe_nvmoe", "qwen3_30b_a3b_sparsify"):
        import_trace(shared_traces / f"{name}_decode.npz", tmp_path / "own.parquet")
        share = reuse(moeflow.load_trace(tmp_path / "own.parquet"))
        source = next(source for source in load_sources() if source["name"] == name)
        assert np.allclose(source["share"], share / share.sum(), atol=1e-6)


def test_localities_are_ordered_and_one_recording_can_be_left_out() -> None:
    low, middle, high = localities()
    assert low.hits.sum() < middle.hits.sum() < high.hits.sum()
    assert high.name == "high" and high.sources[0] not in localities(without=high.sources[0])[1].sources


@settings(max_examples=25)
@given(
    st.integers(2, 40), st.integers(1, 8), st.lists(st.floats(0, 1), min_size=2, max_size=9), st.integers(0, 2**32 - 1)
)
def test_every_token_has_k_distinct_experts_at_wanted_positions(
    experts: int, top_k: int, rises: list[float], seed: int
) -> None:
    top_k = min(top_k, experts)
    rises = [rise + 0.01 for rise in rises]
    curve = np.concatenate(([0.0], np.cumsum(rises))) / np.sum(rises)
    locality = Locality("any", (), np.interp(GRID, np.linspace(0, 1, len(curve)), curve))
    wanted = positions_wanted(locality, experts, top_k)
    assert wanted.sum() == pytest.approx(top_k) and wanted.min() >= -1e-12 and wanted.max() <= 1
    model = replace(TINY, layers=2, moe_layers=(0, 1), experts=experts, top_k=top_k)
    trace = surrogate(model, locality, 2, 5, seed)
    assert all(len(set(ids.tolist())) == top_k for row in trace.experts for ids in row)
    assert trace.experts.max() < experts
    assert trace.content_sha256 == surrogate(model, locality, 2, 5, seed).content_sha256


def test_it_says_that_it_is_made_up() -> None:
    trace = surrogate(TINY, localities()[0], 2, 2)
    assert "surrogate" in trace.meta.recorded["routing"] and "not recorded" in trace.meta.recorded["routing"]


def test_a_trace_without_decode_steps_has_no_reuse() -> None:
    trace = surrogate(TINY, localities()[0], 4, 1)
    prefill = replace(trace, phase=np.zeros_like(trace.phase))
    with pytest.raises(ValueError, match="no decode steps"):
        reuse(prefill)
