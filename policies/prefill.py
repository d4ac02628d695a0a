"""How experts come to a step that has prompt rows: each layer's needed ones once its router has spoken (`select`), or
whole layers ahead of it (`stream`), or whichever is expected to end first (`auto`).

Many tokens need nearly every expert, so that waiting for a router tells nothing worth the wait. Whole layers then
cross the link in order through two buffers of one layer each, the next one while this one computes (FreeToken,
2608.16157; vLLM's `--offload-backend prefetch`). The buffers are expert slots, lent for the step.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .prices import LayerPrices, Prices

SELECT, STREAM, AUTO = PREFILLS = ("select", "stream", "auto")
BITS = 40  # of the fixed point in which a share is kept


class Prefill:
    """`stream` or `auto` for a model of so many experts per layer, with `per_scope` slots in each scope.

    Every scope lends slots in proportion, its last ones. Raises ValueError for fewer slots than the two buffers take.
    """

    def __init__(self, kind: str, experts: int, top_k: int, per_scope: tuple[int, ...]) -> None:
        self.kind, self._experts, self._top_k, self._per_scope = kind, experts, top_k, per_scope
        if sum(per_scope) < 2 * experts:
            raise ValueError(f"two buffers take {2 * experts} slots, there are {sum(per_scope)}")
        last = np.cumsum(per_scope)
        self.lent = _shared_out(2 * experts, np.array(per_scope, np.int64))  # [scopes]
        self.slots = np.concatenate([np.arange(end - n, end) for end, n in zip(last, self.lent, strict=True)])
        self.buffers = self.slots.reshape(2, -1)  # [2, experts] slot of each expert of an even and of an odd layer
        self._prices: Prices | None = None

    def priced(self, prices: Prices) -> None:
        """What the machine takes, told once before the first step."""
        self._prices = prices

    def streams(self, tokens: int, holder: NDArray[np.int64]) -> bool:
        """Whether a step of so many tokens, prompt rows among them, takes whole layers.

        `holder` [slots]: key (layer * experts + expert) that each slot holds, or -1. Constants and counts decide, no
        measured time. Raises ValueError when `auto` was not told prices.
        """
        if self.kind == STREAM:
            return True
        return self.streaming_ns(tokens, holder) < self.selecting_ns(tokens, holder)

    def selecting_ns(self, tokens: int, holder: NDArray[np.int64]) -> int:
        """Expected nanoseconds of the layers when each fetches what its router names.

        A layer needs U = E (1 - (1 - k/E)^T) experts of E if routing is uniform and tokens are independent: no routing
        of independent tokens needs more. As many of the needed are taken to be held as of the others. What a layer
        needs beyond its slots is launched one by one. Copies and computing are taken to overlap perfectly within it.
        """
        prices, (dense, computing) = self._told(), self._computing(tokens)
        share = _union_share(self._experts, self._top_k, tokens)
        missing, total = self._missing(holder), 0
        for layer, sum_ns in enumerate(missing):
            copying = (sum_ns * share >> BITS) + (prices.first_copy if sum_ns else 0)
            slots = self._per_scope[layer if len(self._per_scope) > 1 else 0]
            launching = max(0, (self._experts * share >> BITS) - slots) * self._of_layer().launch
            total += dense + max(copying, computing + launching)
        return total

    def streaming_ns(self, tokens: int, holder: NDArray[np.int64]) -> int:
        """Expected nanoseconds of the layers when whole ones are streamed, what lent slots hold included.

        A layer's copies begin when the layer before is across and the layer two before, whose buffer they take, has
        been computed; it is computed when it is complete and the layer before has been.
        """
        prices, (dense, computing) = self._told(), self._computing(tokens)
        kept = holder.copy()
        kept[self.slots] = -1
        across, ends = 0, [0, 0]
        for sum_ns in self._missing(kept):
            starts = max(across, ends[-2])
            across = starts + sum_ns + (prices.first_copy if sum_ns and starts > across else 0)
            ends.append(max(ends[-1] + dense, across) + computing)
        return ends[-1]

    def _missing(self, holder: NDArray[np.int64]) -> list[int]:
        """Nanoseconds on the link for all experts of each layer that no slot holds."""
        copy = self._told().copy.copy()
        copy.ravel()[holder[holder >= 0]] = 0
        missing: list[int] = copy.sum(axis=1).tolist()
        return missing

    def _computing(self, tokens: int) -> tuple[int, int]:
        """Nanoseconds of a layer of `tokens` tokens before its experts, and of those."""
        layer = self._of_layer()
        needed = self._experts * _union_share(self._experts, self._top_k, tokens) >> BITS
        experts = max(needed * layer.expert, tokens * self._top_k * layer.pair)
        return max(layer.dense, tokens * layer.dense_token), experts

    def _told(self) -> Prices:
        if self._prices is None:
            raise ValueError("auto needs prices; call `priced` before the first step")
        return self._prices

    def _of_layer(self) -> LayerPrices:
        layer = self._told().layer
        if layer is None:
            raise ValueError("auto needs prices of a layer")
        return layer


@lru_cache(maxsize=4096)
def _union_share(experts: int, top_k: int, tokens: int) -> int:
    """1 - (1 - k/E)^T in units of 2^-BITS, rounded down: whole numbers are the same on every machine."""
    missed = (((experts - top_k) ** tokens) << BITS) // experts**tokens
    return (1 << BITS) - missed


def _shared_out(wanted: int, capacity: NDArray[np.int64]) -> NDArray[np.int64]:
    """`wanted` in proportion to each scope's slots; what division leaves goes to the largest rests, lowest scope."""
    exact = wanted * capacity
    shares: NDArray[np.int64] = exact // capacity.sum()
    rests = exact % capacity.sum()
    shares[np.argsort(-rests, kind="stable")[: wanted - int(shares.sum())]] += 1
    return shares
