"""The pre-gate: what later layers' own gates choose on this layer's router input, as the trace recorded it.

mixtral-offloading (2312.17238, section 3.2), Fate (2502.12224) and others predict so, without training; it is the base
that ExpertFlow's hybrid predictor corrects (2510.26730).
"""

from __future__ import annotations

import numpy as np

from ..traces.trace import Trace
from .predictor import Predictions, Predictor


class NextGate(Predictor):
    """Every distance that was recorded; without recorded weights every choice has probability 1."""

    needs = ("lookahead",)
    gates = 1
    trained = False

    def __init__(self) -> None:
        super().__init__(None)

    def predict(self, trace: Trace) -> Predictions:
        assert trace.lookahead is not None
        layers = trace.experts.shape[1]
        weights = trace.lookahead_weights
        present = trace.lookahead < trace.meta.model.experts
        probability = present.astype(np.float16) if weights is None else np.where(present, weights, np.float16(0))
        moments = tuple(range(-1, layers))
        return Predictions(moments, trace.meta.lookahead_distances, trace.lookahead, probability)

    def parameters(self) -> dict[str, object]:
        return {}
