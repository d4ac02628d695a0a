"""What a prefetch policy is: which experts of which later layers are worth having, in order.

A policy is one file in this folder with one subclass of `Prefetch`; the file's name is the policy's name.
It proposes; `Residency` decides what gets a slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta

BEFORE_FIRST_LAYER = -1


class Prefetch:
    """Proposals for one model.

    Class attributes: `needs` names the trace columns it reads; `timing_free` as for eviction;
    `gates` counts the router evaluations it costs per layer-step (charged by the clock).
    """

    needs: tuple[str, ...] = ()
    timing_free = True
    gates = 0

    def start(self, meta: TraceMeta) -> None:
        """Check that the trace carries what this policy is set to use; allocate state."""

    def propose(
        self, layer: int, lookahead: NDArray[np.unsignedinteger[Any]] | None
    ) -> list[tuple[int, NDArray[np.int32]]]:
        """After `layer` is routed (`BEFORE_FIRST_LAYER`: at step start): (target layer, experts best first) pairs.

        `lookahead` [T, D, K'] is what later gates choose given this layer's router input, for each of T tokens.
        """
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}
