"""Fetch what hardly matters at few bits, and not at all what matters least (HOBBIT, 2411.01433). Lossy.

An expert's unimportance for a token is the share of gate weight that went to better-ranked experts; with several
tokens the least counts. A low-bit copy passes through scratch and is not held.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .miss_service import FETCH, LOW_BIT, SKIP, MissService, better_ranked, least_over_tokens
from .routed import Routed


class LowBit(MissService):
    """Unimportance up to `first`: a whole copy; up to `second`: one of `bits` bits; above: left out."""

    exactness = "lossy"
    needs = ("weights",)

    def __init__(self, first: float = 0.6, second: float = 0.9, bits: int = 4) -> None:
        if not 0 <= first <= second:
            raise ValueError(f"expected 0 <= first <= second, got {first} and {second}")
        if not 1 <= bits <= 16:
            raise ValueError(f"bits must lie between 1 and 16, got {bits}")
        self.first, self.second, self.bits = float(first), float(second), bits

    def serve(self, routed: Routed, missing: NDArray[np.int32], score: NDArray[np.float64]) -> NDArray[np.int8]:
        unimportance = least_over_tokens(routed, better_ranked(routed))[missing]
        return np.where(unimportance <= self.first, FETCH, np.where(unimportance <= self.second, LOW_BIT, SKIP)).astype(
            np.int8
        )

    def parameters(self) -> dict[str, Any]:
        return {"first": self.first, "second": self.second, "bits": self.bits}
