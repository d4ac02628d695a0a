"""Compute where the weights are: what is not held runs on the host's cores; nobody waits for a copy.

llama.cpp's `-ncmoe`, KTransformers and Fiddler (2402.07033) serve misses so. Another device's kernel: `numeric`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .miss_service import ON_CPU, MissService
from .routed import Routed


class Cpu(MissService):
    """Every miss runs on the host. Up to `promote` of a layer's misses are then copied in idle link time for the
    next step, if the eviction policy holds something worth less (0: whoever is held from the start stays)."""

    exactness = "numeric"
    on_host = True

    def __init__(self, promote: int = 1) -> None:
        if promote < 0:
            raise ValueError(f"promote must be at least 0 experts, got {promote}")
        self.most = promote

    def serve(self, routed: Routed, missing: NDArray[np.int32], score: NDArray[np.float64]) -> NDArray[np.int8]:
        return np.full(len(missing), ON_CPU, np.int8)

    def promote(self, routed: Routed, score: NDArray[np.float64]) -> NDArray[np.int32]:
        missing = routed.needed[~routed.held]
        return missing[np.argsort(-score[missing], kind="stable")][: self.most]

    def parameters(self) -> dict[str, Any]:
        return {"promote": self.most}
