"""What a miss service is: how an expert that is needed and not held gets computed.

A miss service is one file in this folder with one subclass of `MissService`; the file's name is its name under
`miss.kind`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .prices import Prices
from .routed import Routed
from .timed import Timed

FETCH, ON_CPU, SKIP, LOW_BIT, NEAR_MEMORY = range(5)


class MissService(Timed):
    """Chooses per missing expert; the default fetches all.

    Class attributes: `exactness` is bit, numeric or lossy (DESIGN section 3); `needs` names the trace columns it
    reads; `on_host` and `near_memory` say that it may compute on the host or in near memory; `timing_free` as for
    eviction.
    """

    exactness = "bit"
    needs: tuple[str, ...] = ()
    on_host = False
    near_memory = False

    def start(self, meta: TraceMeta) -> None:
        """Allocate state for a model."""

    def priced(self, prices: Prices) -> None:
        """What the machine takes for a miss, told once before the first step."""

    def reroute(
        self, layer: int, ids: NDArray[Any], held: NDArray[np.bool_], columns: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        """Other experts for the tokens' `ids` [T, K], knowing which [E] are held. Only a lossy service changes them."""
        return ids

    def serve(self, routed: Routed, missing: NDArray[np.int32], score: NDArray[np.float64]) -> NDArray[np.int8] | None:
        """How each of `missing` [m], in demand order, is served: FETCH, ON_CPU, SKIP, LOW_BIT or
        NEAR_MEMORY; None fetches all.

        `score` [m] is what the eviction policy thinks each is worth.
        """
        return None

    def promote(self, routed: Routed, score: NDArray[np.float64]) -> NDArray[np.int32]:
        """Experts of the layer that was just served worth copying behind everything else, best first.

        `score` [E] is the eviction policy's; an expert gets a slot only if it is worth more than who holds it.
        """
        return np.zeros(0, np.int32)

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}


def shares(routed: Routed) -> NDArray[np.float64]:
    """[T, K]: each chosen expert's share of its token's gate weight. Raises ValueError when driven without weights."""
    if routed.weights is None:
        raise ValueError("a lossy miss service was driven without gate weights")
    weights = np.nan_to_num(routed.weights.astype(np.float64))
    return weights / np.maximum(1e-12, weights.sum(axis=1, keepdims=True))


def better_ranked(routed: Routed) -> NDArray[np.float64]:
    """[T, K]: the share of gate weight that went to experts with more weight (HOBBIT's unimportance score)."""
    own = shares(routed)
    more = (own[:, None, :] > own[:, :, None]) | (
        (own[:, None, :] == own[:, :, None]) & (np.arange(own.shape[1]) < np.arange(own.shape[1])[:, None])
    )
    return (more * own[:, None, :]).sum(axis=2)


def least_over_tokens(routed: Routed, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[E]: the least of `values` [T, K] over the tokens that chose each expert; inf where none did."""
    experts = int(routed.needed[-1]) + 1 if len(routed.needed) else 0
    least = np.full(max(experts, 1), np.inf)
    present = routed.ids < experts
    np.minimum.at(least, routed.ids[present].astype(np.int64), values[present])
    return least
