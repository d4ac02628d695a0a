"""Measured times as the cost model's formulas: robust least squares, relative errors, nothing below zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

STEEP = 1e-3  # the least share of the largest size's time that its bytes take, in a fit. Chosen here
SOFT = 0.05  # a relative error from which on a point pulls less than its square: an outlier. Chosen here


@dataclass(frozen=True)
class Line:
    """seconds = alpha + bytes / rate. `off`: the median relative error of the fit.

    `fixed`: alpha's share of the largest size's time; where it is large, the rate is hardly known.
    """

    alpha: float
    rate: float
    off: float
    fixed: float


@dataclass(frozen=True)
class Roofline:
    """seconds = max(bytes / bandwidth, operations / rate) + latency. `off`: the median relative error of the fit."""

    bandwidth: float
    rate: float
    latency: float
    off: float


def line(sizes: Sequence[int], seconds: Sequence[float]) -> Line:
    """Fit at least two sizes."""
    size, took = np.asarray(sizes, float), np.asarray(seconds, float)
    largest = int(np.argmax(size))

    def errors(free: NDArray[np.float64]) -> NDArray[np.float64]:
        return (free[0] * took.min() + free[1] * took[largest] * size / size[largest]) / took - 1

    fitted = least_squares(
        errors, (0.5, 0.9), bounds=((0, STEEP), np.inf), loss="soft_l1", f_scale=SOFT, xtol=1e-12, ftol=1e-12
    )
    alpha, slope = fitted.x[0] * took.min(), fitted.x[1] * took[largest] / size[largest]
    off = float(np.median(np.abs(errors(fitted.x))))
    return Line(float(alpha), float(1 / slope), off, float(alpha / took[largest]))


def roofline(
    moved: Sequence[float], operations: Sequence[float], seconds: Sequence[float], latency: bool = True
) -> Roofline:
    """Fit points of which some move much per operation and some compute much per byte; with a latency or without.

    The formula has a kink, so that one start may end in the wrong place: several are tried and the best is kept.
    """
    size, work, took = (np.asarray(values, float) for values in (moved, operations, seconds))
    top_bandwidth, top_rate, least = (size / took).max(), (work / took).max(), took.min()

    def predicted(free: NDArray[np.float64]) -> NDArray[np.float64]:
        bandwidth, rate, fixed = np.exp(free) * (top_bandwidth, top_rate, least if latency else 0.0)
        return np.asarray(np.maximum(size / bandwidth, work / rate) + fixed)

    def errors(free: NDArray[np.float64]) -> NDArray[np.float64]:
        return predicted(free) / took - 1

    starts = [np.log((1 + share, 1 + share, share)) for share in (0.01, 0.1, 0.5, 0.9)]
    limits = (np.full(3, -20.0), np.full(3, 20.0))
    fits = [
        least_squares(errors, start, bounds=limits, loss="soft_l1", f_scale=SOFT, xtol=1e-12, ftol=1e-12)
        for start in starts
    ]
    best = min(fits, key=lambda fit: float(fit.cost))
    bandwidth, rate, fixed = np.exp(best.x) * (top_bandwidth, top_rate, least if latency else 0.0)
    return Roofline(float(bandwidth), float(rate), float(fixed), float(np.median(np.abs(errors(best.x)))))
