"""Compiled steps of the eviction policies that replays without a clock know: the same scores as policies/, to the bit.

A rule is a number, so that one compiled loop serves all. Arrays of one model: `score` [L, E], `state` [L, E] (what a
policy keeps beside its scores) and `parameters` [P].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..policies.belady import Belady
from ..policies.compiled import compiled
from ..policies.eviction import Eviction
from ..policies.fifo import FIFO
from ..policies.future import Future
from ..policies.lcp import LCP
from ..policies.least_stale import FRESH, LeastStale
from ..policies.lfu import LFU
from ..policies.lfu_aged import LFUAged
from ..policies.lrfu import LRFU, _with_use
from ..policies.lru import LRU
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..policies.static import Static
from ..traces.trace import Trace
from .needs import Needs, following

LRU_RULE, LFU_RULE, LRFU_RULE, LCP_RULE, FIFO_RULE, AGED_RULE, STALE_RULE, BELADY_RULE, STATIC_RULE = range(9)
RULES: dict[type[Eviction], int] = {
    LRU: LRU_RULE, LFU: LFU_RULE, LRFU: LRFU_RULE, LCP: LCP_RULE, FIFO: FIFO_RULE, LFUAged: AGED_RULE,
    LeastStale: STALE_RULE, Belady: BELADY_RULE, Static: STATIC_RULE,
}  # fmt: skip
STACK_RULES = (LRU_RULE, LFU_RULE, LRFU_RULE, LCP_RULE, AGED_RULE, BELADY_RULE, STATIC_RULE)


@dataclass(frozen=True)
class Scores:
    """An eviction policy at the start of a replay."""

    rule: int
    bypass: bool
    score: NDArray[np.float64]  # [L, E]
    parameters: NDArray[np.float64]
    coming: NDArray[np.float64]  # [A] moment of each access's next use, for `belady`; else empty


def scores_of(policy: Policy, trace: Trace, needs: Needs) -> Scores:
    """`policy`'s eviction, started on `trace`. Raises InputError for one that has no compiled step or is more."""
    eviction = policy.eviction()
    rule = RULES.get(type(eviction))
    if rule is None:
        names = ", ".join(cls.__module__.rpartition(".")[2].replace("_", "-") for cls in RULES)
        raise InputError(f"policy {policy.name}: its eviction has no compiled step; use `sim run`, or evict by {names}")
    beyond = [
        part
        for part, plain in (("prefetch", "none"), ("predict", "none"), ("miss", "wait"), ("schedule", "none"))
        if policy.document[part]["kind"] != plain
    ]
    if beyond:
        raise InputError(f"policy {policy.name}: {beyond[0]}: a replay without a clock only evicts; use `sim run`")
    future = Future(trace) if policy.oracle else None
    eviction.start(trace.meta, Slots((1,)), future)
    parameters, coming = np.zeros(0), np.zeros(0)
    if isinstance(eviction, LRFU):
        parameters = np.array([eviction.half_life])
    elif isinstance(eviction, LFUAged):
        parameters = np.array([float(eviction.halve_every)])
    elif isinstance(eviction, LCP):  # NumPy's logarithm, whose last bit decides ties, as a table over the uses
        logarithms = np.log(np.arange(1.0, len(trace.step_starts) + 1))
        parameters = np.concatenate(([eviction.window, float(np.log(eviction.decay)), 0.0], logarithms))
    elif isinstance(eviction, Belady) and future is not None:
        coming = following(needs, future)
    return Scores(rule, eviction.bypass, eviction.score, parameters, coming)


@compiled
def touch(rule, event, layer, step, needed, first, last, coming, score, state, parameters):  # type: ignore[no-untyped-def]
    """What `Eviction.touch` does for `needed[first:last]`. Other layers' scores change at a step's first layer only."""
    layers, experts = score.shape
    if rule == LRU_RULE:
        for i in range(first, last):
            score[layer, needed[i]] = event
    elif rule == LFU_RULE:
        for i in range(first, last):
            score[layer, needed[i]] += 1
    elif rule == LRFU_RULE:
        now = event / layers / parameters[0]
        for i in range(first, last):
            score[layer, needed[i]] = _with_use(score[layer, needed[i]], now)
    elif rule == LCP_RULE:
        recency = -step / parameters[0] * parameters[1]
        for i in range(first, last):
            state[layer, needed[i]] += 1
            score[layer, needed[i]] = parameters[2 + int(state[layer, needed[i]])] + recency
    elif rule == AGED_RULE:
        if layer == 0 and step > 0 and step % int(parameters[0]) == 0:
            for other in range(layers):
                for expert in range(experts):
                    score[other, expert] /= 2.0
        for i in range(first, last):
            score[layer, needed[i]] += 1
    elif rule == STALE_RULE:
        if layer == 0:
            score[:] = state
        for i in range(first, last):
            score[layer, needed[i]] = state[layer, needed[i]] + FRESH
    elif rule == BELADY_RULE:
        for i in range(first, last):
            score[layer, needed[i]] = -coming[i]


@compiled
def admitted(rule, event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    """What `Eviction.admitted` does."""
    if rule == FIFO_RULE:
        score[layer, expert] = event
    elif rule == STALE_RULE:
        fresh = score[layer, expert] >= FRESH
        state[layer, expert] = event
        score[layer, expert] = event + FRESH if fresh else event


@compiled
def order_of(worth):  # type: ignore[no-untyped-def]
    """A whole number that compares like the score (both zeros alike): the compiler takes many of those at a time."""
    bits = np.float64(worth + 0.0).view(np.int64)
    return bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))


@compiled
def most_worth_first(scores, missing, missed):  # type: ignore[no-untyped-def]
    """Sort by falling score; equals stay in demand order."""
    for i in range(1, missed):
        key, at = missing[i], i
        while at > 0 and scores[missing[at - 1]] < scores[key]:
            missing[at] = missing[at - 1]
            at -= 1
        missing[at] = key
