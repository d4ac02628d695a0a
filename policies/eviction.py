"""What an eviction policy is: a score per (layer, expert); the lowest evictable score goes.

A policy is one file in this folder with one subclass of `Eviction`; the file's name is the policy's name.
It keeps scores, or finds victims itself, and nothing else: which experts are held, protected or evictable is
`Residency`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .routed import Routed, StepBegun
from .steps import NO_IDS, NO_PLACES, State, Step, admit_nothing, begin_nothing, own_score, state
from .timed import Timed

if TYPE_CHECKING:
    from .future import Future
    from .prefetch import Proposal
    from .residency import Slots


class Eviction(Timed):
    """Scores for the experts of one model.

    Subclasses set `score[layer, expert]` in `touch`; ties go to the lowest (layer, expert). A policy whose order is
    not a score overrides `victim` instead. Class attributes declare what the policy asks of its surroundings:
      needs          names of what must be at hand: trace columns, or `future` (the whole trace: an oracle)
      wants          optional trace columns that it reads where the trace has them
      timing_free    its decisions never depend on measured time (`Timed`)
      bypass         a miss worth no more than every evictable expert is streamed instead of admitted
      routing_only   scores follow from routing alone, not from slots or who holds them: more slots never miss more
      touch_step     `touch` as a compiled step (policies/steps.py), and beside it, where they are more than nothing,
                     `admit_step`, `value_step` and `begin_step`: compiled engines run such policies
    """

    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    bypass = False
    routing_only = False
    touch_step: Step | None = None
    admit_step: Step = admit_nothing
    value_step: Step = own_score
    begin_step: Step = begin_nothing

    def __init__(self) -> None:
        self.score: NDArray[np.float64] = np.zeros((0, 0))
        self.state: State = state()  # what the steps keep beside scores

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        """Allocate state for a model and its slots. `future` is given to policies that need it."""
        self.score = np.zeros((len(meta.model.moe_layers), meta.model.experts))

    def request_begins(self, request: int) -> None:
        """Sequence `request` enters the batch."""

    def request_ends(self, request: int) -> None:
        """Sequence `request` has left the batch."""

    def step_begins(self, begun: StepBegun) -> None:
        """A forward pass begins, before anything is prefetched for it."""

    def touch(self, routed: Routed) -> None:
        """The router has spoken: bring scores up to date, once, for the whole set."""
        if self.touch_step is None:
            raise NotImplementedError
        self.touch_step.call(
            routed.event, routed.layer, routed.needed, routed.tokens, NO_IDS, NO_PLACES, self.score, self.state
        )

    def proposed(self, event: int, proposals: list[Proposal]) -> None:
        """The prefetch policy wants these; told before any of them is given a slot."""

    def admitted(self, event: int, layer: int, expert: int) -> None:
        """`expert` was given a slot (demand or prefetch)."""

    def evicted(self, layer: int, expert: int) -> None:
        """`expert` lost its slot. Told only to policies that override `victim`."""

    def victim(self, scope: int, evictable: NDArray[np.int64]) -> int:
        """The key (layer * experts + expert) to evict from `evictable` [n], ascending, never empty."""
        raise NotImplementedError

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        """The score with which a prefetched expert would enter; a victim must be worth strictly less."""
        return float(self.value_step.call(event, layer, expert, self.score, self.state))

    @property
    def searches(self) -> bool:
        """It finds victims itself: `score` does not say who goes."""
        return type(self).victim is not Eviction.victim

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}
