"""Cache-aware routing: a held expert's logit is raised before the top-k is taken. Lossy, counterfactual.

Cache-Conditional Experts (2412.00099); a third party reads ExpertFlow (2510.26730) this way too, which its own text
does not support (the exact reading is resident-first reordering, `miss.waves`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .miss_service import MissService


class BiasedRouting(MissService):
    """logit + strength * spread for held experts; the `keep` best by the router's own logit are always taken.

    spread is a moving average (0.99) of the range of a token's candidate logits, per layer.
    """

    exactness = "lossy"
    needs = ("candidates", "candidate_logits")

    def __init__(self, strength: float = 0.2, keep: int = 1) -> None:
        if strength < 0 or keep < 0:
            raise ValueError(f"strength and keep must be at least 0, got {strength} and {keep}")
        self.strength, self.keep = float(strength), keep

    def start(self, meta: TraceMeta) -> None:
        self._spread = np.zeros(len(meta.model.moe_layers))
        self._experts = meta.model.experts

    def reroute(
        self, layer: int, ids: NDArray[Any], held: NDArray[np.bool_], columns: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        candidates = columns["candidates"].astype(np.int64)
        logits = columns["candidate_logits"].astype(np.float64)
        present = candidates < self._experts
        changed = ids.copy()
        for row in np.flatnonzero(present.any(axis=1)):
            own = np.where(present[row], logits[row], -np.inf)
            seen = own[present[row]]
            spread = seen.max() - seen.min()
            self._spread[layer] = 0.99 * self._spread[layer] + 0.01 * spread if self._spread[layer] else spread
            biased = own + self.strength * self._spread[layer] * held[np.minimum(candidates[row], self._experts - 1)]
            biased[np.argsort(-own, kind="stable")[: self.keep]] += 1e9
            chosen = candidates[row][np.argsort(-biased, kind="stable")]
            wanted = np.flatnonzero(ids[row] < self._experts)[: present[row].sum()]
            changed[row, wanted] = chosen[: len(wanted)]
        return changed

    def parameters(self) -> dict[str, Any]:
        return {"strength": self.strength, "keep": self.keep}
