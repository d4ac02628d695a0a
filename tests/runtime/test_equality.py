"""An offloaded model computes the bits of the resident one: every family, prefill and decode, batched, padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import everything, generate, inputs, model_of, same
from families import FAMILIES

import moeflow
from moeflow import InputError

REFUSED = {"dbrx", "llama4_text", "switch_transformers"}
SERVED = sorted(FAMILIES.keys() - REFUSED)
RESIDENT: dict[Any, list[torch.Tensor]] = {}


def resident(family: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    if (family, dtype) not in RESIDENT:
        RESIDENT[family, dtype] = everything(model_of(family, dtype))
    return RESIDENT[family, dtype]


@pytest.mark.parametrize(("policy", "budget"), [("lru", 0.25), ("moeflow", 0.5)])
@pytest.mark.parametrize("family", SERVED)
def test_logits_are_those_of_the_resident_model(family: str, policy: str, budget: float) -> None:
    expected = resident(family)
    with moeflow.offload(model_of(family), policy, budget) as model:
        found = everything(model)
        said = moeflow.stats(model)
    assert same(expected, found)
    assert 0 < said["hit"] < 1
    assert said["bytes"]["demand"] > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "qwen3_vl_moe", "mixtral"])
def test_bfloat16(family: str) -> None:
    expected = resident(family, torch.bfloat16)
    with moeflow.offload(model_of(family, torch.bfloat16), "lru", 0.25) as model:
        assert same(expected, everything(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_implementations_are_mirrored(family: str, implementation: str, dtype: torch.dtype) -> None:
    model = model_of(family, dtype)
    model.set_experts_implementation(implementation)
    try:
        expected = everything(model)
        with moeflow.offload(model, "lru", 0.25):
            assert same(expected, everything(model))
        with moeflow.offload(model, "moeflow", 0.5):
            assert same(expected, everything(model))
    finally:
        model.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_long_prompts_stream_in_waves(implementation: str) -> None:
    """Twelve slots for 24 experts of which a long prompt needs every one, two scratch slots, 400 tokens."""
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("qwen3_moe", dtype)
        model.set_experts_implementation(implementation)
        try:
            with torch.inference_mode():
                expected = model(**inputs(4, True, 100)).logits
                with moeflow.offload(model, {"cache": {"evict": "lru", "scope": "global"}}, "3 slots"):
                    found = model(**inputs(4, True, 100)).logits
                    said = moeflow.stats(model)
        finally:
            model.set_experts_implementation("grouped_mm")
        assert torch.equal(expected, found)
        assert said["streamed"] == 21
        assert said["waves_per_layer"] >= 4 or implementation == "eager"


def test_what_serves_only_padding_is_computed_but_not_counted() -> None:
    model = model_of("mixtral")
    batch = inputs(1, True, 3)
    batch["attention_mask"][:, :2] = 0
    with torch.inference_mode():
        expected = model(**batch).logits
        with moeflow.offload(model, "lru", 0.25):
            found, said = model(**batch).logits, moeflow.stats(model)
    assert torch.equal(expected, found)
    assert said["needs"] == 3 * 2  # one live token, top-2 of three layers
    assert said["bytes"]["padding"] > 0


def test_images() -> None:
    """A vision-language model with an image among its tokens."""
    model = model_of("qwen3_vl_moe")
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 7, 8]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(16, 48, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 90).int(),
    }

    def made() -> list[torch.Tensor]:
        found = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return [found.sequences, *found.logits]

    expected = made()
    assert not torch.equal(expected[1], generate(model, 1, False)[1])
    with moeflow.offload(model, "moeflow", 0.4):
        assert same(expected, made())


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_other_families_are_refused_by_name(family: str) -> None:
    with pytest.raises(InputError, match=f"{family} cannot be offloaded"):
        moeflow.offload(model_of(family))


def test_gradients_are_refused_when_they_are_asked_for() -> None:
    model = model_of("qwen3_moe")
    expected = model(**inputs(1, False)).logits
    with moeflow.offload(model, "lru", 0.25):
        found = model(**inputs(1, False)).logits
        assert torch.equal(expected, found)
        with pytest.raises(InputError, match="no gradients"):
            found.sum().backward()


def test_everything_is_as_before_after_detaching() -> None:
    model = model_of("gpt_oss")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind, wants = type(model), [parameter.requires_grad for parameter in model.parameters()]
    with moeflow.offload(model, "lru", 0.25):
        assert type(model) is not kind
        assert isinstance(model, kind)
        assert not [p for n, p in model.named_parameters() if ".experts.gate_up_proj" in n and p.device.type != "meta"]
    assert type(model) is kind
    assert [parameter.requires_grad for parameter in model.parameters()] == wants
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert same(resident("gpt_oss"), everything(model))


def test_sampling_and_beams_generate_what_the_resident_model_does() -> None:
    model = model_of("qwen3_moe")

    def made() -> list[torch.Tensor]:
        torch.manual_seed(0)
        sampled = model.generate(**inputs(2, True), max_new_tokens=6, do_sample=True, top_k=0)
        return [sampled, model.generate(**inputs(2, True), max_new_tokens=6, num_beams=3)]

    expected = made()
    with moeflow.offload(model, "lfu", 0.25):
        assert same(expected, made())


def test_a_pass_without_cache_between_two_steps_of_another() -> None:
    model = model_of("qwen3_moe")

    @torch.inference_mode()
    def made() -> list[torch.Tensor]:
        first = model(**inputs(2, False), use_cache=True)
        other = model(**inputs(3, True)).logits
        more = model(input_ids=torch.tensor([[5], [6]]), past_key_values=first.past_key_values).logits
        return [first.logits, other, more, *generate(model, 1, False, 2)]

    expected = made()
    with moeflow.offload(model, "lru", 0.25):
        assert same(expected, made())
