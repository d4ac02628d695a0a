"""An eviction policy that is a placement: who holds a slot was decided beforehand, by rank, and never changes."""

from __future__ import annotations

import numpy as np
from moeflow.policies.eviction import Eviction
from moeflow.policies.future import Future
from moeflow.policies.residency import Slots
from moeflow.policies.steps import touch_nothing
from moeflow.traces.trace import TraceMeta


class Placed(Eviction):
    """score = a seeded random rank within the layer: KTransformers' `random`, and, where no expert is more popular
    than another, also its `uniform`. With `miss: {kind: cpu}` the best ranked move in at their first use and stay."""

    bypass = True
    touch_step = touch_nothing

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        layers, experts = len(meta.model.moe_layers), meta.model.experts
        rng = np.random.default_rng(0)
        self.score = np.stack([rng.permutation(experts) for _ in range(layers)]).astype(np.float64)
