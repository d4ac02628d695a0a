"""A model routed as a trace says decides what the simulator decides for that trace, on the same slots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import generate, model_of, offloaded
from fake_device import FakeDevice
from moeflow.policies.policy import Policy
from moeflow.runtime.backend import HostBackend
from moeflow.runtime.bench import bench
from moeflow.runtime.forced_routing import ForcedRouting, check_geometry, turns_of
from moeflow.runtime.offload import served_layers
from moeflow.runtime.subject import Subject
from moeflow.sim.run import simulate
from moeflow.traces.lockstep import lockstep
from moeflow.traces.reader import load_trace
from moeflow.traces.recorder import record_routing
from moeflow.traces.trace import Trace

from moeflow import InputError

BUDGET = 0.4


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Three padded prompts together, then one, recorded with everything that policies of the runtime read."""
    path, model = tmp_path_factory.mktemp("forced") / "t.parquet", model_of("qwen3_moe")
    with record_routing(model, path, lookahead=3, probs=True):
        generate(model, 3, True, 6)
        generate(model, 1, False, 4)
    return load_trace(path)


def scrambled(trace: Trace, seed: int = 1) -> Trace:
    """The same rows with their experts renamed, which the model's own routers would never choose."""
    names = np.random.default_rng(seed).permutation(trace.meta.model.experts).astype(trace.experts.dtype)
    ahead = trace.lookahead
    if ahead is not None:
        ahead = np.where(ahead == trace.absent, ahead, names[np.where(ahead == trace.absent, 0, ahead)])
    return replace(trace, experts=names[trace.experts], lookahead=ahead, probs=None)


def measured(trace: Trace, *names: str, rounds: int = 1) -> dict[str, Any]:
    subject = Subject(model_of("qwen3_moe"), HostBackend())
    return bench(subject, "tiny", trace, [Policy.load(name) for name in names], BUDGET, rounds)


CASES = [("lru", None), ("lru", 1), ("moeflow", 4), ("lookahead", None), ("next-gate", 1), ("score-ema", None)]


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_decisions_are_the_simulators_for_the_forced_trace(trace: Trace, name: str, batch: int | None) -> None:
    forced = scrambled(trace) if batch is None else lockstep(scrambled(trace), batch)
    policy = Policy.load(name)
    if "probs" in policy.needs:
        forced = replace(forced, probs=trace.probs)
    found = measured(forced, name)["policies"][0]
    simulated = simulate(forced, "rtx4090", policy, BUDGET, engine="events")
    assert policy.timing_free
    assert found["decision_log_sha256"] == simulated["decision_log_sha256"]
    assert found["slots"]["held"] == simulated["slots"]["held"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v2", "qwen3_vl_moe", "jamba", "nemotron_h"])
def test_any_family_can_be_forced(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    with record_routing(model, tmp_path / "t.parquet"):
        generate(model, 2, True, 3)
    forced = scrambled(load_trace(tmp_path / "t.parquet"))
    subject = Subject(model, HostBackend())
    (run,) = bench(subject, family, forced, [Policy.load("lru")], BUDGET, 1)["policies"]
    assert run["decision_log_sha256"] == simulate(forced, "rtx4090", "lru", BUDGET)["decision_log_sha256"]


def test_a_device_whose_copies_take_time_decides_the_same(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeflow.runtime.physical_limit.PROBE", 1 << 15)
    device, forced = FakeDevice(5.0, reorder=3), scrambled(trace)
    found = bench(Subject(model_of("qwen3_moe"), device), "tiny", forced, [Policy.load("lookahead")], BUDGET, 1)
    simulated = simulate(forced, "rtx4090", "lookahead", BUDGET)
    assert found["policies"][0]["decision_log_sha256"] == simulated["decision_log_sha256"]
    assert not any("overlaps" in note for note in found["notes"])


def test_copies_are_the_decided_ones_and_no_fewer_than_the_limits(trace: Trace) -> None:
    forced, live = scrambled(trace), offloaded(model_of("qwen3_moe"), "lru", BUDGET)
    live.detach()
    (run,) = measured(forced, "lru")["policies"]
    copies = (run["bytes_per_token"]["demand"] + run["bytes_per_token"]["stream"]) * forced.rows / live.layout.size
    assert run["hit"] + run["late"] + run["miss"] == pytest.approx(1)
    assert run["limit"]["copies"] <= round(copies)
    needs = sum(len(np.unique(forced.experts[forced.step == step, layer])) for step in range(10) for layer in range(3))
    assert copies == pytest.approx(
        run["miss"] * needs, rel=0.02
    )  # a row's fields lie with gaps, which streams leave out


def test_the_experts_are_given_what_the_trace_says(trace: Trace) -> None:
    forced, model = scrambled(trace), model_of("qwen3_moe")
    layers, routing, turn = served_layers(model), ForcedRouting(forced, torch.device("cpu")), turns_of(forced, 97)[0]
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []

    def look(index: int) -> Any:
        return lambda module, args: seen.append((index, args[1].numpy(), args[2].numpy()))

    with routing.on(layers):
        handles = [layer.experts.register_forward_pre_hook(look(layer.index)) for layer in layers]
        routing.begin(turn)
        model(input_ids=turn.tokens, attention_mask=turn.mask, position_ids=turn.positions)
    for handle in handles:
        handle.remove()
    live = turn.now.live
    assert 0 < live.sum() < len(live) and len(seen) == len(layers)
    for index, ids, weights in seen:
        assert np.array_equal(ids[live], forced.experts[: live.sum(), index])
        assert np.array_equal(weights[live], forced.weights[: live.sum(), index].astype(np.float32))
        assert set(ids[~live].ravel().tolist()) <= set(ids[live].ravel().tolist())  # padding needs nothing more


def test_turns_hold_every_row_once(trace: Trace) -> None:
    for batch in (None, 1, 2, 4):
        regrouped = trace if batch is None else lockstep(trace, batch)
        turns = turns_of(regrouped, 97)
        rows = np.concatenate([turn.rows[turn.now.live] for turn in turns])
        assert sorted(rows.tolist()) == list(range(regrouped.rows))
        assert sum(turn.fresh for turn in turns) == {None: 2, 1: 4, 2: 2, 4: 1}[batch]
        assert all(turn.tokens.shape == turn.now.shape for turn in turns)


def test_what_cannot_be_forced_is_refused(trace: Trace) -> None:
    model = trace.meta.model
    with pytest.raises(InputError, match="has 3 MoE layers of 16 experts, top-2, but the trace was recorded from"):
        check_geometry(trace, replace(model, experts=16), "other")
    lacking = trace.experts.copy()
    lacking[0, 0, 1] = trace.absent
    with pytest.raises(InputError, match="fewer than top-k"):
        check_geometry(replace(trace, experts=lacking), model, "tiny")
    with pytest.raises(InputError, match="policy next-gate needs the column 'lookahead'"):
        measured(replace(trace, lookahead=None, lookahead_weights=None), "next-gate")
    with pytest.raises(InputError, match="same name"):
        measured(trace, "lru", "lru")
    mixed = trace.reordered(np.arange(trace.rows), np.zeros(trace.rows, np.int32))
    with pytest.raises(InputError, match="regroup them with --batch"):
        turns_of(mixed, 97)


def test_policies_are_compared_in_pairs(trace: Trace) -> None:
    found = measured(trace, "lru", "moeflow", rounds=2)
    first, second = found["policies"]
    assert first["pace_to_first"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert second["pace_to_first"]["min"] <= second["pace_to_first"]["median"] <= second["pace_to_first"]["max"]
    assert found["resident"]["tokens_per_s"] > 0 and first["overlap"] == 0
    assert first["syncs_per_layer"] == 1 and first["host_us_per_layer"]["decide"] > 0
    assert "nothing overlaps" in " ".join(found["notes"])
    assert all(parameter.device.type == "cpu" for parameter in model_of("qwen3_moe").parameters())
