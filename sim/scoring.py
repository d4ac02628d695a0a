"""An eviction policy's compiled steps, ready to be driven through a trace without a clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..policies.compiled import COMPILED, bare
from ..policies.eviction import Eviction
from ..policies.future import future_of
from ..policies.lru import LRU
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..policies.steps import State, Step, signature
from ..traces.trace import Trace
from .compiled import in_steps
from .needs import Needs

KINDS = ("touch", "admit", "begin")  # kinds of steps, in the order in which loops take them


@dataclass(frozen=True)
class Scoring:
    """A policy at the start of a replay: its steps and what they work on."""

    name: str
    steps: tuple[Step, Step, Step]  # touch, admit, begin
    bypass: bool
    score: NDArray[np.float64]  # [L, E]
    state: State
    routing_only: bool
    by_recency: bool  # it is LRU itself

    def run(self, loop: Callable[..., Any], needs: Needs, *rest: Any) -> Any:
        """`loop(touch, admit, begin, needs, *rest, bypass, score, state)` on copies, compiled once per signature.

        A loop makes no arrays: it is handed them (see `policies.compiled.bare`).
        """
        values = (needs, *rest, self.bypass, self.score.copy(), State._make(array.copy() for array in self.state))
        return _with_steps(loop, values)(*(step.call for step in self.steps), *values)


def scoring_of(policy: Policy, trace: Trace, needs: Needs, slots: Slots) -> Scoring:
    """`policy`'s eviction, started on `trace`. Raises InputError for one that has no compiled step or is more."""
    beyond = [
        part
        for part, plain in (("prefetch", "none"), ("predict", "none"), ("miss", "wait"), ("schedule", "none"))
        if policy.document[part]["kind"] != plain
    ]
    if beyond:
        raise InputError(f"policy {policy.name}: {beyond[0]}: a replay without a clock only evicts; use `sim run`")
    if policy.document["miss"]["prefill"] != "select":
        raise InputError(f"policy {policy.name}: miss.prefill: a replay without a clock selects; use `sim run`")
    if policy.stale:
        raise InputError(f"policy {policy.name}: cache.stale: a replay without a clock has fresh scores; use `sim run`")
    eviction = policy.eviction()
    touch = eviction.touch_step
    if touch is None or not in_steps(eviction, "touch_step") or type(eviction).victim is not Eviction.victim:
        evict = policy.document["cache"]["evict"]
        raise InputError(f"policy {policy.name}: eviction {evict} has no compiled step; use `sim run`")
    eviction.start(trace.meta, slots, future_of(trace) if policy.oracle else None)
    places, kept = int(needs.place.max(initial=0)) + 1, eviction.state
    shapes = (places, *kept.requests.shape[1:]), (places, *kept.lengths.shape[1:])
    kept = kept._replace(requests=np.zeros(shapes[0], np.float32), lengths=np.zeros(shapes[1]))
    steps = (touch, eviction.admit_step, eviction.begin_step)
    exactly = type(eviction) is LRU
    return Scoring(policy.name, steps, eviction.bypass, eviction.score, kept, eviction.routing_only, exactly)


def _with_steps(loop: Callable[..., Any], values: tuple[Any, ...]) -> Callable[..., Any]:
    if not COMPILED:
        return loop
    from numba import typeof

    return _compiled(loop, tuple(typeof(value) for value in values))


@cache
def _compiled(loop: Callable[..., Any], types_of_values: Any) -> Callable[..., Any]:
    """For one signature, whatever the policy: so that the machine code can be cached between runs."""
    import numba
    from numba import types

    steps = [types.FunctionType(signature(kind)) for kind in KINDS]
    return numba.njit((*steps, *types_of_values), cache=True, nogil=True, error_model="numpy", _nrt=False)(loop)


def room_for_choices(needs: Needs) -> NDArray[np.int16]:
    """[L, most rows of a step, K]: what `gather` fills."""
    rows = int(np.diff(needs.starts).max(initial=1))
    return np.zeros((needs.layers, rows, needs.ids.shape[2]), np.int16)


@bare
def gather(ids, first, last, layer, experts, chosen):  # type: ignore[no-untyped-def]
    """The layer's ids of rows `first` to `last` into `chosen`; what is absent reads `experts`."""
    for row in range(first, last):
        for i in range(chosen.shape[2]):
            chosen[layer, row - first, i] = min(np.int64(ids[row, layer, i]), experts)


@bare
def order_of(worth):  # type: ignore[no-untyped-def]
    """A whole number that compares like the score (both zeros alike): the compiler takes many of those at a time."""
    bits = np.float64(worth + 0.0).view(np.int64)
    return bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF))


@bare
def most_worth_first(scores, keys, many):  # type: ignore[no-untyped-def]
    """Sort by falling score; equals stay in order."""
    for i in range(1, many):
        key, at = keys[i], i
        while at > 0 and scores[keys[at - 1]] < scores[key]:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key
