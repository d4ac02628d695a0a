"""The tiny MoE's configuration and what training adds to it: a fast expert function and the router's losses."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

KINDS = ("prose", "dialogue", "docs", "code")
BOS, EOS, PAD = 0, 1, 2
LAYERS, EXPERTS, TOP_K = 16, 64, 8


def config() -> OlmoeConfig:
    """OLMoE-1B-7B's routing geometry (16 layers, 64 experts, top-8, gate weights not renormalised), narrow."""
    return OlmoeConfig(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=40,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


class _SortedExperts(torch.autograd.Function):
    """SwiGLU experts over tokens sorted by expert: one matrix product per expert, written in place.

    On two CPU cores this trains about 1.2 times as fast as `grouped_mm` and gives the same result.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
    ) -> torch.Tensor:
        """x [T, H], index and weight [T, K], gate_up [E, 2I, H], down [E, H, I] -> [T, H]."""
        order = torch.argsort(index.reshape(-1), stable=True)
        counts = torch.bincount(index.reshape(-1), minlength=len(down)).tolist()
        token, share = order // index.shape[1], weight.reshape(-1)[order].unsqueeze(-1)
        rows = x[token]
        both = rows.new_empty(len(order), gate_up.shape[1])
        for part, inner, matrix in zip(both.split(counts), rows.split(counts), gate_up, strict=True):
            torch.mm(inner, matrix.t(), out=part)
        gate, up = both.chunk(2, -1)
        active = F.silu(gate) * up
        out = torch.empty_like(rows)
        for part, inner, matrix in zip(out.split(counts), active.split(counts), down, strict=True):
            torch.mm(inner, matrix.t(), out=part)
        ctx.save_for_backward(rows, both, active, out, share, order, token, gate_up, down)
        ctx.counts, ctx.shape = counts, index.shape
        return torch.zeros_like(x).index_add_(0, token, out * share)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, weight, gate_up and down; the index has none."""
        rows, both, active, out, share, order, token, gate_up, down = ctx.saved_tensors
        g_token = grads[0][token]
        g_weight = torch.empty_like(share).squeeze(-1)
        g_weight[order] = (g_token * out).sum(-1)
        g_out = g_token * share
        g_active, g_down = torch.empty_like(active), torch.empty_like(down)
        split = [t.split(ctx.counts) for t in (g_out, active, g_active)]
        for e, (go, a, ga) in enumerate(zip(*split, strict=True)):
            torch.mm(go, down[e], out=ga)
            torch.mm(go.t(), a, out=g_down[e])
        gate, up = both.chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        g_gate = g_active * up * sigmoid * (1 + gate * (1 - sigmoid))
        g_both = torch.cat([g_gate, g_active * gate * sigmoid], -1)
        g_rows, g_gate_up = torch.empty_like(rows), torch.empty_like(gate_up)
        split = [t.split(ctx.counts) for t in (g_both, rows, g_rows)]
        for e, (gb, r, gr) in enumerate(zip(*split, strict=True)):
            torch.mm(gb, gate_up[e], out=gr)
            torch.mm(gb.t(), r, out=g_gate_up[e])
        g_x = torch.zeros_like(grads[0]).index_add_(0, token, g_rows)
        return g_x, None, g_weight.view(ctx.shape), g_gate_up, g_down


def sorted_experts(module: torch.nn.Module, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' experts interface over `_SortedExperts`, in x's dtype."""
    gate_up, down = module.gate_up_proj.to(x.dtype), module.down_proj.to(x.dtype)
    return _SortedExperts.apply(x, index, weight.to(x.dtype), gate_up, down)


ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)


def fresh() -> OlmoeForCausalLM:
    """A randomly initialised float32 model that trains with `sorted_experts`."""
    model = OlmoeForCausalLM._from_config(config(), experts_implementation="sorted", attn_implementation="sdpa")
    with torch.no_grad():  # residual outputs scaled down with depth, as GPT-2 does
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * LAYERS) ** -0.5)
    return model


class RouterLosses:
    """Collects every router's logits and choices in a forward pass and turns them into the two router losses."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._see)

    def _see(self, _module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self.seen.append((output[0].float(), output[2]))

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The balance loss, E * sum(share of assignments * mean probability) per layer (1 = even), and the z-loss,
        the mean square of logsumexp; both summed over layers."""
        balance, z = torch.zeros(()), torch.zeros(())
        for logits, chosen in self.seen:
            share = torch.bincount(chosen.reshape(-1), minlength=EXPERTS) / chosen.numel()
            log_sum = logits.logsumexp(-1, keepdim=True)
            balance = balance + EXPERTS * (share * (logits - log_sum).exp().mean(0)).sum()
            z = z + log_sum.square().mean()
        self.seen.clear()
        return balance, z


def heldout_windows(ids: np.ndarray, length: int, limit: int | None = None) -> torch.Tensor:
    """Consecutive windows [N, length]: `<|bos|>`, then length - 1 held-out tokens; each token appears once."""
    usable = ids[: len(ids) // (length - 1) * (length - 1)].astype(np.int64).reshape(-1, length - 1)
    if limit is not None:
        usable = usable[np.linspace(0, len(usable) - 1, min(limit, len(usable))).astype(int)]
    return torch.from_numpy(np.pad(usable, ((0, 0), (1, 0)), constant_values=BOS))


@torch.no_grad()
def mean_loss(model: OlmoeForCausalLM, windows: torch.Tensor, batch: int = 8) -> float:
    """Mean next-token cross-entropy in nats over windows [N, length]."""
    total = 0.0
    for ids in windows.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def load_ids(work: Path, split: str) -> dict[str, np.ndarray]:
    """Token ids by kind, as written by `tokenizer.py`."""
    return {kind: np.load(work / f"{split}_{kind}.npy", mmap_mode="r") for kind in KINDS}
