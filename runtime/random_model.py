"""A model as large as a known one, with random weights: its speed can be measured without a download."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..traces.model_spec import Attention, ModelSpec
from ..traces.models import load_model_spec
from .backend import available_ram

SPREAD = 0.02  # of the weights: activations neither vanish nor overflow. Chosen here
PATTERN = 1 << 20  # random numbers that every weight repeats: speed does not depend on what they are
POSITIONS = 1 << 15  # that the model takes. Chosen here
# Bundled spec -> transformers' model type
FAMILIES = {
    "olmoe-1b-7b": "olmoe",
    "mixtral-8x7b": "mixtral",
    "qwen3-30b-a3b": "qwen3_moe",
    "qwen3-235b-a22b": "qwen3_moe",
    "qwen1.5-moe-a2.7b": "qwen2_moe",
    "deepseek-v2-lite": "deepseek_v2",
    "phi-3.5-moe": "phimoe",
}


def random_model(name: str, shrink: int = 1) -> Any:
    """The model of a bundled spec in host memory, every width divided by `shrink`; routing geometry as it is.

    Raises InputError for a spec without such a model, widths that `shrink` does not divide, or too little memory.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = config_of(name, spec := shrunk(load_model_spec(name), shrink))
    size, free = spec.routed_bytes + spec.dense_bytes, available_ram()
    if size > free:
        raise InputError(
            f"{name} takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of host memory are free: give --shrink "
            f"{2 * shrink}, which takes about a quarter"
        )
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.dtype))
    fill(model)
    return model.eval()


def shrunk(spec: ModelSpec, by: int) -> ModelSpec:
    """The spec with every width divided by `by`. Raises InputError where that leaves a remainder or an odd head."""
    attention = spec.attention
    dimensions = [one.name for one in fields(Attention) if one.name.endswith(("_dim", "_rank"))]
    parts: dict[str, Any] = {name: _divided(spec, name, getattr(attention, name), by) for name in dimensions}
    if any(parts[name] % 2 for name in ("head_dim", "rope_head_dim")):
        raise InputError(f"--shrink {by}: leaves {spec.name} attention heads of an odd width; give a smaller one")
    widths = ("hidden", "intermediate", "shared_intermediate", "dense_intermediate")
    shapes: dict[str, Any] = {name: _divided(spec, name, getattr(spec, name), by) for name in widths}
    return replace(spec, attention=replace(attention, **parts), **shapes)


def _divided(spec: ModelSpec, name: str, value: int, by: int) -> int:
    if by < 1 or value % by:
        raise InputError(f"--shrink {by}: does not divide {name} = {value} of {spec.name}; give a power of two")
    return value // by


def config_of(name: str, spec: ModelSpec) -> Any:
    """transformers' configuration of a bundled spec, with the shapes of `spec`. Raises InputError."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name not in FAMILIES:
        raise InputError(
            f"{name} cannot be made with random weights yet; known: {', '.join(FAMILIES)}, or give a checkpoint"
        )
    kind, attention = FAMILIES[name], spec.attention
    shapes: dict[str, Any] = {
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "num_experts_per_tok": spec.top_k,
        "norm_topk_prob": spec.routing.renormalise,
        "tie_word_embeddings": spec.tied_embeddings,
        "max_position_embeddings": POSITIONS,
        "dtype": spec.dtype,
    }
    count = {"mixtral": "num_local_experts", "phimoe": "num_local_experts", "deepseek_v2": "n_routed_experts"}
    shapes[count.get(kind, "num_experts")] = spec.experts
    whole = kind in ("olmoe", "mixtral", "phimoe")
    shapes["intermediate_size" if whole else "moe_intermediate_size"] = spec.intermediate
    if kind in ("mixtral", "qwen3_moe"):
        shapes["head_dim"] = attention.head_dim
    if kind == "qwen2_moe":
        shapes["shared_expert_intermediate_size"] = spec.shared_intermediate
    if kind == "deepseek_v2":
        shapes |= {
            "intermediate_size": spec.dense_intermediate,
            "first_k_dense_replace": spec.moe_layers[0],
            "n_shared_experts": spec.shared_intermediate // spec.intermediate,
            "kv_lora_rank": attention.kv_lora_rank,
            "q_lora_rank": attention.q_lora_rank or None,
            "qk_nope_head_dim": attention.head_dim,
            "qk_rope_head_dim": attention.rope_head_dim,
            "v_head_dim": attention.v_head_dim,
            "head_dim": attention.rope_head_dim,
        }
    return CONFIG_MAPPING[kind](**shapes)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Norms get ones, everything else the same random numbers over and over."""
    numbers = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0)) * SPREAD
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
            continue
        flat, pattern = parameter.view(-1), numbers.to(parameter.dtype)
        for first in range(0, flat.numel(), PATTERN):
            part = flat[first : first + PATTERN]
            part.copy_(pattern[: part.numel()])
