"""The SSD reader: experts that host memory does not hold are read into it before the link can take them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .cost import CostModel
from .tiers import SSD, TIERS


class Reader:
    """First come, first served. `latency` is paid when the reader was idle; requests keep its queue full otherwise.

    `tiers` [keys] says where each expert rests; reads go into a pinned buffer, so what follows is a pinned copy.
    A read of few bits takes `low_bit_ps`: those weights are stored beside the whole ones, in the same tier.
    """

    def __init__(self, cost: CostModel, tiers: NDArray[np.int8], low_bit_ps: int = 0) -> None:
        self._tiers: list[int] = tiers.tolist()
        self._alpha_ps, self._read_ps, self._low_bit_ps = cost.read_alpha_ps, cost.read_ps, low_bit_ps
        self._host_has: NDArray[np.int64] = np.zeros(len(tiers), np.int64)
        self._free = -1
        self.reads = self.low_bit_reads = 0
        self.wanted = [0] * len(TIERS)  # times that an expert of each tier was wanted, to be copied or computed

    def tier(self, key: int) -> int:
        return self._tiers[key]

    def read(self, key: int, asked: int, low_bit: bool = False) -> int:
        """Bytes of `key` are wanted at `asked`; returns when the host has them."""
        tier = self._tiers[key]
        self.wanted[tier] += 1
        if tier != SSD:
            return asked
        start = asked + self._alpha_ps if asked > self._free else self._free
        self._free = start + (self._low_bit_ps if low_bit else self._read_ps)
        if low_bit:
            self.low_bit_reads += 1
        else:
            self._host_has[key] = self._free
            self.reads += 1
        return self._free

    def host_has(self, key: int, asked: int) -> int:
        """When a copy of `key` whose read was asked for earlier may go on."""
        return max(asked, int(self._host_has[key]))
