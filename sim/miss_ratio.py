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
from .recency import PROTECTED, recency_depths, serve
from .run import load_policy
from .score_steps import AGED_RULE, LRU_RULE, STACK_RULES, Scores, most_worth_first, order_of, scores_of, touch


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
    widest = int(np.diff(needs.begin).max(initial=0))
    if scores.rule == LRU_RULE and 2 * widest <= needs.experts * (needs.layers if pooled else 1):
        found = recency_depths(needs.begin, needs.expert, needs.demand, needs.layers, needs.experts, pooled, widest)
    else:
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
    rank = np.zeros(layers * experts, np.int64)  # scores as whole numbers; PROTECTED while needed
    serving = np.empty(experts, np.int64)
    layer, step = -1, 0
    for event in range(len(begin) - 1):
        layer += 1
        if layer == layers:
            layer, step = 0, step + 1
        group = 0 if pooled else layer
        first, many, base = begin[event], begin[event + 1] - begin[event], layer * experts
        touch(rule, event, layer, step, expert, first, first + many, coming, score, state, parameters)
        if layer == 0 and rule == AGED_RULE:
            for key in range(layers * experts):
                rank[key] = order_of(scores[key])
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
        for i in range(many):
            rank[serving[i]] = order_of(scores[serving[i]])
    return found
