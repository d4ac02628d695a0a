"""Hits, misses and streams of an eviction policy, without a clock: the replay contract on flat arrays.

The same counts as driving `Residency` (policies/residency.py) through the trace, to the last one; it keeps no
decision log. An *access* is one expert that a layer-step needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import compiled
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..traces.trace import Trace
from .needs import Needs, needs_of
from .run import load_policy
from .score_steps import LRU_RULE, Scores, admitted, scores_of, touch

UNKNOWN = -2  # a layer's lowest key has to be looked for


@dataclass(frozen=True)
class Replay:
    """Counts per MoE layer, [L] each. A miss is a copy; `streams` are those misses that got no slot."""

    accesses: NDArray[np.int64]
    misses: NDArray[np.int64]
    streams: NDArray[np.int64]

    @property
    def hits(self) -> NDArray[np.int64]:
        return self.accesses - self.misses

    @property
    def hit_rate(self) -> float:
        return float(self.hits.sum() / max(1, self.accesses.sum()))


def replay(trace: Trace, policy: Policy | str | dict[str, Any], slots: Slots) -> Replay:
    """Replay all steps of `trace`, prefill too, from a cold start.

    Raises InputError for a policy that does more than evict, or whose eviction has no compiled step.
    """
    needs = needs_of(trace)
    return replay_needs(needs, scores_of(load_policy(policy), trace, needs), slots)


def replay_needs(needs: Needs, scores: Scores, slots: Slots) -> Replay:
    """The same for prepared arrays; `scores` stays as it was."""
    if len(slots.per_scope) not in (1, needs.layers):
        raise ValueError(f"slots for {len(slots.per_scope)} scopes, expected 1 or {needs.layers}")
    slots_of = np.array(slots.per_scope, np.int64)
    pooled = len(slots_of) == 1
    if scores.rule == LRU_RULE:
        counts = _lru(needs.begin, needs.expert, needs.demand, needs.layers, needs.experts, slots_of, pooled)
    else:
        counts = _lowest_score(
            scores.rule, scores.bypass, needs.begin, needs.expert, needs.demand, scores.coming, slots_of, pooled,
            scores.score.copy(), scores.parameters,
        )  # fmt: skip
    return Replay(needs.of_layer, *counts)


@compiled
def _lru(begin, expert, demand, layers, experts, slots, pooled):  # type: ignore[no-untyped-def]
    """LRU as one list per scope, most recent first: an access is O(1).

    Of one layer-step the highest id stands first, since ties go to the lowest. `after` and `before` are circular,
    with one sentinel per scope behind the keys.
    """
    keys = layers * experts
    misses, streams = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
    used = np.zeros(len(slots), np.int64)
    held = np.zeros(keys, np.bool_)
    after = np.arange(keys + len(slots)).astype(np.int32)
    before = after.copy()
    admit = np.zeros(experts, np.bool_)
    layer = -1
    for event in range(len(begin) - 1):
        layer = layer + 1 if layer + 1 < layers else 0
        scope = 0 if pooled else layer
        first, last, base, end = begin[event], begin[event + 1], layer * experts, keys + scope
        missing = 0
        for i in range(first, last):
            key = base + expert[i]
            if held[key]:
                after[before[key]] = after[key]
                before[after[key]] = before[key]
            else:
                missing += 1
        misses[layer] += missing
        room = slots[scope] - (last - first - missing)  # for the misses, once nothing else is held
        for _ in range(used[scope] + missing - slots[scope]):
            victim = before[end]
            if victim == end:
                break
            before[end] = before[victim]
            after[before[victim]] = end
            held[victim] = False
            used[scope] -= 1
        if missing > room:
            streams[layer] += missing - room
            for i in range(first, last):
                if not held[base + demand[i]]:
                    admit[demand[i]] = room > 0
                    room -= 1
        for i in range(first, last):
            key = base + expert[i]
            if not held[key]:
                if last - first > slots[scope] and not admit[expert[i]]:
                    continue
                held[key] = True
                used[scope] += 1
            newest = after[end]
            before[newest] = key
            after[key] = newest
            before[key] = end
            after[end] = key
    return misses, streams


@compiled
def _lowest_score(  # type: ignore[no-untyped-def]
    rule, bypass, begin, expert, demand, coming, slots, pooled, score, parameters
):
    """Any score table. `least[layer]` remembers a layer's lowest held key until the layer's scores change."""
    layers, experts = score.shape
    scores = score.ravel()
    state = np.zeros((layers, experts))
    misses, streams = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
    used = np.zeros(len(slots), np.int64)
    resident = np.empty((layers, experts), np.int32)  # experts held of each layer, in any order
    count = np.zeros(layers, np.int64)
    place = np.full((layers, experts), -1, np.int32)  # where in `resident`; -1: not held
    least = np.full(layers, UNKNOWN, np.int64)
    needed = np.full((layers, experts), -1, np.int64)  # event that needs it: protected meanwhile
    missing = np.empty(experts, np.int32)
    taken = np.empty(experts, np.int32)
    none = coming[:0]
    layer, step = -1, 0
    for event in range(len(begin) - 1):
        layer += 1
        if layer == layers:
            layer, step = 0, step + 1
        scope = 0 if pooled else layer
        first, last = begin[event], begin[event + 1]
        missed = 0
        for i in range(first, last):
            needed[layer, expert[i]] = event
            if place[layer, demand[i]] < 0:
                missing[missed] = demand[i]
                missed += 1
        touch(
            rule, event, layer, step, expert[first:last], coming[first:last] if len(coming) else none, score, state,
            parameters,
        )  # fmt: skip
        if layer == 0:
            least[:] = UNKNOWN
        least[layer] = UNKNOWN
        if missed == 0:
            continue
        misses[layer] += missed
        if bypass:
            _most_worth_first(score[layer], missing, missed)
        given = 0
        while given < missed:
            newcomer = missing[given]
            if used[scope] < slots[scope]:
                used[scope] += 1
            else:
                victim = _lowest(scores, experts, resident, count, needed, least, event, layer, pooled)
                if victim < 0 or (bypass and scores[victim] >= score[layer, newcomer]):
                    break
                of, loser = victim // experts, victim % experts
                at, moved = place[of, loser], resident[of, count[of] - 1]
                resident[of, at] = moved
                place[of, moved] = at
                place[of, loser] = -1
                count[of] -= 1
                least[of] = UNKNOWN
            taken[given] = newcomer
            place[layer, newcomer] = count[layer]
            resident[layer, count[layer]] = newcomer
            count[layer] += 1
            given += 1
        streams[layer] += missed - given
        for i in range(given):
            admitted(rule, event, layer, taken[i], score, state)
        least[layer] = UNKNOWN
    return misses, streams


@compiled
def _lowest(scores, experts, resident, count, needed, least, event, layer, pooled):  # type: ignore[no-untyped-def]
    """The key of the lowest score held and not needed now; ties to the lowest key; -1 if there is none."""
    found, worth = -1, np.inf
    for of in range(0 if pooled else layer, len(least) if pooled else layer + 1):
        if least[of] == UNKNOWN:
            least[of] = _lowest_of_layer(scores, of * experts, resident[of], count[of], needed[of], event)
        key = least[of]
        if key >= 0 and (found < 0 or scores[key] < worth):
            found, worth = key, scores[key]
    return found


@compiled
def _lowest_of_layer(scores, base, resident, count, needed, event):  # type: ignore[no-untyped-def]
    found, worth = -1, np.inf
    for i in range(count):
        expert = resident[i]
        of_expert = scores[base + expert]
        if (of_expert < worth or found < 0 or (of_expert == worth and base + expert < found)) and (
            needed[expert] != event
        ):
            found, worth = base + expert, of_expert
    return found


@compiled
def _most_worth_first(score, missing, missed):  # type: ignore[no-untyped-def]
    """Sort by falling score; equals stay in demand order."""
    for i in range(1, missed):
        expert, at = missing[i], i
        while at > 0 and score[missing[at - 1]] < score[expert]:
            missing[at] = missing[at - 1]
            at -= 1
        missing[at] = expert

