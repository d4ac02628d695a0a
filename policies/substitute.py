"""Use a held expert in place of a missing one that ranks low (BuddyMoE; SMoE, 2508.18983). Lossy, counterfactual.

Buddies are counted while running: of two experts of a layer, how often one token chose both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .miss_service import MissService


class Substitute(MissService):
    """A token's first `keep` experts stay; a later one that is missing becomes its most frequent held buddy.

    Without a held buddy that the token does not use already it stays too.
    """

    exactness = "lossy"

    def __init__(self, keep: int = 2) -> None:
        if keep < 0:
            raise ValueError(f"keep must be at least 0 experts, got {keep}")
        self.keep = keep

    def start(self, meta: TraceMeta) -> None:
        model = meta.model
        self._together = np.zeros((len(model.moe_layers), model.experts + 1, model.experts + 1), np.int64)

    def reroute(
        self, layer: int, ids: NDArray[Any], held: NDArray[np.bool_], columns: dict[str, NDArray[Any]]
    ) -> NDArray[Any]:
        experts, together = len(held), self._together[layer]
        chosen = np.minimum(ids.astype(np.int64), experts)
        changed = ids.copy()
        for row, of_token in enumerate(chosen):
            free = held.copy()
            free[of_token[of_token < experts]] = False
            for rank in range(self.keep, len(of_token)):
                expert = of_token[rank]
                if expert == experts or held[expert]:
                    continue
                buddies = np.where(free, together[expert, :experts], 0)
                buddy = int(np.argmax(buddies))
                if buddies[buddy]:
                    changed[row, rank] = buddy
                    free[buddy] = False
        for of_token in chosen:
            together[of_token[:, None], of_token] += 1
        return changed

    def parameters(self) -> dict[str, Any]:
        return {"keep": self.keep}
