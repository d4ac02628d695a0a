"""Moving average of router scores: an expert that was nearly chosen is worth keeping (HybriMoE, 2504.05897).

HybriMoE updates the scores of its top 2k experts. That needs the scores of experts that were not chosen, so the
policy asks for the trace's full router distribution (`trace record --probs`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed


class ScoreEMA(Eviction):
    """score <- alpha * s + (1 - alpha) * score for every expert of the layer; s is 0 outside the top `reach` * k.

    `alpha` was not found in the paper; `reach` 2 is its own.
    """

    needs = ("probs",)

    def __init__(self, alpha: float = 0.3, reach: int = 2) -> None:
        if not 0 < alpha <= 1 or reach < 1:
            raise ValueError(f"alpha must lie in (0, 1] and reach be at least 1, got {alpha} and {reach}")
        super().__init__()
        self.alpha, self.reach = alpha, reach

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._top = min(meta.model.experts, self.reach * meta.model.top_k)

    def touch(self, routed: Routed) -> None:
        probs = routed.columns["probs"].astype(np.float64)  # [T, E]
        cut = np.partition(probs, -self._top, axis=1)[:, -self._top, None]
        strong = np.where(probs >= cut, probs, 0).sum(axis=0)
        self.score[routed.layer] += self.alpha * (strong - self.score[routed.layer])

    def parameters(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "reach": self.reach}
