"""Experts that the host computes where their weights lie, while the device computes the others.

Another device's products round differently, so this is `numeric`: it happens only under a policy that asks for it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from .layout import RowLayout
from .transfers import Fetch


class HostExperts:
    """Of one call: expert -> its weights on their way into host memory. `compute` notes in `took` (expert, ns)."""

    def __init__(self, layout: RowLayout, fetches: dict[int, Fetch]) -> None:
        self.layout, self.fetches = layout, fetches
        self.took: list[tuple[int, int]] = []

    def compute(self, module: Any, rows: Tensor, places: dict[int, slice], into: Tensor) -> None:
        """Fill `into` [S, H] at the places of these experts from their inputs `rows` [S, H], both sorted by expert."""
        for expert, fetch in self.fetches.items():
            began, place = time.perf_counter_ns(), places[expert]
            weights = fetch.row()[None]
            made = self._expert(module, weights, rows[place].cpu())
            into[place] = made.to(into.device)
            fetch.sent(None)
            self.took.append((expert, time.perf_counter_ns() - began))

    def _expert(self, module: Any, weights: Tensor, rows: Tensor) -> Tensor:
        """[n, H] of one expert's row of weights [1, size] and its inputs [n, H]."""
        first = "gate_up_proj" if module.has_gate else "up_proj"
        rows = self._product(module, weights, rows, first)
        rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        return self._product(module, weights, rows, "down_proj")

    def _product(self, module: Any, weights: Tensor, rows: Tensor, name: str) -> Tensor:
        weight = self.layout.view(weights, name)[0]
        made = torch.mm(rows.to(weight.dtype), weight if module.is_transposed else weight.T)
        return made + self.layout.view(weights, name + "_bias")[0] if module.has_bias else made
