"""Least frequently used, with counts kept for experts that are not held (2511.05814)."""

from __future__ import annotations

from .eviction import Eviction
from .steps import touch_step


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    for expert in needed:
        score[layer, expert] += 1


class LFU(Eviction):
    """score = layer-steps that used the expert."""

    routing_only = True
    touch_step = _touch
