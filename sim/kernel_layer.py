"""One layer in time on arrays: `Place.layer` of the events engine."""

from __future__ import annotations

from ..policies.compiled import bare
from ..policies.residency import CPU, PREFETCH
from ..policies.split import average
from . import layout as at
from .kernel_device import compute_arrivals, hold_up, issue, run_block, run_wave, submit
from .kernel_link import advance, demand, plan_copy, queue_ahead, read, settle
from .kernel_plan import (
    leave_to_host,
    misses_in_demand_order,
    plan_fetches,
    plan_promotions,
    plan_proposals,
    record,
    release_needed,
    remember_dwell,
)
from .tables import ADD, BACK, SHARED, THERE


@bare
def on_host(fixed, prices, clock, copies, here, blocks, layer, m, copying):  # type: ignore[no-untyped-def]
    """The experts of ON_CORES on the host's cores; returns when the device has their sum."""
    clock[at.HOST] += fixed[at.SUBMIT_PS]
    free = max(clock[at.CORES_FREE], clock[at.HOST] + blocks[THERE, at.DEVICE_PS])
    for i in range(m):
        index = here.lists[at.ON_CORES, i]
        key = layer * fixed[at.EXPERTS] + here.needed[index]
        start = max(free, read(fixed, clock, copies, key, clock[at.HOST]))
        busy = max(prices[at.HOST_BESIDE_S if copying else at.HOST_S], here.tokens[index] * prices[at.HOST_TOKEN_S])
        took = round(busy * 1e12)
        free = start + took
        if fixed[at.SERVICE] == at.SPLIT:
            here.computed[clock[at.COMPUTED]] = took
            clock[at.COMPUTED] += 1
    clock[at.CORES_FREE] = free
    return free + blocks[BACK, at.DEVICE_PS]


@bare
def send_ahead(fixed, clock, log, link, begun, layer):  # type: ignore[no-untyped-def]
    """Queue the prefetches among the decisions from row `begun` on."""
    for i in range(begun, clock[at.LOGGED]):
        if log[i, 1] == PREFETCH:
            target = log[i, 2]
            key = target * fixed[at.EXPERTS] + log[i, 3]
            plan_copy(fixed, link.copies, key)
            ready = read(fixed, clock, link.copies, key, submit(fixed, clock))
            queue_ahead(clock, link, key, ready, target == layer, target)


@bare
def submit_arriving(fixed, clock, copies, needed, tokens, lists, layer, now, n, admitted):  # type: ignore[no-untyped-def]
    """ARRIVING: late and admitted experts in demand order, and when each copy may start; returns how many."""
    m, experts = 0, fixed[at.EXPERTS]
    for i in range(n):
        if lists[at.HELD, i] and copies[layer * experts + needed[i], at.COMPLETE] > now:
            lists[at.ARRIVING, m] = i
            lists[at.IS_LATE, i] = 1
            m += 1
    for i in range(admitted):
        lists[at.ARRIVING, m] = lists[at.ADMITTED, i]
        lists[at.IS_LATE, lists[at.ADMITTED, i]] = 0
        m += 1
    for i in range(1, m):
        index, place = lists[at.ARRIVING, i], i
        while place > 0:
            other = lists[at.ARRIVING, place - 1]
            if tokens[other] > tokens[index] or (tokens[other] == tokens[index] and other < index):
                break
            lists[at.ARRIVING, place] = other
            place -= 1
        lists[at.ARRIVING, place] = index
    for i in range(m):
        index = lists[at.ARRIVING, i]
        key, asked = layer * experts + needed[index], submit(fixed, clock)
        if lists[at.IS_LATE, index]:
            lists[at.MOMENT, i] = max(asked, copies[key, at.HOST_HAS])
        else:
            plan_copy(fixed, copies, key)
            lists[at.MOMENT, i] = read(fixed, clock, copies, key, asked)
    return m


@bare
def submit_streamed(fixed, clock, copies, needed, lists, layer, streamed):  # type: ignore[no-untyped-def]
    for i in range(streamed):
        key = layer * fixed[at.EXPERTS] + needed[lists[at.STREAMED, i]]
        plan_copy(fixed, copies, key)
        lists[at.READY, i] = read(fixed, clock, copies, key, submit(fixed, clock))


@bare
def copy_arriving(fixed, clock, link, needed, lists, layer, m):  # type: ignore[no-untyped-def]
    """Send ARRIVING; afterwards they stand in the order in which they are complete, at MOMENT."""
    for i in range(m):
        index = lists[at.ARRIVING, i]
        key = layer * fixed[at.EXPERTS] + needed[index]
        done, place = demand(fixed, clock, link, key, lists[at.MOMENT, i], at.SENT_DEMAND), i
        while place > 0 and lists[at.MOMENT, place - 1] > done:
            lists[at.ARRIVING, place] = lists[at.ARRIVING, place - 1]
            lists[at.MOMENT, place] = lists[at.MOMENT, place - 1]
            place -= 1
        lists[at.ARRIVING, place], lists[at.MOMENT, place] = index, done


@bare
def compute_streamed(fixed, prices, clock, link, here, layer, streamed):  # type: ignore[no-untyped-def]
    """One after the other through the scratch slots; returns the exposed wait."""
    lists, wait = here.lists, 0
    for i in range(streamed):
        index, ready = lists[at.STREAMED, i], lists[at.READY, i]
        if i >= fixed[at.SCRATCH]:
            ready = max(ready, lists[at.FREED, i - fixed[at.SCRATCH]])
        key = layer * fixed[at.EXPERTS] + here.needed[index]
        done = demand(fixed, clock, link, key, ready, at.SENT_STREAM)
        wait += run_wave(fixed, prices, clock, done, 1, here.tokens[index])
        lists[at.FREED, i] = clock[at.FREE]
    return wait


@bare
def classify(fixed, clock, copies, here, steps, of_layers, step, layer, n, held):  # type: ignore[no-untyped-def]
    """Count hits, late and missing; returns (hits, their tokens)."""
    now, hits, hit_pairs, first = clock[at.HOST], 0, 0, layer * fixed[at.EXPERTS]
    for i in range(n):
        if here.lists[at.HELD, i] and copies[first + here.needed[i], at.COMPLETE] <= now:
            hits += 1
            hit_pairs += here.tokens[i]
    for row, column, counts in ((step, at.NEEDED, steps), (layer, 0, of_layers)):
        counts[row, column] += n
        counts[row, column + 1] += hits
        counts[row, column + 2] += held - hits
        counts[row, column + 3] += n - held
    return hits, hit_pairs


@bare
def serve_layer(  # type: ignore[no-untyped-def]
    fixed, prices, work, run, step, layer, event, n, held, rows, score, admit, value, propose, state, ahead_state
):
    """The set is known and classified; plan, copy, compute."""
    clock, log, slots, link, here, blocks = run.clock, run.log, run.slots, run.link, run.layer, run.batch.blocks
    needed, tokens, lists, copies = here.needed, here.tokens, here.lists, link.copies
    scope, now = layer if fixed[at.SCOPES] > 1 else 0, clock[at.HOST]
    advance(fixed, clock, link, now)
    hits, hit_pairs = classify(fixed, clock, copies, here, run.steps, run.of_layers, step, layer, n, held)
    settle(fixed, clock, link, needed, n, layer)
    begun, admitted, streamed, leave, arriving = clock[at.LOGGED], 0, 0, 0, 0
    if held < n:
        m = misses_in_demand_order(tokens, lists, n)
        if fixed[at.SERVICE] != at.WAIT:
            stay = leave_to_host(fixed, clock, needed, tokens, lists, score, layer, m)
            leave, m = m - stay, stay
        admitted, streamed = plan_fetches(fixed, clock, log, slots, needed, lists, event, layer, scope, m, score)
        for i in range(admitted):
            admit(event, layer, log[begun + i, 3], score, state)
        for i in range(leave):
            record(clock, log, event, CPU, layer, needed[lists[at.ON_CORES, i]], -1, -1)
    if fixed[at.LOOKS_AHEAD]:
        room = fixed[at.MOST]
        if fixed[at.PROMOTE]:
            room -= plan_promotions(
                fixed, clock, log, slots, here, run.proposals, event, layer, n, room, score, value, admit, state
            )
        plan_proposals(
            fixed, clock, log, slots, here, run.proposals, work.ahead, run.batch.formed, event, layer, n, rows, room,
            score, value, admit, state, propose, ahead_state,
        )  # fmt: skip
    if fixed[at.DWELL]:
        remember_dwell(clock, log, slots.since, begun, step)
    clock[at.HOST] += fixed[at.POLICY_PS]
    clock[at.SUBMITTED] = 0
    from_host = -1
    if leave:
        run.steps[step, at.ON_HOST] += leave
        from_host = on_host(fixed, prices, clock, copies, here, blocks, layer, leave, admitted + streamed > 0)
    if hits < n:
        arriving = submit_arriving(fixed, clock, copies, needed, tokens, lists, layer, now, n, admitted)
        submit_streamed(fixed, clock, copies, needed, lists, layer, streamed)
    send_ahead(fixed, clock, log, link, begun, layer)
    copy_arriving(fixed, clock, link, needed, lists, layer, arriving)
    if fixed[at.SHARED_EXPERTS]:
        run_block(fixed, clock, blocks, SHARED)
    wait = compute_arrivals(fixed, prices, clock, tokens, lists, now, hits, hit_pairs, arriving)
    wait += compute_streamed(fixed, prices, clock, link, here, layer, streamed)
    if leave:
        if not fixed[at.GRAPH]:
            wait += hold_up(fixed, clock, from_host - blocks[BACK, at.DEVICE_PS])
        launches, device_ps, last_ps = blocks[ADD, at.LAUNCHES], blocks[ADD, at.DEVICE_PS], blocks[ADD, at.LAST_PS]
        wait += issue(fixed, clock, launches, device_ps, last_ps, from_host)
    run.steps[step, at.WAIT_PS] += wait
    release_needed(slots, needed, layer, scope, n)


@bare
def tell_split(fixed, clock, link, computed):  # type: ignore[no-untyped-def]
    """What `split` has asked to be told: the host's times, then the copies that are complete by now."""
    landed, size = link.landed, fixed[at.BYTES_PER_EXPERT]
    advance(fixed, clock, link, clock[at.HOST])
    for i in range(clock[at.COMPUTED]):
        clock[at.CORES_RATE] = average(clock[at.CORES_RATE], size, computed[i] // 1000)
    clock[at.COMPUTED] = 0
    done = 0
    while done < clock[at.LANDED] and landed[done, 0] <= clock[at.HOST]:
        row = done
        while row > 0 and landed[row - 1, 0] == landed[row, 0] and landed[row - 1, 1] > landed[row, 1]:
            for column in range(3):
                landed[row - 1, column], landed[row, column] = landed[row, column], landed[row - 1, column]
            row -= 1
        done += 1
    for i in range(done):
        clock[at.LINK_RATE] = average(clock[at.LINK_RATE], size, landed[i, 2] // 1000)
    clock[at.LANDED] -= done
    for row in range(clock[at.LANDED]):
        for column in range(3):
            landed[row, column] = landed[row + done, column]
