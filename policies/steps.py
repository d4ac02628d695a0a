"""The hot steps of a policy as compiled functions on plain arrays, one signature for all policies of a kind.

A policy that has them can be called from compiled engines without Python in between; its ordinary methods call the
same functions. Each is compiled when it is first used and cached; without numba it is plain Python. L layers,
E experts, K top-k, n needed experts, T tokens.

    touch(event, layer, needed [n], tokens [n], chosen [L, >=T, K], places [T], score [L, E], state)
    admit(event, layer, expert, score, state)               the expert was given a slot
    value(event, layer, expert, score, state) -> float      with which a prefetched expert would enter
    begin(place, state)                                     a sequence that was not there before is in `place`
    propose(event, layer, needed, tokens, chosen, ahead [T, D * K'], state, targets, ends, experts) -> proposals

`chosen[l]` holds the ids of the running step's layers routed so far (ids >= E are absent); `places` says in which row
of `state.requests` each token's sequence lives, tokens of one sequence standing together; `ahead` is this moment's
lookahead. `propose` (layer -1: the step begins) writes of its i-th proposal the target layer to `targets[i]` and the
experts, best first, to `experts[ends[i - 1]:ends[i]]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .compiled import COMPILED


class State(NamedTuple):
    """What a policy keeps beside scores; arrays that it does not use are tiny."""

    planes: NDArray[np.float64]  # [L, P, E]
    clock: NDArray[np.float64]  # [L, C]
    tables: NDArray[np.float32]  # [L, B, E, E]
    requests: NDArray[np.float32]  # [R, L, B, E], one row for each living sequence
    lengths: NDArray[np.float64]  # [R, L]
    numbers: NDArray[np.float64]  # parameters and other floating numbers
    words: NDArray[np.int64]  # whole numbers


def state(
    planes: tuple[int, ...] = (1, 1, 1), clock: tuple[int, ...] = (1, 1), tables: tuple[int, ...] = (1, 1, 1, 1),
    requests: tuple[int, ...] = (1, 1, 1, 1), numbers: Any = (0.0,), words: Any = (0,),
) -> State:  # fmt: skip
    """Zeros of the given shapes, and the given numbers."""
    return State(
        np.zeros(planes), np.zeros(clock), np.zeros(tables, np.float32), np.zeros(requests, np.float32),
        np.zeros(requests[:2]), np.array(numbers, np.float64), np.ascontiguousarray(words, np.int64),
    )  # fmt: skip


def with_twice_the_places(of: State) -> State:
    """The same state with room for twice as many sequences."""
    requests, lengths = np.concatenate((of.requests, np.zeros_like(of.requests))), np.tile(of.lengths, (2, 1))
    lengths[len(of.lengths) :] = 0
    return of._replace(requests=requests, lengths=lengths)


class Step:
    """One such function; `kind` names its signature."""

    def __init__(self, function: Callable[..., Any], kind: str) -> None:
        self.function, self.kind = function, kind

    @cached_property
    def call(self) -> Callable[..., Any]:
        """Compiled for exactly its signature, so that engines can take it as an argument and still be cached."""
        if not COMPILED:
            return self.function
        import numba

        return numba.njit(signature(self.kind), cache=True, nogil=True, error_model="numpy")(self.function)


def signature(kind: str) -> Any:
    """numba's signature of a kind of step."""
    from numba import typeof, types

    whole, score = types.int64, types.float64[:, ::1]
    ids, rows = types.int32[::1], types.int16[:, :, ::1]
    of_policy = typeof(state())
    return {
        "touch": types.void(whole, whole, ids, ids, rows, types.int64[::1], score, of_policy),
        "admit": types.void(whole, whole, whole, score, of_policy),
        "value": types.float64(whole, whole, whole, score, of_policy),
        "begin": types.void(whole, of_policy),
        "propose": types.int64(
            whole, whole, ids, ids, rows, types.int16[:, ::1], of_policy, types.int64[::1], types.int64[::1],
            types.int32[::1],
        ),
    }[kind]  # fmt: skip


def touch_step(function: Callable[..., Any]) -> Step:
    return Step(function, "touch")


def admit_step(function: Callable[..., Any]) -> Step:
    return Step(function, "admit")


def value_step(function: Callable[..., Any]) -> Step:
    return Step(function, "value")


def begin_step(function: Callable[..., Any]) -> Step:
    return Step(function, "begin")


def propose_step(function: Callable[..., Any]) -> Step:
    return Step(function, "propose")


@touch_step
def touch_nothing(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    """Scores do not follow use."""


@admit_step
def admit_nothing(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    """Scores do not follow admission."""


@value_step
def own_score(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    """A prefetched expert enters with the score that it has."""
    return score[layer, expert]


@value_step
def as_used_now(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    """A prefetched expert enters as if it were used now, where scores are layer-steps."""
    return float(event)


@begin_step
def begin_nothing(place, state):  # type: ignore[no-untyped-def]
    """Nothing is kept per sequence."""


@propose_step
def propose_nothing(  # type: ignore[no-untyped-def]
    event, layer, needed, tokens, chosen, ahead, state, targets, ends, experts
):
    """There is no prefetch policy."""
    return 0


NO_IDS = np.zeros((1, 1, 1), np.int16)  # `chosen` for a step that reads none
NO_PLACES = np.zeros(0, np.int64)
