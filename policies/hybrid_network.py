"""The hybrid predictor with a small network in place of the random forest (hybrid.py says all the rest).

Hidden layers of 32 and 16 are chosen here: slightly above the forest's recall, in less time
(benchmarks/hybrid_variants.py).
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import Trace
from .fitted import Fitted
from .hybrid import Model, gates_of, train
from .network import Network, packed_network
from .predictor import Predictions, Predictor

HIDDEN = (32, 16)
ROUNDS = 20


class HybridNetwork(Predictor):
    """Says what `hybrid` says, corrected by a network."""

    @property
    def gates(self) -> int:  # type: ignore[override]
        """As of `hybrid`."""
        return gates_of(self)

    @classmethod
    def train(cls, trace: Trace, judged: Trace) -> Fitted:
        """See `Predictor.train`; metrics as of `hybrid`."""
        return train(trace, judged, "hybrid-network", fit_network)

    def predict(self, trace: Trace) -> Predictions:
        """See `Predictor.predict`. Raises InputError for a trace of another geometry or without the pre-gate."""
        return Model(self.fitted()).predictions(trace)


def fit_network(rows: NDArray[np.float32], target: NDArray[np.float32]) -> Network:
    """Fitted by Adam to the squared error, for `rows` [R, F] and `target` [R]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(rows)
    network = MLPRegressor(hidden_layer_sizes=HIDDEN, batch_size=min(200, len(rows)), max_iter=ROUNDS, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of rounds is the stopping rule
        network.fit(scaler.transform(rows), target)
    return packed_network(scaler, network)
