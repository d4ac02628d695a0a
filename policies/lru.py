"""Least recently used: the expert whose last use lies furthest back goes (mixtral-offloading, 2312.17238)."""

from __future__ import annotations

from .eviction import Eviction
from .steps import as_used_now, touch_step


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    for expert in needed:
        score[layer, expert] = event


class LRU(Eviction):
    """score = index of the layer-step that last used the expert."""

    routing_only = True
    touch_step = _touch
    value_step = as_used_now
