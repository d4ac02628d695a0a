"""What transformers would compute with a layer's experts, computed with experts that sit in slots, to the same bits.

`eager` and `batched_mm` index the weights by expert and do everything else on whole tensors: transformers' own
functions run, on weights that know where an expert is. `grouped_mm` hands whole weight tensors to a kernel. Where one
wave serves all, transformers' function runs too, on slots; else its steps are repeated here around the same products:
rows stay sorted by expert whatever the slots, and the activation runs once over all of them. That matters: on a CPU an
element's bits can depend on its place in a vectorised loop (tests/runtime/test_implementations.py).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations import moe

from ..errors import InputError
from .serving import Serving


class Indexed:
    """Stands for a weight [E, *shape] that is indexed by expert: one id, or ids [S]."""

    def __init__(self, serving: Serving, name: str) -> None:
        self.serving, self.name = serving, name

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        weight = self.serving.weights[self.name]
        if isinstance(expert, Tensor) and expert.ndim:
            return self._gathered(weight, expert)
        return weight[self.serving.slot_with(int(expert), self.name)]

    def _gathered(self, weight: Tensor, experts: Tensor) -> Tensor:
        """[S, *shape]."""
        chosen, waves = self.serving.ids.reshape(-1), self.serving.waves((self.name,))
        first = next(waves)
        if len(first) == self.serving.distinct:
            return weight[self.serving.lookup(first)[experts]]
        found = weight.new_empty(len(chosen), *weight.shape[1:])
        for wave in chain([first], waves):
            rows = torch.from_numpy(np.flatnonzero(np.isin(chosen, list(wave)))).to(weight.device)
            found[rows] = weight[self.serving.lookup(wave)[experts[rows]]]
        return found


class Lent:
    """An experts module whose weights are `weights`; all else is its own."""

    def __init__(self, module: nn.Module, weights: dict[str, Any]) -> None:
        self._module, self._weights = module, weights

    def __getattr__(self, name: str) -> Any:
        weights = self.__dict__["_weights"]
        return weights[name] if name in weights else getattr(self.__dict__["_module"], name)


def eager(module: nn.Module, serving: Serving, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The family's own loop over its experts."""
    return type(module).forward.__wrapped__(_indexed(module, serving), hidden, ids, weights)  # type: ignore[attr-defined]


def batched_mm(module: nn.Module, serving: Serving, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One batched product over (token, expert) pairs, each with its own gathered weights."""
    return moe.batched_mm_experts_forward(_indexed(module, serving), hidden, ids, weights)


def grouped_mm(module: Any, serving: Serving, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One grouped product over rows sorted by expert: `grouped_mm_experts_forward`, or its steps in waves."""
    if not bits_depend_on_place(hidden.device) and serving.host is None:
        whole = serving.whole
        if whole is not None:
            return moe.grouped_mm_experts_forward(*by_slot(module, serving, whole, hidden, ids), weights)
    return by_steps(module, serving, hidden, ids, weights)


def by_steps(module: Any, serving: Serving, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`grouped_mm_experts_forward`, step by step."""
    products = products_on_host if bits_depend_on_place(hidden.device) else products_in_waves
    tokens, top_k = ids.shape
    by_expert, order = torch.sort(ids.reshape(-1))
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inputs = hidden[order // top_k]
    rows = products(module, serving, inputs, by_expert, first)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
    rows = products(module, serving, rows, by_expert, "down_proj")
    if serving.host is not None:
        serving.host.compute(module, inputs, places(serving), rows)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    rows = rows * weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.size(0), device=order.device)
    return rows[back].view(tokens, top_k, hidden.size(-1)).sum(dim=1).to(hidden.dtype)


def products_on_host(module: Any, serving: Serving, rows: Tensor, experts: Tensor, name: str) -> Tensor:
    """[S, out] of rows [S, in] that are sorted by expert: the products that torch's grouped kernel makes on a CPU.

    There it is one product per group; made here, each group's rows stay where they are in memory, on which a CPU's
    bits can depend, and slots without a row cost nothing.
    """
    names, place = _with_bias(module, name), places(serving)
    weight = serving.weights[name] if module.is_transposed else serving.weights[name].transpose(-2, -1)
    rows, made = rows.to(weight.dtype), _room(module, serving, rows, name)
    for wave in serving.waves(names):
        for expert, slot in wave.items():
            torch.mm(rows[place[expert]], weight[slot], out=made[place[expert]])
            if module.has_bias:
                made[place[expert]] += serving.weights[names[1]][slot]
    return made


def products_in_waves(module: Any, serving: Serving, rows: Tensor, experts: Tensor, name: str) -> Tensor:
    """The same from the grouped kernel, wave by wave, groups in the order of slots."""
    names, made = _with_bias(module, name), _room(module, serving, rows, name)
    sorted_ids = np.sort(serving.ids.reshape(-1))
    for wave in serving.waves(names):
        mine = torch.from_numpy(np.flatnonzero(np.isin(sorted_ids, list(wave)))).to(rows.device)
        slots, order = torch.sort(serving.lookup(wave)[experts[mine]], stable=True)
        order = mine[order]
        low, high = min(wave.values()), max(wave.values()) + 1
        counted = slots.float() if rows.device.type in ("cpu", "mps") else slots.int()  # as transformers has it
        ends = torch.cumsum(torch.histc(counted, bins=high - low, min=low, max=high - 1), 0, dtype=torch.int32)
        bias = serving.weights[names[1]][slots] if module.has_bias else None
        weight = serving.weights[name][low:high]
        made[order] = moe._grouped_linear(rows[order], weight, ends, bias, module.is_transposed)
    return made


def bits_depend_on_place(device: torch.device) -> bool:
    """Whether a row's product or an element's activation may round differently elsewhere in memory or in the batch."""
    return device.type == "cpu"


def by_slot(
    module: Any, serving: Serving, whole: dict[int, int], hidden: Tensor, ids: Tensor
) -> tuple[Any, Tensor, Tensor]:
    """Module, hidden states and ids for transformers' own function, with slots in the place of experts."""
    low, high = min(whole.values()), max(whole.values()) + 1
    lent: dict[str, Any] = {name: weight[low:high] for name, weight in serving.weights.items()}
    return Lent(module, lent | {"num_experts": high - low}), hidden, serving.lookup(whole)[ids] - low


def places(serving: Serving) -> dict[int, slice]:
    """Expert -> its rows among all (token, expert) pairs sorted by expert."""
    experts, counts = np.unique(serving.ids.reshape(-1), return_counts=True)
    ends = np.cumsum(counts)
    return {e: slice(a, b) for e, a, b in zip(experts.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)}


def _room(module: Any, serving: Serving, rows: Tensor, name: str) -> Tensor:
    """[S, out] for the products of rows [S, in]; zero where the host will write its own."""
    weight = serving.weights[name]
    shape = len(rows), weight.shape[-1 if module.is_transposed else -2]
    made = weight.new_empty if serving.host is None else weight.new_zeros
    return made(shape)


def _with_bias(module: Any, name: str) -> tuple[str, ...]:
    return (name, name + "_bias") if module.has_bias else (name,)


def _indexed(module: nn.Module, serving: Serving) -> Any:
    return Lent(module, {name: Indexed(serving, name) for name in serving.layout.names})


Implementation = Callable[[Any, Serving, Tensor, Tensor, Tensor], Tensor]
IMPLEMENTATIONS: dict[str, Implementation] = {"eager": eager, "batched_mm": batched_mm, "grouped_mm": grouped_mm}


def implementation(name: str | None, family: str) -> Implementation:
    """By transformers' name for it. Raises InputError for one that is not served."""
    found = IMPLEMENTATIONS.get(name or "eager")
    if found is None:
        raise InputError(
            f"model family {family}: experts_implementation {name!r} cannot be offloaded; "
            f"load the model with one of {', '.join(IMPLEMENTATIONS)}"
        )
    return found
