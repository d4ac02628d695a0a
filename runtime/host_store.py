"""Every expert in host memory, one aligned row each: the only copy of the experts that the host keeps."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..traces.routers import MoeLayer
from .backend import DeviceBackend, Mark
from .layout import RowLayout, expert_weights


class InMemory:
    """A row that is there (see `Fetch` in transfers.py)."""

    landed = True

    def __init__(self, row: Tensor) -> None:
        self._row = row

    def row(self) -> Tensor:
        return self._row

    def sent(self, mark: Mark) -> None:
        pass

    def hurry(self) -> None:
        pass

    def drop(self) -> None:
        pass


class Reads(Protocol):
    """Experts on disk."""

    def read(self, key: int, row: Tensor) -> None:
        """Fill `row` [size] uint8 with expert `key`."""


class HostStore:
    """A tensor [E, size] uint8 per layer, filled layer by layer and then pinned."""

    def __init__(self, backend: DeviceBackend, layout: RowLayout, experts: int) -> None:
        self.backend, self.layout, self.experts = backend, layout, experts
        self.layers: list[Tensor] = []
        # where each layer's parameters were: module, name, device, whether it wants a gradient
        self._homes: list[list[tuple[Any, str, torch.device, bool]]] = []

    def fetch(self, key: int, urgent: bool) -> InMemory:
        layer, expert = divmod(key, self.experts)
        return InMemory(self.layers[layer][expert])

    @torch.inference_mode(False)  # what is made here is used outside of inference mode too
    @torch.no_grad()
    def take(self, layers: tuple[MoeLayer, ...]) -> None:
        """Move parameters here, layer by layer: never two copies of more than one layer. All or nothing."""
        try:
            for layer in layers:
                rows, module = self._add_layer(), layer.experts
                self._homes.append([])
                for name, weight in expert_weights(module).items():  # type: ignore[arg-type]
                    self._homes[-1].append((module, name, weight.device, weight.requires_grad))
                    self.layout.view(rows, name).copy_(weight)
                    # On meta, not gone: whatever would read or move it fails loudly
                    setattr(module, name, nn.Parameter(weight.detach().to("meta"), requires_grad=False))
                self.backend.pin(rows)
        except BaseException:
            self.give_back()
            raise

    def read(self, saved: Reads, layers: int) -> None:
        """Fill all layers from disk."""
        for layer in range(layers):
            rows = self._add_layer()
            for expert in range(self.experts):
                saved.read(layer * self.experts + expert, rows[expert])
            self.backend.pin(rows)

    def homes_of(self, layers: tuple[MoeLayer, ...], device: torch.device) -> None:
        """The experts that were read here belong to these layers on `device`."""
        self._homes = [
            [(layer.experts, name, device, True) for name in expert_weights(layer.experts)]  # type: ignore[arg-type]
            for layer in layers
        ]

    @torch.inference_mode(False)
    @torch.no_grad()
    def give_back(self) -> None:
        """Make parameters of the rows again, layer by layer, and let go of the memory."""
        for index, homes in enumerate(self._homes):
            for module, name, device, wants_gradient in homes:
                whole = self.layout.view(self.layers[index], name).to(device, copy=True)
                setattr(module, name, nn.Parameter(whole, requires_grad=wants_gradient))
            self.backend.unpin(self.layers[index])
            self.layers[index] = torch.empty(0, self.layout.size, dtype=torch.uint8)
        self._homes = []

    def _add_layer(self) -> Tensor:
        self.layers.append(self.backend.host_rows(self.experts, self.layout.size))
        return self.layers[-1]
