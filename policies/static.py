"""Static placement: the most popular experts stay, every other miss passes through scratch slots.

This is what KTransformers' `frequency` placement and llama.cpp's hand-written tensor overrides do. Popularity is
counted on the trace that is replayed, so results are in-sample and labelled `oracle`.
"""

from __future__ import annotations

import numpy as np

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .steps import touch_nothing


class Static(Eviction):
    """score = how many steps of the trace use the expert; it never changes."""

    needs = ("future",)
    bypass = True
    routing_only = True
    touch_step = touch_nothing

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        if future is None:
            raise ValueError("static needs the future")
        self.score = future.popularity().astype(np.float64)
