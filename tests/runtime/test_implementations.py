"""The traps that bit equality runs into, each measured, and that serving from slots avoids them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.runtime import implementations, serving
from moeflow.runtime.backend import HostBackend
from moeflow.runtime.host_store import HostStore
from moeflow.runtime.implementations import IMPLEMENTATIONS, implementation
from moeflow.runtime.layout import FIELD_ALIGN, ROW_ALIGN, expert_weights, row_layout
from moeflow.runtime.serving import Serving
from moeflow.runtime.transfers import Transfers
from moeflow.traces.routers import MoeLayer
from torch import nn
from transformers.integrations import moe

from moeflow import InputError

EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 40, 24, 3  # neither rows nor all rows together fill whole vectors


class Config:
    _experts_implementation = "eager"


def experts_module(dtype: torch.dtype, **about: Any) -> nn.Module:
    """An experts class as families write them, decorated as they are."""
    concatenated = about.get("is_concatenated", True)

    @moe.use_experts_implementation(**about)
    class Experts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(5)

            def weights(*shape: int) -> nn.Parameter:
                return nn.Parameter(torch.randn(EXPERTS, *shape, generator=generator).to(dtype))

            turned, up = about.get("is_transposed", False), (2 if about.get("has_gate", True) else 1) * WIDTH
            name = "gate_up_proj" if about.get("has_gate", True) else "up_proj"
            setattr(self, name, weights(*((HIDDEN, up) if turned else (up, HIDDEN))))
            self.down_proj = weights(*((WIDTH, HIDDEN) if turned else (HIDDEN, WIDTH)))
            if about.get("has_bias"):
                setattr(self, name + "_bias", weights(up))
                self.down_proj_bias = weights(HIDDEN)
            if about.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(HIDDEN, dtype=dtype)
            self.num_experts, self.act_fn = EXPERTS, nn.SiLU()

        def forward(self, hidden: Any, ids: Any, weights: Any) -> Any:
            raise NotImplementedError

    if not concatenated:
        Experts._apply_gate = lambda self, rows: rows[..., 1::2] * self.act_fn(rows[..., ::2])
    return Experts(Config()).requires_grad_(False)


class ByPlace(nn.Module):
    """An activation whose every row depends on its place, as vectorised ones do in their last elements."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * (1 + torch.arange(len(rows)) % 7 / 8).to(rows.dtype)[:, None]


KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "interleaved, transposed, biased": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "ungated": {"has_gate": False},
    "ungated, biased": {"has_gate": False, "has_bias": True},
    "normed": {"has_post_expert_norm": True},
}


def call(tokens: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
    return hidden, ids, torch.rand(tokens, TOP_K, generator=generator).to(dtype)


def served(
    module: nn.Module, ids: torch.Tensor, slots: np.ndarray, resident: set[int], split: int, scratch: int
) -> Any:
    """A `Serving` of ids with `resident` experts in `slots`, the first `split` of them in a wave of their own."""
    layer, backend = MoeLayer(0, 0, module, None, module), HostBackend()
    layout = row_layout(expert_weights(module), "test")
    store = HostStore(backend, layout, EXPERTS)
    store.take((layer,))
    transfers = Transfers(backend, store, backend.rows(int(slots.max()) + 1 + scratch, layout.size))
    slot_of = np.full(EXPERTS, -1, np.int64)
    for expert in resident:
        slot_of[expert] = slots[expert]
        transfers.demand(expert, int(slots[expert]))
    needed = sorted(set(ids.ravel().tolist()))
    here = [expert for expert in needed if expert in resident]
    away = [expert for expert in needed if expert not in resident]
    weights = {name: layout.view(transfers.rows, name) for name in layout.names}
    return store, Serving(
        0, layout, weights, transfers, ids.numpy(), slot_of, here[:split], here[split:], away,
        dict.fromkeys(away, "stream"), range(len(transfers.rows) - scratch, len(transfers.rows)), 0 < split < len(here),
    )  # fmt: skip


STOCK = {"batched_mm": moe.batched_mm_experts_forward, "grouped_mm": moe.grouped_mm_experts_forward}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOCK)
@given(data=st.data())
@settings(max_examples=25)
def test_any_slots_any_waves_give_the_stock_function_s_bits(name: str, kind: str, data: Any) -> None:
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    module = experts_module(dtype, **KINDS[kind])
    module.act_fn = data.draw(st.sampled_from((module.act_fn, ByPlace())))
    hidden, ids, weights = call(data.draw(st.sampled_from((1, 2, 3, 8, 61, 400))), data.draw(st.integers(0, 99)), dtype)
    expected = STOCK[name](module, hidden, ids, weights)
    apart = data.draw(st.sampled_from((1, 300)))  # slots so far apart that one grouped launch does not reach them all
    slots = np.array(data.draw(st.permutations(range(EXPERTS)))) * apart
    resident = set(data.draw(st.lists(st.integers(0, EXPERTS - 1), unique=True)))
    store, made = served(module, ids, slots, resident, data.draw(st.integers(0, 8)), data.draw(st.integers(1, 3)))
    with torch.no_grad():
        assert torch.equal(expected, IMPLEMENTATIONS[name](module, made, hidden, ids, weights))
    made.done()
    store.give_back()
    assert torch.equal(expected, STOCK[name](module, hidden, ids, weights))


def test_the_trap_an_activation_split_in_two_can_change_bits() -> None:
    """Why the activation runs once over all rows: its last elements take a scalar path of other rounding."""
    torch.manual_seed(0)
    rows = torch.randn(1001, 3)
    whole = nn.functional.silu(rows)
    parts = [torch.cat([nn.functional.silu(rows[:cut]), nn.functional.silu(rows[cut:])]) for cut in range(1, 1000)]
    assert any(not torch.equal(whole, part) for part in parts)


def test_a_launch_reaches_only_so_many_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's grouped product takes fewer than 1024 groups: a large pool is served in windows of slots."""
    spans: list[int] = []
    linear = moe._grouped_linear

    def noting(rows: Any, weight: Any, *others: Any, **named: Any) -> Any:
        spans.append(len(weight))
        return linear(rows, weight, *others, **named)

    monkeypatch.setattr(moe, "_grouped_linear", noting)
    module = experts_module(torch.float32)
    hidden, ids, weights = call(50, 0, torch.float32)
    expected = moe.grouped_mm_experts_forward(module, hidden, ids, weights)
    spans.clear()
    monkeypatch.setattr(implementations, "bits_depend_on_place", lambda device: False)
    _, made = served(module, ids, np.arange(EXPERTS) * 700, set(range(EXPERTS)), 8, 2)
    with torch.no_grad():
        assert torch.equal(expected, implementations.grouped_mm(module, made, hidden, ids, weights))
    assert 0 < max(spans) <= serving.MOST_GROUPS < 1024


@pytest.mark.parametrize("split", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_on_accelerators(split: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grouped kernel over slots, in one wave or several; on this CPU where rows fill whole cache lines."""
    monkeypatch.setattr(implementations, "bits_depend_on_place", lambda device: False)
    monkeypatch.setattr("test_implementations.HIDDEN", 64)
    monkeypatch.setattr("test_implementations.WIDTH", 32)
    module = experts_module(torch.float32, **KINDS[kind])
    hidden, ids, weights = call(50, 0, torch.float32)
    expected = moe.grouped_mm_experts_forward(module, hidden, ids, weights)
    slots = np.array([5, 3, 7, 1, 0, 2, 6, 4])
    resident = set(range(EXPERTS)) - ({2, 6} if split else set())
    _, made = served(module, ids, slots, resident, split, 1)
    with torch.no_grad():
        assert torch.equal(expected, implementations.grouped_mm(module, made, hidden, ids, weights))
        assert (made.rounds, made.waves_served) == ((2, 8) if split else (1, 1))


def test_rows_are_aligned() -> None:
    layout = row_layout(expert_weights(experts_module(torch.bfloat16, **KINDS["ungated, biased"])), "test")
    assert layout.names == ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    assert layout.size % ROW_ALIGN == 0
    assert all(field.first % FIELD_ALIGN == 0 for field in layout.fields)
    ends = [field.end for field in layout.fields]
    assert all(end <= field.first for end, field in zip(ends, layout.fields[1:], strict=False))
    assert ends[-1] <= layout.size
    rows = torch.zeros(3, layout.size, dtype=torch.uint8)
    layout.view(rows, "down_proj")[1] = 1
    assert rows[1].any()
    assert not rows[0].any()
    assert not rows[2].any()


def test_only_what_can_be_mirrored_is_served() -> None:
    with pytest.raises(InputError, match="'deepgemm' cannot be offloaded"):
        implementation("deepgemm", "test")
    module = experts_module(torch.float32)
    module.down_proj = nn.Parameter(torch.zeros(EXPERTS, 4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(InputError, match="float8_e4m3fn cannot be offloaded yet"):
        row_layout(expert_weights(module), "test")
