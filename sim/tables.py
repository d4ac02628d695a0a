"""The blocks of a step as tables, for array code: durations by tokens, launches by block."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .cost import Batch, CostModel

# columns: device time of each block of a step, then what activations take to the host and back
EMBED, ATTENTION, DENSE, ROUTER, GATES, SHARED, HEAD_BLOCK, ADD, THERE, BACK = range(10)
BLOCKS = 10


def block_tables(cost: CostModel, most: int, gates: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[most + 1, BLOCKS] picoseconds by tokens, of the head by outputs, and [BLOCKS] launches.

    Attention depends on more than tokens: its column is for batches that attend to nothing else.
    """
    tables, launches = np.zeros((most + 1, BLOCKS), np.int64), np.ones(BLOCKS, np.int64)
    for tokens in range(1, most + 1):
        batch = Batch(tokens, tokens, tokens, tokens)
        blocks = (
            cost.embed(batch), cost.attention(batch), cost.dense(batch), cost.router(batch), cost.gates(batch, gates),
            cost.shared(batch), cost.head(batch), cost.add(batch),
        )  # fmt: skip
        launches[:THERE] = [block.launches for block in blocks]
        tables[tokens] = *(block.device_ps for block in blocks), *cost.activations(batch)
    tables[0, HEAD_BLOCK] = cost.head(Batch(0, 0, 0, 0)).device_ps
    return tables, launches
