"""A live run decides what the simulator decides for the trace of it, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import generate, model_of, offloaded
from fake_device import FakeDevice
from moeflow.policies.layer_budget import train
from moeflow.policies.policy import Policy, preset_names
from moeflow.policies.residency import COPIED, DEMAND, STALLED, STREAM, TOOK, Residency, Slots
from moeflow.runtime.backend import HostBackend
from moeflow.runtime.offload import servable
from moeflow.sim.run import simulate
from moeflow.traces.reader import load_trace
from moeflow.traces.recorder import record_routing
from moeflow.traces.trace import Trace
from test_input_parity import replayed

from moeflow import InputError


def is_servable(name: str) -> bool:
    policy = Policy.load(name)
    try:
        return not servable(policy).oracle
    except InputError:
        return False


SERVED = [name for name in preset_names() if is_servable(name)]
COLUMNS = ("step", "request", "position", "token", "phase", "experts", "weights")


def run(model: Any) -> None:
    """Three padded prompts whose sequences may end early, then one more."""
    generate(model, 3, True, 9)
    generate(model, 1, False, 4)


def simulated(trace: Trace, policy: Policy, budget: Any) -> str:
    return simulate(trace, "rtx4090", policy, budget, engine="events")["decision_log_sha256"]


def test_most_policies_run_live() -> None:
    assert {"lru", "moeflow", "arc", "lookahead", "next-gate", "score-ema", "hobbit", "adaptive"} <= set(SERVED)


@pytest.mark.parametrize("name", SERVED)
def test_the_simulator_decides_the_same_for_the_trace_of_the_run(name: str, tmp_path: Path) -> None:
    model, policy = model_of("qwen3_moe"), Policy.load(name)
    live = offloaded(model, policy, 0.4, told=True)
    try:
        with record_routing(model, tmp_path / "t.parquet"):
            run(model)
    finally:
        live.detach()
    kinds, size = live.residency.decision_log()[:, 1], live.layout.size
    if policy.prefetch() is None and policy.miss_service().exactness == "bit":
        assert live.transfers.traffic.demand == np.count_nonzero(kinds == DEMAND) * size
        assert live.statistics()["streamed"] == np.count_nonzero(kinds == STREAM)
    told, recorded = live.decisions.told.trace(), load_trace(tmp_path / "t.parquet")
    for column in COLUMNS:
        assert np.array_equal(getattr(told, column), getattr(recorded, column)), column
    if policy.timing_free:
        assert simulated(told, policy, 0.4) == live.residency.decision_log_sha256
    if policy.timing_free and not policy.needs:
        assert simulated(recorded, policy, 0.4) == live.residency.decision_log_sha256


@pytest.mark.parametrize("split", ["entropy", "demand", "dp"])
def test_slots_shared_out_by_a_file(split: str, tmp_path: Path) -> None:
    first = offloaded(model_of("qwen3_moe"), "lru", 0.4, told=True)
    run(first.model)
    first.detach()
    seen = first.decisions.told.trace()
    train(seen, seen).save(tmp_path / "budget")
    policy = Policy.from_document({"cache": {"evict": "lru", "split": split, "fitted": str(tmp_path / "budget")}})
    live = offloaded(model_of("qwen3_moe"), policy, 0.4, told=True)
    run(live.model)
    live.detach()
    assert live.slots.held == first.slots.held
    assert simulated(live.decisions.told.trace(), policy, 0.4) == live.residency.decision_log_sha256


@dataclass
class Replay:
    """What `replayed` asks of a case."""

    policy: Policy
    trace: Trace
    slots: Slots

    def residency(self) -> Residency:
        return self.policy.residency(self.trace, self.slots, keep_log=True)


@pytest.mark.parametrize("device", [HostBackend, lambda: FakeDevice(30.0), lambda: FakeDevice(5.0, reorder=4)])
@pytest.mark.parametrize("name", [name for name in SERVED if not Policy.load(name).timing_free])
def test_logged_inputs_reproduce_what_a_policy_decided_that_reads_time(name: str, device: Any) -> None:
    live = offloaded(model_of("qwen3_moe"), name, 0.4, device(), told=True)
    try:
        run(live.model)
    finally:
        live.detach()
    inputs = live.residency.input_log()
    assert set(inputs[:, 1].tolist()) >= {COPIED, TOOK, STALLED}
    again = replayed(Replay(live.policy, live.decisions.told.trace(), live.slots), inputs)
    assert again.decision_log_sha256 == live.residency.decision_log_sha256
    assert np.array_equal(again.decision_log(), live.residency.decision_log())
