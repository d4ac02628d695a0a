"""A small perceptron as flat arrays: evaluated without the library that fitted it, row by row.

Every row is summed in the same order whatever is asked beside it, which a matrix product does not promise: what is said
about a token must not depend on the tokens after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import compiled

NETWORK_ARRAYS = ("first", "first_bias", "second", "second_bias", "out", "out_bias")
Network = dict[str, NDArray[Any]]  # under those names


def packed_network(scaler: Any, network: Any) -> Network:
    """From a fitted scikit-learn `StandardScaler` and the `MLPRegressor` after it, two hidden layers and one output.

    The scaler goes into the first layer: (x - mean) / scale @ W + b = x @ (W / scale) + (b - mean @ (W / scale)).
    """
    first, second, out = (np.asarray(weights, np.float64) for weights in network.coefs_)
    first_bias, second_bias, out_bias = network.intercepts_
    first = first / scaler.scale_[:, None]
    arrays = (first, first_bias - scaler.mean_ @ first, second, second_bias, out[:, 0], out_bias)
    return {name: np.ascontiguousarray(array, np.float32) for name, array in zip(NETWORK_ARRAYS, arrays, strict=True)}


@compiled
def _rectified(rows, weights, bias, found):  # type: ignore[no-untyped-def]
    """found[c, j] = max(0, bias[j] + sum over i of rows[c, i] weights[i, j])."""
    for c in range(len(rows)):
        for j in range(len(bias)):
            found[c, j] = bias[j]
        for i in range(len(weights)):
            value = rows[c, i]
            for j in range(len(bias)):
                found[c, j] += value * weights[i, j]
        for j in range(len(bias)):
            found[c, j] = max(found[c, j], np.float32(0.0))


@compiled
def add_network(rows, first, first_bias, second, second_bias, out, out_bias, total):  # type: ignore[no-untyped-def]
    """Add to `total` [C] the predictions for `rows` [C, F] of float32 features."""
    near = np.empty((len(rows), len(first_bias)), np.float32)
    far = np.empty((len(rows), len(second_bias)), np.float32)
    _rectified(rows, first, first_bias, near)
    _rectified(near, second, second_bias, far)
    for c in range(len(rows)):
        said = out_bias[0]
        for j in range(len(out)):
            said += far[c, j] * out[j]
        total[c] += said
