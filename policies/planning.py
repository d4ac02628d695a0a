"""The hot steps of `Residency`, on plain arrays: who is needed, who is protected, who gets which slot.

Arrays of one model: `score`, `slot_of` (-1: not held) and `guard` (bits: 1 needed now, 2 predicted) are [L, E];
`holder` [slots] and `since` [slots] say which key (layer * E + expert) a slot holds and since which step;
`first_slot`, `used` and `guarded` have one entry per scope.
"""

from __future__ import annotations

import numpy as np

from .compiled import bare, compiled


@compiled
def union(ids, experts):  # type: ignore[no-untyped-def]
    """Distinct experts of [T, K] ids, ascending, and the number of tokens of each; absent entries are skipped."""
    counts = np.zeros(experts, np.int32)
    distinct = 0
    for row in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            expert = ids[row, i]
            if expert < experts:
                distinct += counts[expert] == 0
                counts[expert] += 1
    needed = np.empty(distinct, np.int32)
    tokens = np.empty(distinct, np.int32)
    n = 0
    for expert in range(experts):
        if counts[expert]:
            needed[n] = expert
            tokens[n] = counts[expert]
            n += 1
    return needed, tokens


@compiled
def protect(slot_of, guard, needed, guarded, scope):  # type: ignore[no-untyped-def]
    """Predictions for this layer are settled: drop their protection; then protect the held part of `needed`."""
    for expert in range(len(guard)):
        if guard[expert]:
            guard[expert] = 0
            guarded[scope] -= 1
    held = np.empty(len(needed), np.bool_)
    for i in range(len(needed)):
        held[i] = slot_of[needed[i]] >= 0
        if held[i]:
            guard[needed[i]] = 1
            guarded[scope] += 1
    return held


@bare
def release(slot_of, guard, needed, guarded, scope):  # type: ignore[no-untyped-def]
    for expert in needed:
        if guard[expert] & 1:
            guard[expert] &= 2
            if guard[expert] == 0:
                guarded[scope] -= 1


@bare
def lowest_slot(score, guard, holder, since, newest, first, last):  # type: ignore[no-untyped-def]
    """Slot in [first, last) of the lowest unprotected score; ties to the lowest (layer, expert); -1 if none.

    What has been held since a step after `newest` is passed over.
    """
    worths, guards = (
        score.reshape(-1),
        guard.reshape(-1),
    )  # views: a division for each slot of a pool would cost the most here
    found, lowest, lowest_key = -1, np.inf, -1
    for slot in range(first, last):
        key = holder[slot]
        if key < 0 or guards[key] or since[slot] > newest:
            continue
        worth = worths[key]
        if found < 0 or worth < lowest or (worth == lowest and key < lowest_key):
            found, lowest, lowest_key = slot, worth, key
    return found


@bare
def take(slot, key, layer, expert, guard_bit, slot_of, guard, holder, guarded, scope):  # type: ignore[no-untyped-def]
    """Give `slot` to (layer, expert); returns the key of the expert that loses it, or -1."""
    victim = holder[slot]
    if victim >= 0:
        slot_of[victim // guard.shape[1], victim % guard.shape[1]] = -1
    holder[slot] = key
    slot_of[layer, expert] = slot
    guard[layer, expert] = guard_bit
    guarded[scope] += 1
    return victim


@compiled
def plan_demand(  # type: ignore[no-untyped-def]
    layer, needed, tokens, held, scope, bypass, scratch, score, slot_of, guard, holder, first_slot, used, guarded
):
    """Slots for the misses in demand order (most tokens first, then lowest id); what gets none is streamed.

    With `bypass` the misses worth most choose first, and one worth no more than every victim is streamed.
    """
    experts = score.shape[1]
    missing = needed[~held]
    order = np.argsort(-tokens[~held], kind="mergesort")
    missing = missing[order]
    slot = np.full(len(missing), -1, np.int64)
    victim = np.full(len(missing), -1, np.int64)
    choosing = np.arange(len(missing))
    if bypass:
        worths = np.empty(len(missing), np.float64)
        for at in range(len(missing)):
            worths[at] = -score[layer, missing[at]]
        choosing = np.argsort(worths, kind="mergesort")
    first, last = first_slot[scope], first_slot[scope + 1]
    for i in choosing:
        if used[scope] < last - first:
            at = first + used[scope]
            used[scope] += 1
        else:
            at = lowest_slot(score, guard, holder, holder, np.int64(2**62), first, last)
            if at < 0:
                break
            key = holder[at]
            if bypass and score[key // experts, key % experts] >= score[layer, missing[i]]:
                break
        slot[i] = at
        victim[i] = take(at, layer * experts + missing[i], layer, missing[i], 1, slot_of, guard, holder, guarded, scope)
    plan = np.empty((len(missing), 5), np.int64)
    n = 0
    streams = 0
    for kind in range(2):  # demand, then stream
        for miss in range(len(missing)):
            if (slot[miss] < 0) == (kind == 1):
                plan[n, 0] = kind
                plan[n, 1] = layer
                plan[n, 2] = missing[miss]
                plan[n, 3] = slot[miss]
                plan[n, 4] = victim[miss]
                if kind == 1:
                    plan[n, 3] = len(holder) + streams % scratch
                    streams += 1
                n += 1
    return plan


@compiled
def plan_prefetch(  # type: ignore[no-untyped-def]
    target, wanted, values, scope, top_k, most, score, slot_of, guard, holder, since, newest, first_slot, used, guarded
):
    """Protect what is held of `wanted`, and give up to `most` others free slots or those of experts worth less.

    At least `top_k` slots of the scope stay free or evictable, so that demand never finds the scope full.
    """
    experts = score.shape[1]
    first, last = first_slot[scope], first_slot[scope + 1]
    plan = np.empty((len(wanted), 5), np.int64)
    n = 0
    for i in range(len(wanted)):
        expert = wanted[i]
        fresh = guard[target, expert] == 0 or slot_of[target, expert] < 0
        if fresh and last - first - guarded[scope] - 1 < top_k:
            break
        if slot_of[target, expert] >= 0:
            guarded[scope] += guard[target, expert] == 0
            guard[target, expert] |= 2
            continue
        if n == most:
            continue
        if used[scope] < last - first:
            at = first + used[scope]
            used[scope] += 1
        else:
            at = lowest_slot(score, guard, holder, since, newest, first, last)
            if at < 0:
                break
            lowest = holder[at]
            if score[lowest // experts, lowest % experts] >= values[i]:
                continue
        key = target * experts + expert
        plan[n, 4] = take(at, key, target, expert, 2, slot_of, guard, holder, guarded, scope)
        score[target, expert] = values[i]
        plan[n, 0] = 2
        plan[n, 1] = target
        plan[n, 2] = expert
        plan[n, 3] = at
        n += 1
    return plan[:n]
