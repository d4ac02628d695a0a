"""Leave out a missing expert that every token gives little weight (adaptive gating, AdapMoE 2408.10284). Lossy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .miss_service import FETCH, SKIP, MissService, least_over_tokens, shares
from .routed import Routed


class Skip(MissService):
    """A missing expert is left out when no token gives it more than `share` of its gate weight."""

    exactness = "lossy"
    needs = ("weights",)

    def __init__(self, share: float = 0.1) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        self.share = float(share)

    def serve(self, routed: Routed, missing: NDArray[np.int32], score: NDArray[np.float64]) -> NDArray[np.int8]:
        most = -least_over_tokens(routed, -shares(routed))[missing]
        return np.where(most <= self.share, SKIP, FETCH).astype(np.int8)

    def parameters(self) -> dict[str, Any]:
        return {"share": self.share}
