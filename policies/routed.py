"""The two events that every policy sees: a step begins, and the router of one layer has spoken."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .predictor import Predicted


@dataclass(slots=True)
class Routed:
    """What a layer needs, and what the router said. T tokens, top-K; n distinct experts.

    `event` = step * layers + layer counts layer-steps. Ids >= experts are absent entries.
    """

    event: int
    step: int
    layer: int
    ids: NDArray[np.unsignedinteger[Any]]  # [T, K], rank order
    weights: NDArray[np.float16] | None  # [T, K], gate weights
    requests: NDArray[np.int32] | None  # [T]
    lookahead: NDArray[np.unsignedinteger[Any]] | None  # [T, D, K'], later gates on this layer's router input
    needed: NDArray[np.int32]  # [n], ascending expert ids
    tokens: NDArray[np.int32]  # [n], tokens routed to each
    held: NDArray[np.bool_]  # [n]: held before anything changed
    columns: dict[str, NDArray[Any]]  # this layer's part of further trace columns that a policy names in `needs`
    lookahead_weights: NDArray[np.float16] | None = None  # [T, D, K'], those gates' probabilities
    predicted: Predicted | None = None  # what the predictor says now that this layer is routed


@dataclass(slots=True)
class StepBegun:
    """A forward pass starts. `event` lies just before the step's first layer-step."""

    event: int
    step: int
    phase: int  # 0 prefill, 1 decode
    tokens: NDArray[np.int32] | None  # [T], -1 = unknown
    requests: NDArray[np.int32] | None  # [T]
    lookahead: NDArray[np.unsignedinteger[Any]] | None  # [T, D, K'], gates on the tokens' embeddings
    lookahead_weights: NDArray[np.float16] | None = None  # [T, D, K']
    predicted: Predicted | None = None  # what the predictor says before the first layer
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)  # [T, ...] of per-token columns that a policy reads
