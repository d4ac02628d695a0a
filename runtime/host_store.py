"""Every expert in host memory, one aligned row each: the only copy of the experts that the host keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import DeviceBackend, Mark
from .layout import RowLayout


class InMemory:
    """A row that is there."""

    landed = True

    def __init__(self, row: Tensor) -> None:
        self._row = row

    def row(self) -> Tensor:
        return self._row

    def sent(self, mark: Mark) -> None:
        pass


class HostStore:
    """`layers` tensors [E, size] uint8, filled layer by layer and then pinned."""

    def __init__(self, backend: DeviceBackend, layout: RowLayout, experts: int) -> None:
        self.backend, self.layout, self.experts = backend, layout, experts
        self.layers: list[Tensor] = []

    def add_layer(self) -> Tensor:
        """Rows [E, size] of the next layer, to be filled."""
        self.layers.append(self.backend.host_rows(self.experts, self.layout.size))
        return self.layers[-1]

    def fetch(self, key: int, urgent: bool) -> InMemory:
        layer, expert = divmod(key, self.experts)
        return InMemory(self.layers[layer][expert])

    def drop(self, layer: int) -> None:
        """Let go of a layer's memory."""
        self.backend.unpin(self.layers[layer])
        self.layers[layer] = torch.empty(0, self.layout.size, dtype=torch.uint8)
