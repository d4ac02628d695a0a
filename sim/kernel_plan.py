"""Decisions on arrays: what `Residency` and the miss services decide, written to the log.

`slots` is a `layout.Slots`; `here`, a `layout.Layer`, holds the needed set: n experts, ascending.
"""

from __future__ import annotations

import numpy as np

from ..policies.compiled import bare
from ..policies.planning import lowest_slot, take
from ..policies.residency import DEMAND, PREFETCH, STREAM
from ..policies.split import ONE
from . import layout as at


@bare
def record(clock, log, event, kind, layer, expert, slot, victim):  # type: ignore[no-untyped-def]
    row = clock[at.LOGGED]
    log[row, 0], log[row, 1], log[row, 2] = event, kind, layer
    log[row, 3], log[row, 4], log[row, 5] = expert, slot, victim
    clock[at.LOGGED] += 1


@bare
def find_union(experts, chosen, layer, rows, needed, tokens, uses):  # type: ignore[no-untyped-def]
    """Distinct experts of the layer's ids, ascending, and tokens of each; returns their number."""
    n, few = 0, rows * chosen.shape[2] <= 64
    for row in range(rows):
        for i in range(chosen.shape[2]):
            expert = chosen[layer, row, i]
            if expert < experts:
                if few and uses[expert] == 0:
                    place = n
                    while place > 0 and needed[place - 1] > expert:
                        needed[place] = needed[place - 1]
                        place -= 1
                    needed[place] = expert
                    n += 1
                uses[expert] += 1
    if not few:
        for expert in range(experts):
            if uses[expert]:
                needed[n] = expert
                n += 1
    for i in range(n):
        tokens[i] = uses[needed[i]]
        uses[needed[i]] = 0
    return n


@bare
def protect_needed(fixed, slots, needed, lists, layer, scope, n):  # type: ignore[no-untyped-def]
    """What was expected for this layer loses its protection, what is held and needed gains it; returns how many."""
    slot_of, guard, held = slots.slot_of, slots.guard, 0
    if fixed[at.LOOKS_AHEAD]:
        for expert in range(fixed[at.EXPERTS]):
            if guard[layer, expert]:
                guard[layer, expert] = 0
                slots.guarded[scope] -= 1
    for i in range(n):
        holds = slot_of[layer, needed[i]] >= 0
        lists[at.HELD, i] = holds
        if holds:
            guard[layer, needed[i]] = 1
            held += 1
    slots.guarded[scope] += held
    return held


@bare
def release_needed(slots, needed, layer, scope, n):  # type: ignore[no-untyped-def]
    guard = slots.guard
    for i in range(n):
        if guard[layer, needed[i]] & 1:
            guard[layer, needed[i]] &= 2
            if guard[layer, needed[i]] == 0:
                slots.guarded[scope] -= 1


@bare
def misses_in_demand_order(tokens, lists, n):  # type: ignore[no-untyped-def]
    """MISSING: most tokens first, then lowest id; returns their number."""
    m = 0
    for i in range(n):
        if not lists[at.HELD, i]:
            place = m
            while place > 0 and tokens[lists[at.MISSING, place - 1]] < tokens[i]:
                lists[at.MISSING, place] = lists[at.MISSING, place - 1]
                place -= 1
            lists[at.MISSING, place] = i
            m += 1
    return m


@bare
def share_fetched(fixed, clock, m):  # type: ignore[no-untyped-def]
    """`Split`: how many of m misses cross the link."""
    share = fixed[at.SHARE]
    if clock[at.LINK_RATE] and clock[at.CORES_RATE]:
        share = clock[at.CORES_RATE] * ONE // (clock[at.CORES_RATE] + clock[at.LINK_RATE])
    return min(m, max(1, (m * share + ONE // 2) // ONE))


@bare
def leave_to_host(fixed, clock, needed, tokens, lists, score, layer, m):  # type: ignore[no-untyped-def]
    """Misses for the host go from MISSING to ON_CORES, both in demand order; returns how many stay."""
    fetched = 0 if fixed[at.SERVICE] == at.ON_CPU else share_fetched(fixed, clock, m)
    for i in range(m):
        place, own = i, lists[at.MISSING, i]
        while place > 0:
            other = lists[at.MISSING, lists[at.BEST, place - 1]]
            if tokens[other] != tokens[own] or score[layer, needed[other]] >= score[layer, needed[own]]:
                break
            lists[at.BEST, place] = lists[at.BEST, place - 1]
            place -= 1
        lists[at.BEST, place] = i
        lists[at.CHOSEN, i] = 0
    for i in range(fetched):
        lists[at.CHOSEN, lists[at.BEST, i]] = 1
    stay, leave = 0, 0
    for i in range(m):
        if lists[at.CHOSEN, i]:
            lists[at.MISSING, stay] = lists[at.MISSING, i]
            stay += 1
        else:
            lists[at.ON_CORES, leave] = lists[at.MISSING, i]
            leave += 1
    return stay


@bare
def in_choosing_order(fixed, needed, lists, score, layer, m):  # type: ignore[no-untyped-def]
    """ORDER, indices into MISSING: demand order or, with bypass, those worth most first."""
    for i in range(m):
        place = i
        if fixed[at.BYPASS]:
            worth = score[layer, needed[lists[at.MISSING, i]]]
            while place > 0 and score[layer, needed[lists[at.MISSING, lists[at.ORDER, place - 1]]]] < worth:
                lists[at.ORDER, place] = lists[at.ORDER, place - 1]
                place -= 1
        lists[at.ORDER, place] = i


@bare
def give_slots(fixed, slots, needed, lists, score, layer, scope, m):  # type: ignore[no-untyped-def]
    """SLOT (-1: streamed) and VICTIM of each of MISSING."""
    first, last = slots.first_slot[scope], slots.first_slot[scope + 1]
    for i in range(m):
        lists[at.SLOT, i] = -1
    for j in range(m):
        i = lists[at.ORDER, j]
        expert = needed[lists[at.MISSING, i]]
        if slots.used[scope] < last - first:
            slot = first + slots.used[scope]
            slots.used[scope] += 1
        else:
            slot = lowest_slot(score, slots.guard, slots.holder, slots.since, np.int64(2**62), first, last)
            if slot < 0:
                return
            if fixed[at.BYPASS] and score.reshape(-1)[slots.holder[slot]] >= score[layer, expert]:
                return
        lists[at.SLOT, i] = slot
        lists[at.VICTIM, i] = take(
            slot, layer * fixed[at.EXPERTS] + expert, layer, expert, 1, slots.slot_of, slots.guard, slots.holder,
            slots.guarded, scope,
        )  # fmt: skip


@bare
def plan_fetches(fixed, clock, log, slots, needed, lists, event, layer, scope, m, score):  # type: ignore[no-untyped-def]
    """`plan_demand`: MISSING into ADMITTED and STREAMED; returns how many of each."""
    in_choosing_order(fixed, needed, lists, score, layer, m)
    give_slots(fixed, slots, needed, lists, score, layer, scope, m)
    admitted, streamed = 0, 0
    for i in range(m):
        if lists[at.SLOT, i] >= 0:
            index = lists[at.MISSING, i]
            record(clock, log, event, DEMAND, layer, needed[index], lists[at.SLOT, i], lists[at.VICTIM, i])
            lists[at.ADMITTED, admitted] = index
            admitted += 1
    for i in range(m):
        if lists[at.SLOT, i] < 0:
            index, scratch = lists[at.MISSING, i], len(slots.holder) + streamed % fixed[at.SCRATCH]
            record(clock, log, event, STREAM, layer, needed[index], scratch, -1)
            lists[at.STREAMED, streamed] = index
            streamed += 1
    return admitted, streamed


@bare
def plan_ahead(  # type: ignore[no-untyped-def]
    fixed, clock, log, slots, event, layer, target, wanted, values, room, score, value, admit, state
):
    """`plan_prefetch` for one proposal; returns how many copies were planned."""
    scope = target if fixed[at.SCOPES] > 1 else 0
    step = (event + 1) // fixed[at.LAYERS] if layer < 0 else event // fixed[at.LAYERS]
    for i in range(len(wanted)):
        expert = np.int64(wanted[i])
        values[i] = score[target, expert] if target == layer else value(event, target, expert, score, state)
    first, last = slots.first_slot[scope], slots.first_slot[scope + 1]
    begun, n = clock[at.LOGGED], 0
    for i in range(len(wanted)):
        expert = wanted[i]
        fresh = slots.guard[target, expert] == 0 or slots.slot_of[target, expert] < 0
        if fresh and last - first - slots.guarded[scope] - 1 < fixed[at.TOP_K]:
            break
        if slots.slot_of[target, expert] >= 0:
            slots.guarded[scope] += slots.guard[target, expert] == 0
            slots.guard[target, expert] |= 2
            continue
        if n == room:
            continue
        if slots.used[scope] < last - first:
            slot = first + slots.used[scope]
            slots.used[scope] += 1
        else:
            newest = step - fixed[at.DWELL]
            slot = lowest_slot(score, slots.guard, slots.holder, slots.since, newest, first, last)
            if slot < 0:
                break
            if score.reshape(-1)[slots.holder[slot]] >= values[i]:
                continue
        key = target * fixed[at.EXPERTS] + expert
        victim = take(slot, key, target, expert, 2, slots.slot_of, slots.guard, slots.holder, slots.guarded, scope)
        score[target, expert] = values[i]
        record(clock, log, event, PREFETCH, target, expert, slot, victim)
        n += 1
    for i in range(begun, begun + n):
        admit(event, target, log[i, 3], score, state)
    return n


@bare
def plan_promotions(  # type: ignore[no-untyped-def]
    fixed, clock, log, slots, here, proposals, event, layer, n, room, score, value, admit, state
):
    """`Cpu.promote`: the most valuable misses, for the layer's next step."""
    lists, needed, m = here.lists, here.needed, 0
    for i in range(n):
        if not lists[at.HELD, i]:
            place = m
            while place > 0 and score[layer, needed[lists[at.BEST, place - 1]]] < score[layer, needed[i]]:
                lists[at.BEST, place] = lists[at.BEST, place - 1]
                place -= 1
            lists[at.BEST, place] = i
            m += 1
    m = min(m, fixed[at.PROMOTE])
    for i in range(m):
        proposals.experts[i] = needed[lists[at.BEST, i]]
    return plan_ahead(
        fixed, clock, log, slots, event, layer, layer, proposals.experts[:m], proposals.values, room, score, value,
        admit, state,
    )  # fmt: skip


@bare
def plan_proposals(  # type: ignore[no-untyped-def]
    fixed, clock, log, slots, here, proposals, ahead, formed, event, layer, n, rows, room, score, value, admit, state,
    propose, ahead_state,
):  # fmt: skip
    gates = rows if fixed[at.GATED] else 0
    for row in range(gates):
        for i in range(ahead.shape[2]):
            here.ahead[row, i] = ahead[formed[row], layer + 1, i]
    number = propose(
        event, layer, here.needed[:n], here.tokens[:n], here.chosen, here.ahead[:gates], ahead_state,
        proposals.targets, proposals.ends, proposals.experts,
    )  # fmt: skip
    begin = 0
    for i in range(number):
        room -= plan_ahead(
            fixed, clock, log, slots, event, layer, proposals.targets[i],
            proposals.experts[begin : proposals.ends[i]], proposals.values, room, score, value, admit, state,
        )  # fmt: skip
        begin = proposals.ends[i]


@bare
def remember_dwell(clock, log, since, begun, step):  # type: ignore[no-untyped-def]
    for i in range(begun, clock[at.LOGGED]):
        if log[i, 1] == DEMAND or log[i, 1] == PREFETCH:
            since[log[i, 4]] = step
