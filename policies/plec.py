"""The predictive locality-aware expert cache (ExpertFlow, 2410.17954, section on the expert cache engine).

Slots follow what is predicted, not layers equally: meant for `scope: global`, with the prefetch `execution-order`.
"""

from __future__ import annotations

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .predicted import expected
from .predictor import Predicted
from .residency import Slots
from .routed import Routed, StepBegun

PER_LAYER = 2.0**31  # above every expectation and event: a nearer layer outranks a later one
AHEAD = 2.0**41  # what is predicted outranks what is not, in models of up to 500 layers
UNUSED = -(2.0**42)  # below everything


class PLEC(Eviction):
    """score = nearness in execution order, then expected tokens, for experts that are predicted and still to come.

    Predicted are each token's top-k; their probabilities summed over the batch are the expected tokens. Everything
    else stands below, again by nearness of its layer's next turn, then by last use: a finished layer's slots are the
    first to be taken, but for experts whose layer's gate has just shown that they were predicted in vain.
    """

    needs = ("predicted",)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._used = np.full_like(self.score, -1.0)  # event of the last use, UNUSED once predicted in vain
        self._expected = np.zeros_like(self.score)  # tokens, for layers that are still to come
        self._layer = np.arange(len(self.score))
        self._top_k = meta.model.top_k

    def step_begins(self, begun: StepBegun) -> None:
        self._expected[:] = 0
        self._predict(-1, begun.predicted)

    def touch(self, routed: Routed) -> None:
        used, expected_here = self._used[routed.layer], self._expected[routed.layer]
        used[expected_here > 0] = UNUSED
        used[routed.needed] = routed.event
        expected_here[:] = 0
        self._predict(routed.layer, routed.predicted)

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        """Above what is not predicted, below all that is; `touch` then gives it its place.

        So what waits for a slot never displaces an expert that would have to be loaded again in the same pass.
        """
        return AHEAD / 2

    def _predict(self, layer: int, said: Predicted | None) -> None:
        layers, experts = self.score.shape
        for i, distance in enumerate(said.distances if said is not None else ()):
            if said is not None and layer + distance < layers:
                ids, probability = said.experts[:, i, : self._top_k], said.probability[:, i, : self._top_k]
                self._expected[layer + distance] = expected(ids, probability, experts)
        away = (self._layer - layer - 1) % layers + 1  # the layer just routed is the furthest
        predicted = AHEAD + self._expected
        np.copyto(self.score, np.where(self._expected > 0, predicted, self._used) - PER_LAYER * away[:, None])
