"""Compute where the weights lie: an expert of near memory runs there when that ends before its copy would arrive.

The condition is T_near < T_move for one expert (MoNDE, 2405.18832; Duplex, 2409.01141: few tokens near, many on the
device), and for several a queue on either side: in demand order each goes to whichever side would finish it first.
Sieve (2605.11277) and PAPI (2502.15470) decide per step from token counts too. The two queues begin empty: what is
still on its way from before is not known, so that the choice is the same on any clock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .miss_service import NEAR_MEMORY, MissService
from .prices import Prices
from .routed import Routed


class NearMemory(MissService):
    """Without a near-memory unit every miss is fetched, as under `wait`. Up to `promote` of the experts that ran there
    are then copied in idle link time for the layer's next step, if the eviction policy holds something worth less."""

    exactness = "numeric"
    near_memory = True

    def __init__(self, promote: int = 1) -> None:
        if promote < 0:
            raise ValueError(f"promote must be at least 0 experts, got {promote}")
        self.most = promote
        self._prices: Prices | None = None

    def start(self, meta: TraceMeta) -> None:
        self._ran = np.zeros(0, np.int32)  # of the layer served last

    def priced(self, prices: Prices) -> None:
        self._prices = prices if prices.near.any() else None

    def serve(self, routed: Routed, missing: NDArray[np.int32], score: NDArray[np.float64]) -> NDArray[np.int8] | None:
        prices, layer = self._prices, routed.layer
        if prices is None:
            return None
        tokens = routed.tokens[np.searchsorted(routed.needed, missing)]
        link, unit = prices.first_copy, prices.exchange + prices.exchange_token * len(routed.ids)
        services = np.zeros(len(missing), np.int8)
        for i, (expert, count) in enumerate(zip(missing.tolist(), tokens.tolist(), strict=True)):
            copied = link + int(prices.copy[layer, expert])
            computed = unit + max(prices.expert, count * prices.token)
            if prices.near[layer, expert] and computed < copied:
                services[i], unit = NEAR_MEMORY, computed
            else:
                link = copied
        self._ran = missing[services == NEAR_MEMORY]
        return services

    def promote(self, routed: Routed, score: NDArray[np.float64]) -> NDArray[np.int32]:
        return self._ran[np.argsort(-score[self._ran], kind="stable")][: self.most]

    def parameters(self) -> dict[str, Any]:
        return {"promote": self.most}
