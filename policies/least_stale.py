"""Least-Stale: what the running forward pass has not touched goes first (SpecMD, 2602.03921).

A pass visits layers in order, so an expert it has touched belongs to a layer behind it, and one it has not is either
unwanted or still to come. Within both classes the order is first in, first out.
"""

from __future__ import annotations

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .steps import admit_step, as_used_now, state, touch_step

FRESH = 2.0**40  # above every event, so that a fresh expert outranks every stale one
ADMITTED = 0  # the one plane: event of admission


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    step = event // score.shape[0]
    if step != state.words[0]:
        state.words[0] = step
        score[:] = state.planes[:, ADMITTED]
    for expert in needed:
        score[layer, expert] = state.planes[layer, ADMITTED, expert] + FRESH


@admit_step
def _admit(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    fresh = score[layer, expert] >= FRESH
    state.planes[layer, ADMITTED, expert] = event
    score[layer, expert] = event + FRESH if fresh else float(event)


class LeastStale(Eviction):
    """score = event of admission, plus FRESH when the running step has used the expert."""

    touch_step = _touch
    admit_step = _admit
    value_step = as_used_now

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        self.state = state(planes=(layers, 1, experts), words=(-1,))

    def admitted(self, event: int, layer: int, expert: int) -> None:
        self.admit_step.call(event, layer, expert, self.score, self.state)
