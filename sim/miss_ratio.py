"""Misses at every capacity in one pass over the trace.

Mattson et al. (1970, IBM Systems Journal 9:2): under a policy that ranks experts the same way whatever is held, what C
slots hold is part of what C + 1 hold, so one list, the *stack*, tells the contents at all capacities: its first C
entries. A need found at depth p is a miss for every C < p.

The replay contract serves a set at once, and keeps this property at every capacity, also where the set does not fit.
Misses are served in order (demand order: most tokens first, then lowest id; with bypass the highest score first), and
what is needed and held is protected from the start. At one capacity a miss puts out the lowest unprotected entry, if
there is one (with bypass: if its score is lower still). Let the contents with C + 1 slots be those with C and one
entry z more. If z is the need itself, only the smaller cache changes: it admits z, so that it lacks its own victim
instead, or z as before. If z is something else, both miss: they put out the same entry, or the larger one puts out z
and the smaller one an entry that outranks z, or only one of them finds a victim, which then is z. In each case one
entry makes the difference again. So every need is one walk down the stack that carries what has to go: where an
unprotected entry ranks lower it is taken along instead, and what is carried at the end stands where the need was
found. Classifying a set at once is no obstacle, since serving one need moves no other one.

Not so for a policy whose scores depend on its slots or on what got them (fifo): those are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..policies.compiled import bare
from ..policies.policy import SCOPES, Policy
from ..policies.residency import Slots
from ..traces.trace import Trace
from .needs import Needs, needs_of
from .recency import PROTECTED, recency_depths, serve
from .run import load_policy
from .scoring import Scoring, gather, most_worth_first, order_of, room_for_choices, scoring_of


@dataclass(frozen=True)
class MissCurve:
    """`misses` [G, C + 1]: of group g (a layer, or the one pool) with 0 ... C slots; C holds all of its experts."""

    scope: str
    layers: int
    accesses: NDArray[np.int64]  # [G]
    misses: NDArray[np.int64]

    @property
    def total(self) -> NDArray[np.int64]:
        """[C + 1] misses of all layers, each with 0 ... C slots; or of the pool."""
        return self.misses.sum(axis=0)

    @property
    def ratio(self) -> NDArray[np.float64]:
        """[C + 1] `total` as a share of all accesses."""
        return self.total / max(1, int(self.accesses.sum()))


def miss_ratio_curve(trace: Trace, policy: Policy | str | dict[str, Any], scope: str = "layer") -> MissCurve:
    """What `Residency` would miss on `trace` with every number of slots, from a cold start, prefill included.

    scope: layer (every layer has its own slots) or global (one pool), whatever the policy's document says.
    Raises InputError for a policy whose contents at one capacity are no part of those at the next, or that does more
    than evict.
    """
    needs = needs_of(trace)
    return curve_of(needs, stack_scoring(load_policy(policy), trace, needs), scope)


def stack_scoring(policy: Policy, trace: Trace, needs: Needs) -> Scoring:
    """`scoring_of` a policy that obeys inclusion. Raises InputError for another."""
    scoring = scoring_of(policy, trace, needs, Slots((1,)))
    if not scoring.routing_only:
        raise InputError(
            f"policy {policy.name}: its scores depend on slots, so that more slots may miss more and one pass cannot "
            "tell; replay it at each capacity"
        )
    return scoring


def curve_of(needs: Needs, scoring: Scoring, scope: str) -> MissCurve:
    """The same for a policy that has been started; `scoring` stays as it was."""
    if scope not in SCOPES:
        raise InputError(f"scope {scope!r}: expected {' or '.join(SCOPES)}")
    pooled = scope == "global"
    keys = needs.experts * (needs.layers if pooled else 1)
    if scoring.by_recency and 2 * needs.widest <= keys:
        found = recency_depths(needs, pooled, needs.widest)
    else:
        stack = _stack(needs, keys, 1 if pooled else needs.layers)
        scoring.run(_depths, needs, stack, pooled)
        found = stack.found
    accesses = needs.of_layer
    if pooled:
        accesses = accesses.sum(keepdims=True)
    return MissCurve(scope, needs.layers, accesses, accesses[:, None] - np.cumsum(found, axis=1))


class Stack(NamedTuple):
    """G stacks of up to C entries, and what was found in them."""

    found: NDArray[np.int64]  # [G, C + 1] needs at each depth, counted from 1; first uses are found nowhere
    stacks: NDArray[np.int32]  # [G, C]
    depth: NDArray[np.int64]  # [G]
    rank: NDArray[np.int64]  # [L*E] scores as whole numbers; PROTECTED while needed
    serving: NDArray[np.int64]  # [E]
    chosen: NDArray[np.int16]  # [L, most rows of a step, K]


def _stack(needs: Needs, capacity: int, groups: int) -> Stack:
    return Stack(
        found=np.zeros((groups, capacity + 1), np.int64), stacks=np.empty((groups, capacity), np.int32),
        depth=np.zeros(groups, np.int64), rank=np.zeros(needs.layers * needs.experts, np.int64),
        serving=np.empty(needs.experts, np.int64), chosen=room_for_choices(needs),
    )  # fmt: skip


def _depths(touch, admit, open_sequence, needs, stack, pooled, bypass, score, state):  # type: ignore[no-untyped-def]
    """Fill `stack.found`."""
    layers, experts, begin, expert, demand = needs.layers, needs.experts, needs.begin, needs.expert, needs.demand
    tokens, ids, starts, place, opens = needs.tokens, needs.ids, needs.starts, needs.place, needs.opens
    found, stacks, depth, rank, serving = stack.found, stack.stacks, stack.depth, stack.rank, stack.serving
    scores, chosen, from_row, to_row = score.reshape(-1), stack.chosen, 0, 0
    layer, step = -1, 0
    for event in range(len(begin) - 1):
        layer += 1
        if layer == layers:
            layer, step = 0, step + 1
        group = 0 if pooled else layer
        first, many, base = begin[event], begin[event + 1] - begin[event], layer * experts
        if layer == 0:
            from_row, to_row = starts[step], starts[step + 1]
            for row in range(from_row, to_row):
                if opens[row]:
                    open_sequence(place[row], state)
        gather(ids, from_row, to_row, layer, experts, chosen)
        last = first + many
        touch(event, layer, expert[first:last], tokens[first:last], chosen, place[from_row:to_row], score, state)
        if layer == 0:
            _rank(rank, scores)
        else:
            _rank(rank[base : base + experts], scores[base : base + experts])
        for i in range(many):
            serving[i] = base + demand[first + i]
            rank[serving[i]] = PROTECTED
        if bypass:
            most_worth_first(scores, serving, many)
        for i in range(many):
            newcomer = order_of(scores[serving[i]]) if bypass else PROTECTED - 1
            at = serve(stacks[group], depth[group], rank, serving[i], newcomer)
            if at == depth[group]:
                depth[group] += 1
            else:
                found[group, at + 1] += 1
        _rank(rank[base : base + experts], scores[base : base + experts])


@bare
def _rank(rank, scores):  # type: ignore[no-untyped-def]
    for at in range(len(rank)):
        rank[at] = order_of(scores[at])
