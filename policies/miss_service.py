"""What a miss service is: how an expert that is needed and not held gets computed.

A miss service is one file in this folder with one subclass of `MissService`; the file's name is its name under
`miss.kind`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .routed import Routed
from .timed import Timed

FETCH, ON_CPU, SKIP, LOW_BIT = range(4)


class MissService(Timed):
    """Chooses per missing expert; the default fetches all.

    Class attributes: `exactness` is bit, numeric or lossy (DESIGN section 3); `needs` names the trace columns it
    reads; `timing_free` as for eviction.
    """

    exactness = "bit"
    needs: tuple[str, ...] = ()

    def start(self, meta: TraceMeta) -> None:
        """Allocate state for a model."""

    def reroute(
        self, layer: int, ids: NDArray[Any], held: NDArray[np.bool_], columns: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        """Other experts for the tokens' `ids` [T, K], knowing which [E] are held. Only a lossy service changes them."""
        return ids

    def serve(self, routed: Routed, missing: NDArray[np.int32]) -> NDArray[np.int8] | None:
        """How each of `missing` [m], in demand order, is served: FETCH, ON_CPU, SKIP or LOW_BIT; None fetches all."""
        return None

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}
