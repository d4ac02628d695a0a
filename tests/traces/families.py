"""Tiny models with random weights, one per MoE family: enough to run every line of its routing, nothing more."""

from __future__ import annotations

from typing import Any

from moeflow.traces.model_spec import Attention, ModelSpec

VOCABULARY = 97
EXPERTS, TOP_K = 8, 2

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BODY = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_experts_per_tok": TOP_K,
}
_LOCAL = {"num_local_experts": EXPERTS}
_PLAIN = {"num_experts": EXPERTS, "moe_intermediate_size": 16}
_SHARED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 16}
_GROUPED = {**_SHARED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR_FIRST = ["linear_attention", "full_attention", "full_attention"]
_SLIDING_FIRST = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 16}

# model type -> its configuration
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_BODY, **_LOCAL},
    "qwen2_moe": {**_BODY, **_PLAIN, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": {
        **_BODY,
        **_PLAIN,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        **_BODY,
        **_PLAIN,
        "layer_types": _LINEAR_FIRST,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "olmoe": {**_BODY, "num_experts": EXPERTS},
    "flex_olmo": {**_BODY, "num_experts": EXPERTS},
    "deepseek_v2": {**_BODY, **_GROUPED, **_LATENT, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": {**_BODY, **_GROUPED, **_LATENT},
    "glm4_moe": {**_BODY, **_GROUPED},
    "glm4_moe_lite": {**_BODY, **_GROUPED, **_LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots1": {**_BODY, **_GROUPED},
    "gpt_oss": {**_BODY, **_LOCAL, **_SLIDING_FIRST},
    "granitemoe": {**_BODY, **_LOCAL},
    "phimoe": {**_BODY, **_LOCAL},
    "minimax": {**_BODY, **_LOCAL, "layer_types": _LINEAR_FIRST, "block_size": 16},
    "minimax_m2": {**_BODY, **_LOCAL, "rotary_dim": 8},
    "ernie4_5_moe": {
        **_BODY,
        "moe_k": TOP_K,
        "moe_num_experts": EXPERTS,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "hunyuan_v1_moe": {**_BODY, "moe_topk": TOP_K, "num_experts": EXPERTS},
    "lfm2_moe": {
        **_BODY,
        **_PLAIN,
        "layer_types": ["conv", "full_attention", "full_attention"],
        "num_dense_layers": 1,
    },
    "jamba": {
        **_BODY,
        "num_experts": EXPERTS,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "afmoe": {**_BODY, **_PLAIN, **_SLIDING_FIRST, "num_dense_layers": 1, "num_shared_experts": 1, "route_norm": True},
    "exaone_moe": {
        **_BODY,
        **_PLAIN,
        "num_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "layer_types": ["full_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "first_k_dense_replace": 1,
    },
    "cohere2_moe": {**_BODY, **_PLAIN, "first_k_dense_replace": 0, "num_shared_experts": 0},
    "gemma4_text": {
        **_BODY,
        **_PLAIN,
        "enable_moe_block": True,
        "top_k_experts": TOP_K,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 8,
    },
    "nemotron_h": {
        **_BODY,
        **_SHARED,
        "layers_block_type": ["attention", "moe", "moe"],
        "moe_shared_expert_intermediate_size": 16,
    },
    "dbrx": {
        **_TOKENS,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "hidden_size": 32},
    },
    "llama4_text": {
        **_BODY,
        **_LOCAL,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 48,
        "num_experts_per_tok": 1,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_BODY,
            **_PLAIN,
            "decoder_sparse_step": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    },
    "switch_transformers": {
        **_TOKENS,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 24,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": EXPERTS,
        "expert_capacity": 3,
        "decoder_start_token_id": 0,
    },
}


# Families whose shapes `spec_from_config` does not read: the caller of `record_routing` says them.
SPECS = {
    "dbrx": ModelSpec(
        name="dbrx",
        layers=3,
        moe_layers=(0, 1, 2),
        experts=EXPERTS,
        top_k=TOP_K,
        hidden=32,
        intermediate=16,
        attention=Attention("gqa", 4, 2, 8),
        vocabulary=VOCABULARY,
        dtype="float32",
    )
}


def tiny_model(family: str) -> Any:
    """A model of `family` in eval mode: float32, weights spread out so that choices vary."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    loaders = {"qwen3_vl_moe": AutoModelForImageTextToText, "switch_transformers": AutoModelForSeq2SeqLM}
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = loaders.get(family, AutoModelForCausalLM).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):  # the correction that enters the choice but not the weights
                buffer.normal_(0, 0.05)
    return model
