"""What a machine takes to serve a miss, known before a run: of a profile in the simulator, of a calibration live.

Constants, so that a policy which weighs them decides the same wherever it is given the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
