"""The SSD reader: experts that host memory does not hold are read into it before the link can take them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .cost import CostModel


class Reader:
    """First come, first served. `latency` is paid when the reader was idle; requests keep its queue full otherwise.

    Which experts rest in RAM: the same number in every layer, lowest ids first, because nothing is known of them.
    """

    def __init__(self, cost: CostModel, layers: int, experts: int, in_ram: int | None) -> None:
        each, extra = divmod(layers * experts if in_ram is None else in_ram, layers)
        self._experts = experts
        self._in_ram = [min(experts, each + (layer < extra)) for layer in range(layers)]
        self._alpha_ps, self._read_ps = cost.read_alpha_ps, cost.read_ps
        self._host_has: NDArray[np.int64] = np.zeros(layers * experts, np.int64)
        self._free = 0
        self.reads = 0

    def read(self, key: int, asked: int) -> int:
        """Bytes of `key` are wanted at `asked`; returns when the host has them."""
        if key % self._experts < self._in_ram[key // self._experts]:
            return asked
        start = asked + self._alpha_ps if asked > self._free or not self.reads else self._free
        self._free = start + self._read_ps
        self._host_has[key] = self._free
        self.reads += 1
        return self._free

    def host_has(self, key: int, asked: int) -> int:
        """When a copy of `key` whose read was asked for earlier may go on."""
        return max(asked, int(self._host_has[key]))
