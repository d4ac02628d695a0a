"""Perfect prediction: prefetch exactly what a later layer of this step will need. An upper reference, never live."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .future import Future
from .prefetch import Prefetch, Proposal
from .routed import Routed, StepBegun
from .steps import propose_step, state

DISTANCE, LAYERS, EXPERTS, EVENTS = range(4)  # of `state.words`; then the first use of each event, then all keys
HEAD = 4


@propose_step
def _propose(  # type: ignore[no-untyped-def]
    event, layer, needed, tokens, chosen, ahead, state, targets, ends, experts
):
    words = state.words
    first, last = event + words[DISTANCE], event + words[DISTANCE]
    if layer < 0:
        if event >= 0:
            return 0
        first, last = 0, min(words[DISTANCE], words[LAYERS]) - 1
    n, proposals = 0, 0
    for wanted in range(first, last + 1):
        if wanted < words[EVENTS]:
            for use in range(words[HEAD + wanted], words[HEAD + wanted + 1]):
                experts[n] = words[HEAD + words[EVENTS] + 1 + use] % words[EXPERTS]
                n += 1
        targets[proposals] = wanted % words[LAYERS]
        ends[proposals] = n
        proposals += 1
    return proposals


class Oracle(Prefetch):
    """`distance` layers ahead, across the end of a step too: the last layers prefetch for the next token's first."""

    needs = ("future",)
    propose_step = _propose

    def __init__(self, distance: int = 1) -> None:
        if distance < 1:
            raise ValueError(f"distance must be at least 1, got {distance}")
        self.distance = distance

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        if future is None:
            raise ValueError("oracle needs the future")
        uses = future.uses()
        self._layers, self._experts = future.layers, future.experts
        self._keys = uses[:, 1]
        self._begin = future.first_of_event()
        head = (self.distance, self._layers, self._experts, len(self._begin) - 1)
        self.state = state()._replace(words=np.concatenate((np.array(head, np.int64), self._begin, self._keys)))

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        if begun.event >= 0:
            return []
        return [(event, self._needed(event)) for event in range(min(self.distance, self._layers))]

    def propose(self, routed: Routed) -> list[Proposal]:
        event = routed.event + self.distance
        return [(event % self._layers, self._needed(event))]

    def _needed(self, event: int) -> NDArray[np.int32]:
        if event + 1 >= len(self._begin):
            return np.zeros(0, np.int32)
        keys = self._keys[self._begin[event] : self._begin[event + 1]]
        return (keys % self._experts).astype(np.int32)

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance}
