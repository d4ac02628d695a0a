"""Prefetch what a later layer's own gate chooses on this layer's router input, a fixed number of layers ahead.

The idea of mixtral-offloading (2312.17238, section 3.2) and of Fate (2502.12224), without training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.trace import TraceMeta
from .compiled import compiled
from .future import Future
from .prefetch import Prefetch, Proposal, ranked
from .routed import Routed, StepBegun
from .steps import propose_step, state

DISTANCE, LAYERS, EXPERTS, DISTANCES = range(
    4
)  # of `state.words`; then the column of each distance up to DISTANCE, or -1
HEAD = 4


@propose_step
def _propose(  # type: ignore[no-untyped-def]
    event, layer, needed, tokens, chosen, ahead, state, targets, ends, experts
):
    words, n, proposals = state.words, 0, 0
    width = ahead.shape[1] // words[DISTANCES]
    first = words[DISTANCE] if layer >= 0 else 1
    last = words[DISTANCE] if layer >= 0 else min(words[DISTANCE], words[LAYERS])
    for distance in range(first, last + 1):
        column = words[HEAD + distance - 1]
        if column >= 0 and layer + distance < words[LAYERS]:
            n = _rank(ahead, column * width, width, words[EXPERTS], experts, n)
            targets[proposals] = layer + distance
            ends[proposals] = n
            proposals += 1
    return proposals


@compiled
def _rank(ahead, first, width, count, experts, n):  # type: ignore[no-untyped-def]
    """Distinct predicted experts into `experts[n:]`: most and best-ranked votes first, then lowest id."""
    votes = np.zeros(count, np.int64)
    for row in range(len(ahead)):
        for rank in range(width):
            expert = ahead[row, first + rank]
            if expert < count:
                votes[expert] += width - rank
    start = n
    for expert in range(count):
        if votes[expert] > 0:
            at = n
            while at > start and votes[experts[at - 1]] < votes[expert]:
                experts[at] = experts[at - 1]
                at -= 1
            experts[at] = expert
            n += 1
    return n


class Lookahead(Prefetch):
    """`distance` layers ahead; the first `distance` layers are predicted from the embedding at step start."""

    needs = ("lookahead",)
    gates = 1
    propose_step = _propose

    def __init__(self, distance: int = 1) -> None:
        if distance < 1:
            raise ValueError(f"distance must be at least 1, got {distance}")
        self.distance = distance

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._experts, self._layers = meta.model.experts, len(meta.model.moe_layers)
        self._column = {distance: i for i, distance in enumerate(meta.lookahead_distances)}
        if self.distance not in self._column:
            raise InputError(
                f"prefetch lookahead: distance {self.distance} is not in the trace, which has "
                f"{list(meta.lookahead_distances)}: choose one of those or record with --lookahead {self.distance}"
            )
        columns = [self._column.get(distance, -1) for distance in range(1, self.distance + 1)]
        self.state = state(words=(self.distance, self._layers, self._experts, len(self._column), *columns))

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        known = [d for d in range(1, min(self.distance, self._layers) + 1) if d in self._column]
        return [(d - 1, self._ranked(begun.lookahead, d)) for d in known]

    def propose(self, routed: Routed) -> list[Proposal]:
        target = routed.layer + self.distance
        return [(target, self._ranked(routed.lookahead, self.distance))] if target < self._layers else []

    def _ranked(self, lookahead: NDArray[np.unsignedinteger[Any]] | None, distance: int) -> NDArray[np.int32]:
        """Distinct predicted experts: most and best-ranked votes first, then lowest id."""
        if lookahead is None:
            raise ValueError("prefetch lookahead was driven without the lookahead column")
        predicted = lookahead[:, self._column[distance]]  # [T, K']
        votes = np.tile(np.arange(predicted.shape[1], 0, -1), len(predicted))
        flat = predicted.ravel()
        present = flat < self._experts
        return ranked(np.bincount(flat[present], votes[present], self._experts).astype(np.int64))

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance}
