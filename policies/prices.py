"""What a machine takes to serve a miss, known before a run: of a profile in the simulator, of a calibration live.

Constants, so that a policy which weighs them decides the same wherever it is given the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerPrices:
    """Whole nanoseconds. A layer of T tokens takes the device max(`dense`, T * `dense_token`) before its experts (their
    attention to the keys before them is left out), and n experts for p (token, expert) pairs max(n * `expert`,
    p * `pair`). `launch`: what each further launch of experts adds, on the host or the device, whichever is longer."""

    dense: int
    dense_token: int
    expert: int
    pair: int
    launch: int


@dataclass(frozen=True)
class Prices:
    """Whole nanoseconds. An expert of n tokens takes the near-memory unit max(`expert`, n * `token`)."""

    copy: NDArray[np.int64]  # [L, E] one copy of each expert to the device
    first_copy: int  # on top, before the first of a layer's copies
    near: NDArray[np.bool_]  # [L, E] experts that lie in near memory
    exchange: int  # activations there, the sum back and added, whatever their number
    exchange_token: int  # and for each of the step's tokens
    expert: int
    token: int
    layer: LayerPrices | None = None  # what `miss.prefill: auto` weighs
