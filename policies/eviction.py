"""What an eviction policy is: a score per (layer, expert); the lowest evictable score goes.

A policy is one file in this folder with one subclass of `Eviction`; the file's name is the policy's name.
It updates `score` when experts are routed, and nothing else: which experts are held, protected or evictable
is `Residency`'s business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .future import Future


class Eviction:
    """Scores for the experts of `layers` MoE layers with `experts` experts each.

    Subclasses set `score[layer, expert]` in `touch`. Ties go to the lowest (layer, expert).
    Class attributes declare what the policy asks of its surroundings:
      needs          names of what must be at hand: trace columns, or `future` (the whole trace: an oracle)
      timing_free    its decisions never depend on measured time
      bypass         a miss worth no more than every evictable expert is streamed instead of admitted
    """

    needs: tuple[str, ...] = ()
    timing_free = True
    bypass = False

    def __init__(self) -> None:
        self.score: NDArray[np.float64] = np.zeros((0, 0))

    def start(self, layers: int, experts: int, future: Future | None) -> None:
        """Allocate state for a model with this geometry. `future` is given to policies that need it."""
        self.score = np.zeros((layers, experts))

    def touch(self, event: int, layer: int, needed: NDArray[np.int32], tokens: NDArray[np.int32]) -> None:
        """The router has spoken. `event` counts layer-steps; `needed` [n] ascending, `tokens` [n] per expert."""
        raise NotImplementedError

    def admitted(self, event: int, layer: int, expert: int) -> None:
        """`expert` was given a slot (demand or prefetch). Policies that score by admission time override this."""

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        """The score with which a prefetched expert would enter; a victim must be worth strictly less."""
        return float(self.score[layer, expert])

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}
