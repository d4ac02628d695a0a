"""First in, first out: the expert that has been held longest goes, used or not."""

from __future__ import annotations

from .eviction import Eviction
from .steps import admit_step, as_used_now, touch_nothing


@admit_step
def _admit(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    score[layer, expert] = event


class FIFO(Eviction):
    """score = index of the layer-step at which the expert was given its slot."""

    touch_step = touch_nothing
    admit_step = _admit
    value_step = as_used_now

    def admitted(self, event: int, layer: int, expert: int) -> None:
        self.admit_step.call(event, layer, expert, self.score, self.state)
