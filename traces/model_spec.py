"""What a simulator must know about a model: its shapes, and the bytes and operations they imply."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Bits per weight, scales included. GGUF blocks: q4_0 is 18 bytes for 32 weights, q4_k 144 bytes for 256.
BITS = {
    "float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "float8": 8.0, "mxfp4": 4.25, "q4_0": 4.5, "q4_k": 4.5,
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """Geometry of one attention layer. `kind` is `gqa` (also MHA and MQA) or `mla` (DeepSeek's latent form)."""

    kind: str
    heads: int
    kv_heads: int
    head_dim: int  # gqa: of q, k and v; mla: the part of q and k without rotary embedding
    rope_head_dim: int = 0  # mla only
    v_head_dim: int = 0  # mla only
    kv_lora_rank: int = 0  # mla only
    q_lora_rank: int = 0  # mla only; 0 = queries are projected directly

    def parameters(self, hidden: int) -> int:
        """Weights of the projections of one layer."""
        if self.kind == "gqa":
            return hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        query_width = self.heads * (self.head_dim + self.rope_head_dim)
        query = (hidden + query_width) * self.q_lora_rank if self.q_lora_rank else hidden * query_width
        down = hidden * (self.kv_lora_rank + self.rope_head_dim)
        up = self.kv_lora_rank * self.heads * (self.head_dim + self.v_head_dim)
        return query + down + up + self.heads * self.v_head_dim * hidden

    def cached_values_per_token(self) -> int:
        """Numbers that the KV cache of one layer keeps for one token."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.rope_head_dim
        return 2 * self.kv_heads * self.head_dim

    def score_width(self) -> int:
        """Multiply-adds per (query token, key token) pair over all heads: scores plus weighted values."""
        if self.kind == "mla":
            return self.heads * (2 * self.kv_lora_rank + self.rope_head_dim)
        return 2 * self.heads * self.head_dim


@dataclass(frozen=True)
class Routing:
    """How router logits become a choice."""

    score: str = "softmax"  # softmax | sigmoid
    bias: bool = False  # a correction bias enters the choice but not the weights
    groups: int = 1
    groups_kept: int = 1
    renormalise: bool = False  # the k weights are divided by their sum


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of one MoE model. Sizes are in elements unless a name says bytes; layers count from 0."""

    name: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    intermediate: int  # width of one routed expert
    attention: Attention
    vocabulary: int
    routing: Routing = field(default_factory=Routing)
    matrices: int = 3  # per expert: 3 gated, 2 plain
    shared_intermediate: int = 0  # summed width of the experts that every token uses
    dense_intermediate: int = 0  # width of the feed-forward block in layers that have no router
    tied_embeddings: bool = False
    dtype: str = "bfloat16"  # of everything but routed experts
    expert_dtype: str = ""  # of routed experts; empty = dtype

    def __post_init__(self) -> None:
        if not self.moe_layers or list(self.moe_layers) != sorted(set(self.moe_layers)):
            raise ValueError(f"model {self.name}: moe_layers must be distinct and ascending")
        if not 0 <= self.moe_layers[0] <= self.moe_layers[-1] < self.layers:
            raise ValueError(f"model {self.name}: moe_layers must lie in 0..{self.layers - 1}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"model {self.name}: top_k must lie in 1..{self.experts}")
        for name in {self.dtype, self.expert_dtype or self.dtype} - BITS.keys():
            raise ValueError(f"model {self.name}: unknown dtype {name!r}; known: {', '.join(BITS)}")

    @property
    def bytes_per_expert(self) -> int:
        """Bytes one routed expert occupies and one copy of it moves."""
        bits = BITS[self.expert_dtype or self.dtype]
        return round(self.matrices * self.hidden * self.intermediate * bits / 8)

    @property
    def routed_bytes(self) -> int:
        """Bytes of all routed experts."""
        return len(self.moe_layers) * self.experts * self.bytes_per_expert

    def layer_dense_bytes(self, layer: int) -> int:
        """Bytes of a layer's always-resident weights: attention, norms, router, shared or dense feed-forward."""
        width = self.shared_intermediate if layer in self.moe_layers else self.dense_intermediate
        router = self.experts * self.hidden if layer in self.moe_layers else 0
        feed_forward = self.matrices * self.hidden * width
        parameters = self.attention.parameters(self.hidden) + feed_forward + router + 2 * self.hidden
        return round(parameters * BITS[self.dtype] / 8)

    @property
    def _unquantised_bits(self) -> float:
        """Of embeddings, LM head and KV cache, which stay at 16 bits where the weights have fewer."""
        return max(16.0, BITS[self.dtype])

    @property
    def head_bytes(self) -> int:
        """Bytes that producing the next token's logits reads."""
        return round(self.vocabulary * self.hidden * self._unquantised_bits / 8)

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything that is not a routed expert: layers, embedding, LM head."""
        embeddings = self.head_bytes * (1 if self.tied_embeddings else 2)
        return sum(self.layer_dense_bytes(layer) for layer in range(self.layers)) + embeddings

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one token adds, over all layers."""
        return round(self.layers * self.attention.cached_values_per_token() * self._unquantised_bits / 8)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML; `from_dict` reads them back."""
        return {**asdict(self), "moe_layers": list(self.moe_layers)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`. Raises ValueError or TypeError for missing, unknown or impossible values."""
        return cls(
            **{
                **values,
                "moe_layers": tuple(values["moe_layers"]),
                "attention": Attention(**values["attention"]),
                "routing": Routing(**values.get("routing", {})),
            }
        )
