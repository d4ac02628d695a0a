"""Bundled model specs, and specs read from Hugging Face configurations."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from moeflow.traces.model_spec import ModelSpec
from moeflow.traces.models import list_model_specs, load_model_spec, spec_from_config

from moeflow.errors import InputError

# MB per expert, GB of all routed experts, KiB of KV per token: notes/hardware_models.md section 7, as shipped.
TABLE = {
    "mixtral-8x7b": (352.3, 90.2, 128),
    "phi-3.5-moe": (157.3, 80.5, 128),
    "olmoe-1b-7b": (12.58, 12.9, 128),
    "qwen1.5-moe-a2.7b": (17.30, 24.9, 192),
    "qwen3-30b-a3b": (9.44, 58.0, 96),
    "qwen3-235b-a22b": (37.75, 454, 188),
    "qwen3-next-80b-a3b": (6.29, 154.6, 96),  # 24 KiB really: a spec has full attention in every layer
    "deepseek-v2-lite": (17.30, 28.8, 30.4),
    "deepseek-v3": (44.0, 654, 68.6),
    "glm-4.5-air": (34.60, 199, 184),
    "gpt-oss-20b": (13.2, 10.15, 48),
    "gpt-oss-120b": (13.2, 60.9, 72),
}
# Billions of parameters that the model cards state.
CARD = {
    "mixtral-8x7b": 46.7,
    "phi-3.5-moe": 41.9,
    "olmoe-1b-7b": 6.92,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "qwen3-next-80b-a3b": 80.0,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671.0,
    "glm-4.5-air": 106.9,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
}
# Billions of weights that a spec leaves out: 36 linear layers of 33.7 M and 12 gated ones of 27.3 M counted as 18.9 M.
UNDESCRIBED = {"qwen3-next-80b-a3b": 36 * 0.0148 + 12 * 0.0084}


def gqa(hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        **more,
    }


def qwen(kind: str, experts: int, top_k: int, width: int, norm: bool) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": width,
        "norm_topk_prob": norm,
        "decoder_sparse_step": 1,
    }


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return gqa(
        2880, layers, 64, 8, 201088,
        model_type="gpt_oss", head_dim=64, intermediate_size=2880, num_local_experts=experts,
        num_experts_per_tok=4, experts_per_token=4, sliding_window=128,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    )  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": gqa(
        4096, 32, 32, 8, 32000,
        model_type="mixtral", intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2,
    ),
    "phi-3.5-moe": gqa(
        4096, 32, 32, 8, 32064,
        model_type="phimoe", intermediate_size=6400, num_local_experts=16, num_experts_per_tok=2,
    ),
    "olmoe-1b-7b": gqa(
        2048, 16, 16, 16, 50304,
        model_type="olmoe", intermediate_size=1024, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
    ),
    "qwen1.5-moe-a2.7b": gqa(
        2048, 24, 16, 16, 151936,
        intermediate_size=5632, shared_expert_intermediate_size=5632, **qwen("qwen2_moe", 60, 4, 1408, False),
    ),
    "qwen3-30b-a3b": gqa(
        2048, 48, 32, 4, 151936,
        head_dim=128, intermediate_size=6144, mlp_only_layers=[], **qwen("qwen3_moe", 128, 8, 768, True),
    ),
    "qwen3-235b-a22b": gqa(
        4096, 94, 64, 4, 151936,
        head_dim=128, intermediate_size=12288, mlp_only_layers=[], **qwen("qwen3_moe", 128, 8, 1536, True),
    ),
    "qwen3-next-80b-a3b": gqa(
        2048, 48, 16, 2, 151936,
        head_dim=256, intermediate_size=5120, mlp_only_layers=[], shared_expert_intermediate_size=512,
        full_attention_interval=4, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, **qwen("qwen3_next", 512, 10, 512, True),
    ),
    "deepseek-v2-lite": gqa(
        2048, 27, 16, 16, 102400,
        model_type="deepseek_v2", intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, moe_layer_freq=1, n_group=1,
        topk_group=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False, kv_lora_rank=512,
        q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    ),
    "deepseek-v3": gqa(
        7168, 61, 128, 128, 129280,
        model_type="deepseek_v3", intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, moe_layer_freq=1, n_group=8,
        topk_group=4, topk_method="noaux_tc", scoring_func="sigmoid", norm_topk_prob=True, kv_lora_rank=512,
        q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "glm-4.5-air": gqa(
        4096, 46, 96, 8, 151552,
        model_type="glm4_moe", head_dim=128, intermediate_size=10944, moe_intermediate_size=1408,
        n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=1, n_group=1,
        topk_group=1, norm_topk_prob=True,
    ),
    "gpt-oss-20b": gpt_oss(24, 32),
    "gpt-oss-120b": gpt_oss(36, 128),
}  # fmt: skip


def changed(name: str, **keys: Any) -> dict[str, Any]:
    """A configuration with other values; `...` takes a key out."""
    merged = {**CONFIGS[name], **keys}
    return {key: value for key, value in merged.items() if value is not ...}


# --- bundled specs


def test_every_promised_spec_is_bundled():
    assert list_model_specs() == tuple(sorted(TABLE))


@pytest.mark.parametrize("name", TABLE)
def test_sizes_are_those_of_the_table(name):
    spec = load_model_spec(name)
    megabytes, gigabytes, kibibytes = TABLE[name]
    assert spec.name == name
    assert spec.bytes_per_expert / 1e6 == pytest.approx(megabytes, rel=0.005)
    assert spec.routed_bytes / 1e9 == pytest.approx(gigabytes, rel=0.005)
    assert spec.kv_bytes_per_token / 1024 == pytest.approx(kibibytes, rel=0.005)


@pytest.mark.parametrize("name", TABLE)
def test_parameters_are_those_of_the_model_card(name):
    spec = load_model_spec(name)
    routed = len(spec.moe_layers) * spec.experts * spec.matrices * spec.hidden * spec.intermediate
    embeddings = 2 * spec.head_bytes  # 16 bits whatever the other weights have
    dense = embeddings / 2 + (spec.dense_bytes - embeddings) / (1 if spec.dtype == "float8" else 2)
    assert (routed + dense) / 1e9 + UNDESCRIBED.get(name, 0) == pytest.approx(CARD[name], rel=0.01)


@pytest.mark.parametrize("name", TABLE)
def test_a_bundled_spec_is_what_its_configuration_says(name):
    assert spec_from_config(CONFIGS[name], name=name) == load_model_spec(name)


@pytest.mark.parametrize("name", TABLE)
def test_a_spec_survives_json(name):
    spec = load_model_spec(name)
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_fp8_leaves_the_cache_and_the_head_at_16_bits():
    spec = load_model_spec("deepseek-v3")
    assert spec.kv_bytes_per_token == 61 * 576 * 2
    assert spec.head_bytes == 129280 * 7168 * 2


def test_gguf_blocks_count_their_scales():
    spec = replace(load_model_spec("qwen3-30b-a3b"), dtype="q4_k", expert_dtype="q4_k")
    assert spec.bytes_per_expert == 3 * 884736  # kekzl/imp #1409: one matrix of this model is 864 KiB


# --- finding


def test_config_json_and_its_folder_are_read(tmp_path):
    folder = tmp_path / "My-OLMoE"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["olmoe-1b-7b"]))
    spec = load_model_spec(folder)
    assert spec.name == "My-OLMoE"
    assert load_model_spec(folder / "config.json") == spec
    assert spec.intermediate == 1024


def test_a_yaml_spec_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SPEC)
    spec = load_model_spec(path)
    assert spec.moe_layers == (1, 2, 3)
    assert spec.attention.head_dim == 16


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(InputError, match=r"'qwen3-30b'; did you mean .*qwen3-30b-a3b"):
        load_model_spec("qwen3-30b")
    with pytest.raises(InputError, match=r"did you mean olmoe-1b-7b"):
        load_model_spec("allenai/OLMoE-1B-7B-0924")


SPEC = """
name: mine
source: a toy
layers: 4
moe_layers: 1..3
experts: 8
top_k: 2
hidden: 64
intermediate: 32
attention: {kind: gqa, heads: 4, kv_heads: 4, head_dim: 16}
vocabulary: 100
dense_intermediate: 128
"""
WRONG_SPECS = {
    "experts: 8": ("expert: 8", "expert: unknown key; known: name, layers"),
    "top_k: 2": ("", "top_k: missing"),
    "hidden: 64": ("hidden: 64.5", "hidden: must be int, not 64.5"),
    "heads: 4, ": ("head: 4, ", "attention.head: unknown key"),
    "1..3": ("1-3", "moe_layers: must be a list of layers or a range such as 1..26"),
    "layers: 4": ("layers: 3", "moe_layers must lie in 0..2"),
    "source: a toy": ("", "source: missing"),
    "attention: {kind: gqa, heads: 4, kv_heads: 4, head_dim: 16}": ("attention: 4", "attention: must hold keys"),
    "vocabulary: 100": ("vocabulary: [", "cannot be read as YAML"),
}


@pytest.mark.parametrize("line", WRONG_SPECS)
def test_a_wrong_yaml_spec_is_refused_with_its_path(tmp_path, line):
    replacement, sentence = WRONG_SPECS[line]
    path = tmp_path / "mine.yaml"
    path.write_text(SPEC.replace(line, replacement, 1))
    with pytest.raises(InputError) as error:
        load_model_spec(path)
    assert str(error.value).startswith(f"{path}: ")
    assert sentence in str(error.value)


# --- configurations of other families


def test_a_vision_language_model_nests_its_text_model():
    text = {**CONFIGS["qwen3-30b-a3b"], "model_type": "qwen3_vl_moe_text"}
    del text["torch_dtype"], text["tie_word_embeddings"], text["norm_topk_prob"]
    outer = {"model_type": "qwen3_vl_moe", "torch_dtype": "bfloat16", "tie_word_embeddings": False, "text_config": text}
    assert spec_from_config(outer, name="qwen3-30b-a3b") == load_model_spec("qwen3-30b-a3b")


def test_llama4_interleaves_and_has_one_shared_expert():
    keys = {
        "model_type": "llama4_text",
        "head_dim": 128,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    }
    spec = spec_from_config(gqa(5120, 48, 40, 8, 202048, **keys))
    assert spec.moe_layers == tuple(range(1, 48, 2))
    assert (spec.shared_intermediate, spec.dense_intermediate) == (8192, 16384)
    assert spec.routing.score == "sigmoid"
    assert spec.routed_bytes / 1e9 == pytest.approx(773, rel=0.005)


def test_granite_names_its_expert_width_intermediate_size():
    keys = {"model_type": "granitemoe", "intermediate_size": 512, "num_local_experts": 40, "num_experts_per_tok": 8}
    spec = spec_from_config(gqa(1536, 32, 24, 8, 49155, **keys))
    assert (spec.intermediate, spec.experts, spec.routing.renormalise) == (512, 40, True)


def test_minimax_m2_has_a_sigmoid_router_with_bias():
    keys = {
        "model_type": "minimax_m2",
        "head_dim": 128,
        "intermediate_size": 1536,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "quantization_config": {"quant_method": "fp8"},
    }
    spec = spec_from_config(gqa(3072, 62, 48, 8, 200064, **keys))
    assert (spec.routing.score, spec.routing.bias) == ("sigmoid", True)
    assert spec.bytes_per_expert / 1e6 == pytest.approx(28.31 / 2, rel=0.005)


def test_ernie_names_first_last_and_interval():
    keys = {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "intermediate_size": 12288,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    }
    spec = spec_from_config(gqa(2560, 28, 20, 4, 103424, **keys))
    assert spec.moe_layers == tuple(range(1, 28))
    assert (spec.top_k, spec.shared_intermediate) == (6, 3072)


def test_switch_numbers_encoder_layers_before_decoder_layers():
    spec = spec_from_config(
        {
            "model_type": "switch_transformers",
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_sparse_encoder_layers": 6,
            "num_sparse_decoder_layers": 6,
            "num_heads": 12,
            "num_experts": 128,
            "vocab_size": 32128,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
    )
    assert spec.moe_layers == tuple(range(1, 24, 2))
    assert spec.bytes_per_expert / 1e6 == pytest.approx(9.44, rel=0.005)
    assert spec.routed_bytes / 1e9 == pytest.approx(14.5, rel=0.005)


def test_layers_without_experts_are_left_out():
    config = changed("qwen3-30b-a3b", mlp_only_layers=[0, 1], decoder_sparse_step=2)
    spec = spec_from_config(config)
    assert spec.moe_layers == tuple(range(3, 48, 2))
    assert spec.dense_intermediate == 6144


def test_layers_may_be_listed_by_kind():
    config = changed("deepseek-v3", first_k_dense_replace=..., mlp_layer_types=["dense"] * 5 + ["sparse"] * 56)
    assert spec_from_config(config).moe_layers == tuple(range(5, 61))


def test_null_kv_heads_means_as_many_as_heads():
    assert spec_from_config(changed("olmoe-1b-7b", num_key_value_heads=None)).attention.kv_heads == 16


def test_dtype_spellings():
    assert spec_from_config(changed("olmoe-1b-7b", torch_dtype="float16")).dtype == "float16"
    assert spec_from_config(changed("olmoe-1b-7b", torch_dtype=..., dtype="torch.bfloat16")).dtype == "bfloat16"
    assert spec_from_config(changed("olmoe-1b-7b", torch_dtype=..., dtype=None)).dtype == "float32"


MISSING = {
    "hidden_size": "olmoe-1b-7b",
    "num_hidden_layers": "olmoe-1b-7b",
    "intermediate_size": "olmoe-1b-7b",
    "num_experts_per_tok": "mixtral-8x7b",
    "num_key_value_heads": "mixtral-8x7b",
    "vocab_size": "mixtral-8x7b",
    "tie_word_embeddings": "mixtral-8x7b",
    "torch_dtype": "mixtral-8x7b",
    "moe_intermediate_size": "qwen3-30b-a3b",
    "norm_topk_prob": "qwen3-30b-a3b",
    "shared_expert_intermediate_size": "qwen1.5-moe-a2.7b",
    "qk_rope_head_dim": "deepseek-v3",
    "head_dim": "gpt-oss-20b",
}


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_is_named_and_never_defaulted(key):
    with pytest.raises(InputError, match=rf"{key}\b.* is missing") as error:
        spec_from_config(changed(MISSING[key], **{key: ...}))
    assert "\n" not in str(error.value)


def test_a_mixed_family_must_say_which_layers_are_dense():
    config = changed("deepseek-v3", first_k_dense_replace=..., moe_layer_freq=...)
    with pytest.raises(InputError, match="first_k_dense_replace"):
        spec_from_config(config)


def test_an_unknown_routing_rule_is_asked_for():
    with pytest.raises(InputError, match="scoring_func"):
        spec_from_config(changed("olmoe-1b-7b", model_type="brand_new_moe", moe_intermediate_size=1024))


def test_unknown_quantisation_is_refused():
    with pytest.raises(InputError, match="quantisation 'awq' is not understood; known: fp8, mxfp4"):
        spec_from_config(changed("mixtral-8x7b", quantization_config={"quant_method": "awq"}))


def test_a_dense_model_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(gqa(4096, 32, 32, 8, 128256, model_type="llama", intermediate_size=14336)))
    with pytest.raises(InputError, match=r"config\.json: has no routed experts"):
        load_model_spec(path)


@pytest.mark.parametrize("text", ["{", "[]", '"olmoe"'])
def test_a_broken_config_json_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config\.json: .*give a Hugging Face config\.json"):
        load_model_spec(path)


# --- against the modules themselves

FAMILIES = "mixtral qwen2_moe qwen3_moe olmoe deepseek_v3 gpt_oss glm4_moe granitemoe phimoe minimax_m2".split()  # noqa: SIM905


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spec_counts_the_experts_that_transformers_builds(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=5)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    experts = [module for path, module in model.named_modules() if path.endswith(".experts")]
    weights = sum(
        value.numel() for module in experts for name, value in module.named_parameters() if "bias" not in name
    )
    spec = spec_from_config(config.to_dict())
    assert len(spec.moe_layers) == len(experts)
    assert spec.routed_bytes == weights * 4
    total = sum(value.numel() for name, value in model.named_parameters())
    assert spec.dense_bytes / 4 == pytest.approx(total - weights, rel=0.03)  # biases and small norms are left out
