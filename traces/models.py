"""Model specs by name, from a YAML document, or from a Hugging Face `config.json`.

A `config.json` is read through tables of the spellings that families use for one meaning. What a family leaves out
because its code fixes it stands in `ROUTING` (read in transformers 5.23, `modeling_<model_type>.py`); any other
missing key is an error, never a class default: OLMoE's expert width is 1024 where its class says 2048.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import InputError
from .model_spec import Attention, ModelSpec, Routing

FOLDER = Path(__file__).with_suffix("")

KEYS = {
    "layers": ("num_hidden_layers", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "d_model"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token"),
    "expert_width": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "dense_width": ("intermediate_size_mlp", "dense_intermediate_size", "intermediate_size"),
    "heads": ("num_attention_heads", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "vocabulary": ("vocab_size",),
    "tied": ("tie_word_embeddings",),
    "dtype": ("dtype", "torch_dtype"),
    "renormalise": ("norm_topk_prob", "route_norm", "moe_renormalize"),
    "score": ("scoring_func", "score_func", "moe_router_activation_func", "expert_selection_fn"),
    "groups": ("n_group", "num_expert_group"),
    "groups_kept": ("topk_group",),
    "shared_width": (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    "shared_count": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
}

# Is layer i a MoE layer? Every rule whose key is present must agree.
LAYER_RULES: dict[str, Callable[[Any, int], bool]] = {
    "first_k_dense_replace": lambda dense, i: i >= dense,
    "num_dense_layers": lambda dense, i: i >= dense,
    "moe_layer_freq": lambda freq, i: bool(freq[i]) if isinstance(freq, list) else i % freq == 0,
    "decoder_sparse_step": lambda step, i: step > 0 and (i + 1) % step == 0,
    "mlp_only_layers": lambda dense, i: i not in dense,
    "moe_layers": lambda sparse, i: i in sparse,
    "interleave_moe_layer_step": lambda step, i: step > 0 and (i + 1) % step == 0,
    "mlp_layer_types": lambda types, i: types[i] in ("sparse", "moe"),
    "moe_layer_interval": lambda step, i: (i + 1) % step == 0,
    "moe_layer_start_index": lambda start, i: i >= start,
    "moe_layer_end_index": lambda end, i: end < 0 or i <= end,
    "layers_block_type": lambda types, i: types[i] == "moe" or "moe" not in types,
}
# Families that mix dense and MoE layers: one of the rules must be there.
MIXED_LAYERS = {
    "qwen2_moe", "qwen3_moe", "qwen3_next", "llama4", "ernie4_5_moe", "jamba", "lfm2_moe", "nemotron_h",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "glm4v_moe", "dots1", "exaone_moe",
}  # fmt: skip

# Families whose experts have the width `intermediate_size` when no `moe_intermediate_size` is given.
PLAIN_WIDTH = {
    "mixtral", "olmoe", "flex_olmo", "phimoe", "gpt_oss", "minimax", "minimax_m2", "llama4", "aria", "jamba",
    "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa", "hunyuan_v1_moe", "cohere2_moe",
}  # fmt: skip
UNGATED = {"switch_transformers", "nllb_moe", "nemotron_h"}  # two matrices per expert
# Their `head_dim` has a class default of its own; elsewhere its absence means hidden / heads.
CLASS_HEAD_DIM = {"gpt_oss", "qwen3_next", "qwen3_5_moe", "glm4_moe_lite", "llama4", "gemma4", "minimax_m2"}

# What a family's code fixes: score, bias, renormalise (None = the configuration says).
_SIGMOID_BIAS = ("sigmoid", True, None)
_CHOSEN_SUM = ("softmax", False, True)
_AS_CONFIGURED = ("softmax", False, None)
_AS_SCORED = ("softmax", False, False)
ROUTING: dict[str, tuple[str, bool, bool | None]] = {
    **dict.fromkeys(("mixtral", "minimax", "gpt_oss", "aria", "jetmoe", "hunyuan_v1_moe"), _CHOSEN_SUM),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"), _CHOSEN_SUM),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_5_moe", "gemma4"), _CHOSEN_SUM),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe"), _AS_CONFIGURED),
    **dict.fromkeys(("olmoe", "flex_olmo", "mistral4"), _AS_CONFIGURED),
    **dict.fromkeys(("phimoe", "jamba", "deepseek_v2", "switch_transformers"), _AS_SCORED),
    **dict.fromkeys(("ernie4_5_moe", "ernie4_5_vl_moe"), ("softmax", True, True)),
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "solar_open"), _SIGMOID_BIAS),
    **dict.fromkeys(("glm4_moe", "glm4v_moe", "glm4_moe_lite", "glm_moe_dsa"), _SIGMOID_BIAS),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid", "mimo_v2_flash", "nemotron_h", "lfm2_moe"), _SIGMOID_BIAS),
    **dict.fromkeys(("minimax_m2", "afmoe"), ("sigmoid", True, True)),
    "llama4": ("sigmoid", False, False),
}
NESTED = ("thinker_config", "text_config", "llm_config", "language_config")
INHERITED = ("dtype", "torch_dtype", "quantization_config", "_name_or_path")


def load_model_spec(name_or_path: str | Path) -> ModelSpec:
    """A spec by bundled name, from a YAML file, a `config.json`, or a folder that holds one.

    Raises InputError for an unknown name, an unreadable file, a missing key or a model without routed experts.
    """
    path = Path(name_or_path)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.is_file() and path.suffix == ".json":
        return spec_from_config(_read_json(path), name=path.resolve().parent.name, where=str(path))
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return _spec_from_yaml(path, str(path))
    name = str(name_or_path).removesuffix(".yaml")
    if name in list_model_specs():
        return _spec_from_yaml(FOLDER / f"{name}.yaml", f"traces/models/{name}.yaml")
    close = get_close_matches(name.rpartition("/")[2].lower(), list_model_specs(), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(list_model_specs())}"
    raise InputError(f"no model spec {str(name_or_path)!r}; {hint} A config.json, its folder or a YAML file works too")


def list_model_specs() -> tuple[str, ...]:
    """Names of the bundled specs, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def spec_from_config(config: dict[str, Any], name: str = "", where: str = "") -> ModelSpec:
    """The spec of a Hugging Face configuration, as `config.json` holds it or `model.config.to_dict()` gives it.

    `name` and `where` are what the spec and the messages call it. Hybrid models (linear attention, Mamba, sliding
    windows) are described as if every layer had full attention: KV bytes are then an upper bound.
    Raises InputError naming the first key that is missing or not understood.
    """
    given = _Config(config, where)
    name = name or Path(str(given.values.get("_name_or_path") or given.type or "model")).name
    try:
        return _switch(given, name) if given.type == "switch_transformers" else _decoder(given, name)
    except InputError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{given.where}: {error}; correct the configuration") from None


class _Config:
    """The language model's part of a configuration, asked by meaning."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        values = dict(config)
        for key in NESTED:
            if isinstance(values.get(key), dict):
                values = {**values[key], **_inherited(values, values[key])}
        self.values = values
        self.type = str(values.get("model_type", "")).removesuffix("_text")
        self.where = where or f"configuration of model type {self.type or 'unknown'!r}"

    def find(self, meaning: str) -> Any:
        """The value under the first spelling that is present and not null, else None."""
        found = (self.values.get(key) for key in KEYS[meaning])
        return next((value for value in found if value is not None), None)

    def need(self, meaning: str) -> Any:
        value = self.find(meaning)
        if value is None:
            raise self.missing(*KEYS[meaning])
        return value

    def missing(self, key: str, *others: str) -> InputError:
        also = f" (or {', '.join(others)})" if others else ""
        return InputError(f"{self.where}: {key}{also} is missing; add it, class defaults are never assumed")


def _inherited(outer: dict[str, Any], inner: dict[str, Any]) -> dict[str, Any]:
    """What a language model nested in a larger one takes from the larger one's configuration."""
    tied = {key: outer[key] for key in ("tie_word_embeddings",) if outer.get(key) is not None}
    gaps = {key: outer[key] for key in INHERITED if outer.get(key) is not None and inner.get(key) is None}
    return {**tied, **gaps}


def _decoder(config: _Config, name: str) -> ModelSpec:
    experts = config.find("experts")
    if not experts or experts == 1 or config.values.get("enable_moe_block") is False:
        raise InputError(f"{config.where}: has no routed experts, so there is nothing to offload; give a MoE model")
    layers = len(config.values.get("layers_block_type") or ()) or config.need("layers")
    moe_layers = _moe_layers(config, layers)
    width = _expert_width(config)
    dtype, expert_dtype = _dtypes(config)
    return ModelSpec(
        name=name,
        layers=layers,
        moe_layers=moe_layers,
        experts=_same(config, "experts", experts),
        top_k=_same(config, "top_k", config.need("top_k")),
        hidden=config.need("hidden"),
        intermediate=width,
        attention=_attention(config),
        vocabulary=config.need("vocabulary"),
        routing=_routing(config),
        matrices=2 if config.type in UNGATED else 3,
        shared_intermediate=_shared_width(config, width),
        dense_intermediate=config.need("dense_width") if len(moe_layers) < layers else 0,
        tied_embeddings=bool(config.need("tied")),
        dtype=dtype,
        expert_dtype=expert_dtype,
    )


def _switch(config: _Config, name: str) -> ModelSpec:
    """T5-shaped: encoder layers, then decoder layers; cross-attention is left out of the dense bytes."""
    values = config.values
    for key in ("d_kv", "d_ff", "num_sparse_encoder_layers", "num_sparse_decoder_layers", "num_decoder_layers"):
        if values.get(key) is None:
            raise config.missing(key)
    encoder, decoder = config.need("layers"), values["num_decoder_layers"]
    sparse = _every(encoder, values["num_sparse_encoder_layers"])
    sparse += [encoder + i for i in _every(decoder, values["num_sparse_decoder_layers"])]
    heads = config.need("heads")
    dtype, expert_dtype = _dtypes(config)
    return ModelSpec(
        name=name,
        layers=encoder + decoder,
        moe_layers=tuple(sparse),
        experts=config.need("experts"),
        top_k=1,  # what Switch means
        hidden=config.need("hidden"),
        intermediate=values["d_ff"],
        attention=Attention("gqa", heads, heads, values["d_kv"]),
        vocabulary=config.need("vocabulary"),
        routing=_routing(config),
        matrices=2,
        dense_intermediate=values["d_ff"],
        tied_embeddings=bool(config.need("tied")),
        dtype=dtype,
        expert_dtype=expert_dtype,
    )


def _every(layers: int, sparse: int) -> list[int]:
    step = layers // sparse if sparse else 0
    return [i for i in range(layers) if step and (i % step == 1 or step == 1)]


def _moe_layers(config: _Config, layers: int) -> tuple[int, ...]:
    rules = {key: rule for key, rule in LAYER_RULES.items() if config.values.get(key) is not None}
    period, offset = config.values.get("expert_layer_period"), config.values.get("expert_layer_offset")
    if not rules and period is None and config.type in MIXED_LAYERS:
        raise config.missing("first_k_dense_replace", "decoder_sparse_step", "mlp_layer_types")
    chosen = [i for i in range(layers) if all(rule(config.values[key], i) for key, rule in rules.items())]
    if period is not None and offset is not None:
        chosen = [i for i in chosen if i % period == offset]
    return tuple(chosen)


def _expert_width(config: _Config) -> int:
    width = config.find("expert_width")
    if width is None and config.type in PLAIN_WIDTH:
        width = config.values.get("intermediate_size")
    return _same(config, "expert_width", width if width is not None else config.need("expert_width"))


def _same(config: _Config, meaning: str, value: Any) -> int:
    """One number, or a list per layer whose entries agree."""
    if not isinstance(value, list):
        return int(value)
    if len(set(value)) != 1:
        raise InputError(f"{config.where}: {KEYS[meaning][0]} differs between layers, which a spec cannot describe")
    return int(value[0])


def _shared_width(config: _Config, width: int) -> int:
    if config.type == "llama4":  # one shared expert beside the routed ones, always
        return width
    direct = config.find("shared_width")
    if direct is None and config.type == "qwen2_moe":
        raise config.missing("shared_expert_intermediate_size")
    count = config.find("shared_count") or 0
    return int(direct) if direct is not None else _same(config, "shared_count", count) * width


def _attention(config: _Config) -> Attention:
    heads, hidden = config.need("heads"), config.need("hidden")
    values = config.values
    if values.get("kv_lora_rank"):
        for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            if values.get(key) is None:
                raise config.missing(key)
        return Attention(
            kind="mla",
            heads=heads,
            kv_heads=config.find("kv_heads") or heads,
            head_dim=values["qk_nope_head_dim"],
            rope_head_dim=values["qk_rope_head_dim"],
            v_head_dim=values["v_head_dim"],
            kv_lora_rank=values["kv_lora_rank"],
            q_lora_rank=values.get("q_lora_rank") or 0,
        )
    if values.get("head_dim") is None and config.type in CLASS_HEAD_DIM:
        raise config.missing("head_dim")
    if not any(key in values for key in KEYS["kv_heads"]):
        raise config.missing(*KEYS["kv_heads"])
    kv_heads = config.find("kv_heads") or heads  # null: as many as query heads
    return Attention("gqa", heads, kv_heads, values.get("head_dim") or hidden // heads)


def _routing(config: _Config) -> Routing:
    score, bias, renormalise = ROUTING.get(config.type, (None, False, None))
    score = config.find("score") or score
    if score not in ("softmax", "sigmoid"):
        if score is None:
            raise config.missing(*KEYS["score"])
        raise InputError(f"{config.where}: scoring_func {score!r} is unknown; known: softmax, sigmoid")
    if "use_expert_bias" in config.values:
        bias = bool(config.values["use_expert_bias"])
    if renormalise is None:
        renormalise = bool(config.need("renormalise"))
    return Routing(
        score=score,
        bias=bias or config.values.get("topk_method") == "noaux_tc",
        groups=config.find("groups") or 1,
        groups_kept=config.find("groups_kept") or 1,
        renormalise=renormalise,
    )


def _dtypes(config: _Config) -> tuple[str, str]:
    """dtype of the model and of its routed experts."""
    if not any(key in config.values for key in KEYS["dtype"]):
        raise config.missing(*KEYS["dtype"])
    dtype = str(config.find("dtype") or "float32").removeprefix("torch.")  # null: torch's own default
    quantised = config.values.get("quantization_config")
    if not quantised:
        return dtype, ""
    method = quantised.get("quant_method")
    if method == "fp8":
        return "float8", "float8"
    if method == "mxfp4":
        return dtype, "mxfp4"
    raise InputError(f"{config.where}: quantisation {method!r} is not understood; known: fp8, mxfp4")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); give a Hugging Face config.json") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object; give a Hugging Face config.json")
    return values


# --- specs as YAML documents


def _spec_from_yaml(path: Path, where: str) -> ModelSpec:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: cannot be read as YAML ({reason}); correct the file") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: holds no keys; a model spec begins with `name:`")
    if not isinstance(values.pop("source", None), str):
        raise InputError(f"{where}: source: missing; say where the shapes come from")
    _check_keys(values, ModelSpec, where, "")
    _check_keys(values["attention"], Attention, where, "attention.")
    _check_keys(values.get("routing", {}), Routing, where, "routing.")
    values["moe_layers"] = _layer_list(values["moe_layers"], where)
    try:
        return ModelSpec.from_dict(values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}; correct the file") from None


def _check_keys(values: Any, cls: type[Any], where: str, at: str) -> None:
    """Every key known, every required one present, every plain value of the field's type."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: {at.removesuffix('.')}: must hold keys, not {values!r}")
    types = {item.name: str(item.type) for item in fields(cls)}
    for key, value in values.items():
        if key not in types:
            raise InputError(f"{where}: {at}{key}: unknown key; known: {', '.join(types)}")
        if types[key] in ("int", "str", "bool") and type(value).__name__ != types[key]:
            raise InputError(f"{where}: {at}{key}: must be {types[key]}, not {value!r}")
    for item in fields(cls):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{where}: {at}{item.name}: missing; give it")


def _layer_list(value: Any, where: str) -> list[int]:
    """`[1, 2, 3]` or `1..3`."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)", value) if isinstance(value, str) else None
    if match:
        return list(range(int(match[1]), int(match[2]) + 1))
    if isinstance(value, list) and all(type(layer) is int for layer in value):
        return value
    raise InputError(f"{where}: moe_layers: must be a list of layers or a range such as 1..26, not {value!r}")
