"""Experts that the host computes: close to the resident model, labelled numeric, decisions as in the simulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import generate, inputs, model_of, offloaded
from fake_device import FakeDevice
from moeflow.runtime import implementations
from moeflow.runtime.backend import HostBackend


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(**inputs(4, True)).logits


@pytest.mark.parametrize("device", [HostBackend, lambda: FakeDevice(5.0, reorder=1)])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("policy", ["cpu", "split"])
def test_the_host_s_experts_agree_to_rounding(
    policy: str, family: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    expected = logits(model)
    made = device()
    if isinstance(made, FakeDevice):
        monkeypatch.setattr(implementations, "bits_depend_on_place", lambda device: False)
    live = offloaded(model, policy, 0.4, made)
    try:
        found = logits(model)
        generate(model, 2, True, 6)
        said = live.statistics()
    finally:
        live.detach()
    assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4)
    assert said["exactness"] == "numeric"
    assert said["on_host"] > 0
    assert (said["bytes"]["demand"] > 0) == (policy == "split")
    if policy == "cpu":
        assert said["bytes"]["prefetch"] > 0  # what is promoted


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_whatever_implementation_is_mirrored(implementation: str) -> None:
    model = model_of("gpt_oss")
    model.set_experts_implementation(implementation)
    expected = logits(model)
    live = offloaded(model, "cpu", 0.4)
    try:
        assert torch.allclose(expected, logits(model), rtol=1e-4, atol=1e-4)
    finally:
        live.detach()
        model.set_experts_implementation("grouped_mm")
