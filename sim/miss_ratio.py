"""Misses at every capacity in one pass over the trace.

Mattson et al. (1970, IBM Systems Journal 9:2): under a policy that ranks experts the same way whatever is held, what C
slots hold is part of what C + 1 hold, so one list, the *stack*, tells the contents at all capacities: its first C
entries. A need found at depth p is a miss for every C < p.

The replay contract serves a set at once, and keeps this property at every capacity, also where the set does not fit.
Let N be the needed set and H the part of it that is held. C slots hold afterwards: H, which is protected, and the best
C - |H| of everything else that was held or is missing, where misses rank before what was held (in demand order: most
tokens first, then lowest id), or, with bypass, by their own score. Give C + 1 slots one entry z more before the event:
if z is not needed, the best C + 1 - |H| of one candidate more contain the best C - |H|; if z is needed it moves from
the candidates to H, and the best of the remaining candidates contain the former best except z. Either way one entry is
added, and that entry is the stack's next. So each event is one walk down the stack that carries the candidates not
yet placed: at depth C the entry found there joins them, and the best of them stays, or, if the entry is needed and
not placed yet, the entry itself.

Not so for a policy that ranks by what happened to its slots (fifo, least-stale): those are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..policies.compiled import compiled
from ..policies.policy import SCOPES, Policy
from ..traces.trace import Trace
from .needs import Needs, needs_of
from .run import load_policy
from .score_steps import LRU_RULE, STACK_RULES, Scores, scores_of, touch


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
    return curve_of(needs, stack_scores(load_policy(policy), trace, needs), scope)


def stack_scores(policy: Policy, trace: Trace, needs: Needs) -> Scores:
    """`scores_of` a policy that obeys inclusion. Raises InputError for another."""
    scores = scores_of(policy, trace, needs)
    if scores.rule not in STACK_RULES:
        raise InputError(
            f"policy {policy.name}: it ranks experts by when they got their slot, so more slots may miss more and one "
            "pass cannot tell; replay it at each capacity"
        )
    return scores


def curve_of(needs: Needs, scores: Scores, scope: str) -> MissCurve:
    """The same for prepared arrays; `scores` stays as it was."""
    if scope not in SCOPES:
        raise InputError(f"scope {scope!r}: expected {' or '.join(SCOPES)}")
    pooled = scope == "global"
    found = _depths(
        scores.rule, scores.bypass, needs.begin, needs.expert, needs.demand, scores.coming, pooled,
        scores.score.copy(), scores.parameters,
    )  # fmt: skip
    accesses = needs.of_layer
    if pooled:
        accesses = accesses.sum(keepdims=True)
    return MissCurve(scope, needs.layers, accesses, accesses[:, None] - np.cumsum(found, axis=1))


@compiled
def _depths(rule, bypass, begin, expert, demand, coming, pooled, score, parameters):  # type: ignore[no-untyped-def]
    """[G, C + 1]: how many needs were found at each depth, counted from 1; first uses are found nowhere."""
    layers, experts = score.shape
    groups, keys = (1, layers * experts) if pooled else (layers, experts)
    scores, state = score.ravel(), np.zeros((layers, experts))
    found = np.zeros((groups, keys + 1), np.int64)
    stacks = np.empty((groups, keys), np.int32)
    depth = np.zeros(groups, np.int64)
    needed = np.full(layers * experts, -1, np.int64)  # event that needs it
    placed = np.full(layers * experts, -1, np.int64)  # event at which it has got its place
    carried = np.empty(keys + experts, np.int32)
    layer, step = -1, 0
    for event in range(len(begin) - 1):
        layer += 1
        if layer == layers:
            layer, step = 0, step + 1
        group = 0 if pooled else layer
        first, last, base = begin[event], begin[event + 1], layer * experts
        touch(rule, event, layer, step, expert, first, last, coming, score, state, parameters)
        for i in range(first, last):
            carried[i - first] = base + demand[i]
            needed[base + demand[i]] = event
        if bypass:
            _most_worth_first(scores, carried, last - first)
        depth[group] = _walk(
            stacks[group], depth[group], found[group], carried, last - first, event, needed, placed, scores, bypass
        )
    return found


@compiled
def _walk(stack, depth, found, carried, tail, event, needed, placed, scores, bypass):  # type: ignore[no-untyped-def]
    """One event's walk down a stack; `carried[head:tail]` are the candidates, best first. Returns the new depth."""
    head = 0
    for at in range(depth):
        if head == tail:
            return depth
        key = stack[at]
        if needed[key] == event:
            found[at + 1] += 1
            if placed[key] == event:
                stack[at] = carried[head]
                placed[carried[head]] = event
                head += 1
            else:
                placed[key] = event
                i = head
                while carried[i] != key:
                    i += 1
                while i > head:
                    carried[i] = carried[i - 1]
                    i -= 1
                head += 1
            continue
        best = carried[head]
        if _ranks_before(key, best, scores, needed, event, bypass):
            continue
        stack[at] = best
        placed[best] = event
        head += 1
        i = tail
        while i > head and _ranks_before(key, carried[i - 1], scores, needed, event, bypass):
            carried[i] = carried[i - 1]
            i -= 1
        carried[i] = key
        tail += 1
    for i in range(head, tail):
        stack[depth] = carried[i]
        depth += 1
    return depth


@compiled
def _ranks_before(key, other, scores, needed, event, bypass):  # type: ignore[no-untyped-def]
    """Whether `key`, held and not needed, keeps its slot rather than `other`, which may be a miss."""
    if needed[other] == event:
        return bypass and scores[key] >= scores[other]
    return scores[key] > scores[other] or (scores[key] == scores[other] and key > other)


@compiled
def _most_worth_first(scores, keys, many):  # type: ignore[no-untyped-def]
    """Sort by falling score; equals stay in order."""
    for i in range(1, many):
        key, at = keys[i], i
        while at > 0 and scores[keys[at - 1]] < scores[key]:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key
