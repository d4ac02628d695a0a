"""The events engine's recurrences on plain arrays: decide, copy, compute, layer-step by layer-step, in integers.

Everything here says in arrays what `Residency`, `Place`, `Device`, `CopyEngine`, `Reader` and `Waves` say in objects;
tests hold the two equal in every figure and every decision. Times are picoseconds; key = layer * E + expert.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import compiled
from ..policies.planning import lowest_slot, release, take
from ..policies.residency import CPU, DEMAND, PREFETCH, STREAM
from ..policies.split import ONE, average
from .batching import ATTENDED, CACHED, HELD_KEYS, OUTPUTS, TOKENS, next_batch
from .batching import START_PS as START_PS_OF_BATCH
from .cost import block_ps
from .tables import ADD, ATTENTION, BACK, DENSE, EMBED, GATES, HEAD_BLOCK, ROUTER, SHARED, THERE

# entries of `Run.clock`
HOST, FREE, BUSY, NOW, LINK_FREE, LINK_ASKED, LINK_BUSY, HEAD, TAIL = range(9)
LANDED, READER_FREE, READS, CORES_FREE, LOGGED, SUBMITTED, PLACES = range(9, 16)
SENT_DEMAND, SENT_STREAM, SENT_PREFETCH, WASTED = range(16, 20)
COUNTED_DEMAND, COUNTED_STREAM, COUNTED_PREFETCH, COUNTED_WASTED = range(20, 24)
LINK_RATE, CORES_RATE, COMPUTED = range(24, 27)  # what the miss service `split` knows, and what it has not been told
MOST_KEYS, ROWS_DONE, DONE = range(27, 30)
CLOCK = 30
# columns of `Run.steps`
START_PS, END_PS, WAIT_PS, BUSY_PS, NEEDED, HIT, LATE, MISS = range(8)
OF_DEMAND, OF_STREAM, OF_PREFETCH, OF_WASTED, ON_HOST = range(8, 13)
STEP_COLUMNS = 13
WAIT, ON_CPU, SPLIT = range(3)  # miss services
AUTO, ONE_WAVE, TWO_WAVES, EACH = range(4)
EXPECTED, PROMOTED = 1, 2  # bits of `Run.ahead`


class Constants(NamedTuple):
    """What does not change during a run."""

    layers: int
    experts: int
    scopes: int
    scratch: int
    top_k: int
    bypass: bool
    looks_ahead: bool  # something may be planned for later: a prefetch policy or promotions
    gated: bool  # each moment evaluates further gates
    most: int  # prefetches per layer-step
    dwell: int
    service: int
    promote: int
    share: int  # of misses that `split` fetches until it knows rates, 16-bit fixed point
    waves: int
    issue_ps: int
    latency_ps: int
    sync_ps: int
    sample_ps: int
    policy_ps: int
    submit_ps: int
    submit_batched_ps: int
    alpha_ps: int
    chunks: int
    read_alpha_ps: int
    read_ps: int
    shared_experts: bool
    expert_launches: int
    expert_bytes: float
    expert_operations: float  # per (token, expert) pair
    bandwidth: float
    flops: float
    expert_latency_s: float
    host_s: float
    host_beside_s: float
    host_token_s: float
    bytes_per_expert: int
    attention_bytes: float  # of weights
    key_bytes: float  # of one cached token
    attention_operations: int  # per token
    key_operations: int  # per token and key it attends to
    attention_latency_s: float
    token_budget: int  # of continuous batching; 0: the recorded steps
    key_room: int


class Work(NamedTuple):
    """The trace: N rows, R requests, and S recorded steps; and what the blocks of a step take."""

    starts: NDArray[np.int64]  # [S+1]
    batches: NDArray[np.int64]  # [S, 4]: tokens, attended, cached, outputs
    experts: NDArray[np.int16]  # [N, L, K]; ids >= E are absent
    ahead: NDArray[np.int16]  # [N, L+1, D * K'], or tiny
    request: NDArray[np.int64]  # [N], counted from 0
    due: NDArray[np.int64]  # [S]: when all of a step's requests have arrived
    first: NDArray[np.bool_]  # [N]: a request's first row
    last: NDArray[np.bool_]  # [N]: its last
    tables: NDArray[np.int64]  # [most tokens + 1, BLOCKS] picoseconds by tokens, of the head by outputs
    launches: NDArray[np.int64]  # [BLOCKS]
    moe: NDArray[np.int64]  # [layers of the model]: its index among MoE layers, or -1
    marks: NDArray[np.int64]  # [chunks+1]: link time of the first so many chunks
    in_ram: NDArray[np.int64]  # [L]: experts with lower ids need no read


class Run(NamedTuple):
    """Everything that changes."""

    clock: NDArray[np.int64]  # [CLOCK]
    steps: NDArray[np.int64]  # [S, STEP_COLUMNS]
    of_layers: NDArray[np.int64]  # [4, L]: needed, hit, late, miss
    log: NDArray[np.int64]  # [rows, 6] decisions not yet hashed
    slot_of: NDArray[np.int32]  # [L, E]
    guard: NDArray[np.uint8]  # [L, E]
    holder: NDArray[np.int64]  # [slots]
    since: NDArray[np.int64]  # [slots]
    first_slot: NDArray[np.int64]  # [scopes+1]
    used: NDArray[np.int64]  # [scopes]
    guarded: NDArray[np.int64]  # [scopes]
    complete: NDArray[np.int64]  # [L*E]
    unsent: NDArray[np.int64]  # [L*E]
    sent_ahead: NDArray[np.int64]  # [L*E]
    took: NDArray[np.int64]  # [L*E]
    host_has: NDArray[np.int64]  # [L*E]
    ahead: NDArray[np.uint8]  # [L*E]
    expected: NDArray[np.int64]  # [L]: keys of a layer with a bit in `ahead`
    queue: NDArray[np.int64]  # [2 * L*E, 2] waiting prefetches: key, ready
    landed: NDArray[np.int64]  # [4 * L*E, 3] complete copies not yet told: end, key, link time
    place_of: NDArray[np.int64]  # [requests]
    free_places: NDArray[np.int64]  # [places]
    requests: NDArray[np.int64]  # the arrays of `batching.Queue`
    rows: NDArray[np.int64]
    running: NDArray[np.int64]
    counts: NDArray[np.int64]
    figures: NDArray[np.int64]
    order: NDArray[np.int64]  # [N]: the trace's rows as they were run
    sizes: NDArray[np.int64]  # [most steps]: rows of each step
    # scratch space of one step
    formed: NDArray[np.int64]  # [N]: the step's rows
    blocks: NDArray[np.int64]  # [BLOCKS] picoseconds
    chosen: NDArray[np.int16]  # [L, most rows, K]
    places: NDArray[np.int64]  # [most rows]
    uses: NDArray[np.int32]  # [E]
    needed: NDArray[np.int32]  # [E]
    tokens: NDArray[np.int32]  # [E]
    held: NDArray[np.bool_]  # [E]
    late: NDArray[np.bool_]  # [E]
    computed: NDArray[np.int64]  # [E] picoseconds on the host, not yet told
    targets: NDArray[np.int64]  # [most proposals]
    ends: NDArray[np.int64]
    proposed: NDArray[np.int32]
    values: NDArray[np.float64]  # [most proposed]
    lists: NDArray[np.int64]  # [8, E] indices of one kind


# --- the device and the host thread


@compiled
def issue(c, clock, launches, device_ps, ready):  # type: ignore[no-untyped-def]
    """`Device.run`: a block whose inputs are complete at `ready`; returns how long the device idled for them."""
    able = max(clock[FREE], clock[HOST] + c.issue_ps + c.latency_ps)
    first = max(able, ready)
    clock[HOST] += launches * c.issue_ps
    last = -(-device_ps // launches)
    clock[FREE] = max(first + device_ps, clock[HOST] + c.latency_ps + last)
    clock[BUSY] += device_ps
    return first - able


@compiled
def run_block(c, work, run, block):  # type: ignore[no-untyped-def]
    issue(c, run.clock, work.launches[block], run.blocks[block], 0)


@compiled
def sync(c, clock, cost_ps):  # type: ignore[no-untyped-def]
    clock[HOST] = max(clock[HOST], clock[FREE]) + cost_ps
    clock[NOW] = clock[HOST]


@compiled
def experts_ps(c, distinct, assignments):  # type: ignore[no-untyped-def]
    return block_ps(
        distinct * c.expert_bytes, assignments * c.expert_operations, c.bandwidth, c.flops, c.expert_latency_s
    )


@compiled
def submit(c, clock):  # type: ignore[no-untyped-def]
    clock[HOST] += c.submit_batched_ps if clock[SUBMITTED] else c.submit_ps
    clock[SUBMITTED] += 1
    return clock[HOST]


# --- the link and the SSD


@compiled
def send(c, work, run, key, ready, chunks):  # type: ignore[no-untyped-def]
    clock = run.clock
    start = max(clock[LINK_FREE], ready)
    begun = start + c.alpha_ps if start > clock[LINK_FREE] else start
    first = c.chunks - run.unsent[key]
    end = begun + work.marks[first + chunks] - work.marks[first]
    run.unsent[key] -= chunks
    clock[LINK_FREE] = end
    clock[LINK_BUSY] += end - start
    run.took[key] += end - start
    if run.unsent[key] == 0:
        run.complete[key] = end
        if c.service == SPLIT:
            at = clock[LANDED]
            run.landed[at, 0], run.landed[at, 1], run.landed[at, 2] = end, key, run.took[key]
            clock[LANDED] += 1


@compiled
def advance(c, work, run, now):  # type: ignore[no-untyped-def]
    """Send every waiting prefetch chunk that starts strictly before `now`."""
    clock, queue = run.clock, run.queue
    clock[LINK_ASKED] = now
    while clock[HEAD] < clock[TAIL]:
        key, ready = queue[clock[HEAD], 0], queue[clock[HEAD], 1]
        if max(clock[LINK_FREE], ready) >= now:
            return
        send(c, work, run, key, ready, 1)
        clock[SENT_PREFETCH] += 1
        run.sent_ahead[key] += 1
        if run.unsent[key] == 0:
            clock[HEAD] += 1


@compiled
def demand(c, work, run, key, ready, kind):  # type: ignore[no-untyped-def]
    """Send what is missing of `key` ahead of every prefetch; returns when it is complete."""
    advance(c, work, run, ready)
    chunks = run.unsent[key]
    if chunks:
        run.clock[kind] += chunks
        send(c, work, run, key, ready, chunks)
    return run.complete[key]


@compiled
def plan_copy(c, run, key):  # type: ignore[no-untyped-def]
    run.complete[key] = np.iinfo(np.int64).max
    run.unsent[key] = c.chunks
    run.sent_ahead[key] = 0
    run.took[key] = 0


@compiled
def settle(c, run, layer, n):  # type: ignore[no-untyped-def]
    """What was prefetched for `layer` and not sent leaves the queue; what was sent in vain is waste."""
    clock, queue, ahead, first = run.clock, run.queue, run.ahead, layer * c.experts
    if run.expected[layer] == 0:
        return
    kept = 0
    for i in range(clock[HEAD], clock[TAIL]):
        if not (queue[i, 0] // c.experts == layer and ahead[queue[i, 0]]):
            queue[kept, 0], queue[kept, 1] = queue[i, 0], queue[i, 1]
            kept += 1
    if kept < clock[TAIL] - clock[HEAD]:
        for i in range(kept):
            queue[i, 1] = max(queue[i, 1], clock[LINK_ASKED])
    clock[HEAD], clock[TAIL] = 0, kept
    for i in range(n):
        if ahead[first + run.needed[i]]:
            ahead[first + run.needed[i]] |= PROMOTED
    for key in range(first, first + c.experts):
        if ahead[key]:
            if not ahead[key] & PROMOTED:
                clock[WASTED] += run.sent_ahead[key]
            run.sent_ahead[key] = 0
            ahead[key] = 0
    run.expected[layer] = 0


@compiled
def read(c, work, run, key, asked):  # type: ignore[no-untyped-def]
    """When the host has the bytes of `key`."""
    clock = run.clock
    if key % c.experts < work.in_ram[key // c.experts]:
        return asked
    start = asked + c.read_alpha_ps if asked > clock[READER_FREE] or not clock[READS] else clock[READER_FREE]
    clock[READER_FREE] = start + c.read_ps
    run.host_has[key] = clock[READER_FREE]
    clock[READS] += 1
    return clock[READER_FREE]


@compiled
def note_traffic(c, work, run, step):  # type: ignore[no-untyped-def]
    advance(c, work, run, run.clock[NOW])
    for i in range(4):
        run.steps[step, OF_DEMAND + i] += run.clock[SENT_DEMAND + i] - run.clock[COUNTED_DEMAND + i]
        run.clock[COUNTED_DEMAND + i] = run.clock[SENT_DEMAND + i]


# --- decisions


@compiled
def record(run, event, kind, layer, expert, slot, victim):  # type: ignore[no-untyped-def]
    row = run.log[run.clock[LOGGED]]
    row[0], row[1], row[2], row[3], row[4], row[5] = event, kind, layer, expert, slot, victim
    run.clock[LOGGED] += 1


@compiled
def find_union(c, run, ids):  # type: ignore[no-untyped-def]
    """Distinct experts of `ids` [T, K], ascending, into `needed` and `tokens`; returns their number."""
    count, needed, n = run.uses, run.needed, 0
    few = ids.shape[0] * ids.shape[1] <= 64
    for row in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            expert = ids[row, i]
            if expert < c.experts:
                if few and count[expert] == 0:
                    at = n
                    while at > 0 and needed[at - 1] > expert:
                        needed[at] = needed[at - 1]
                        at -= 1
                    needed[at] = expert
                    n += 1
                count[expert] += 1
    if not few:
        for expert in range(c.experts):
            if count[expert]:
                needed[n] = expert
                n += 1
    for i in range(n):
        run.tokens[i] = count[needed[i]]
        count[needed[i]] = 0
    return n


@compiled
def protect_needed(c, run, layer, scope, n):  # type: ignore[no-untyped-def]
    guard = run.guard[layer]
    if c.looks_ahead:
        for expert in range(c.experts):
            if guard[expert]:
                guard[expert] = 0
                run.guarded[scope] -= 1
    for i in range(n):
        run.held[i] = run.slot_of[layer, run.needed[i]] >= 0
        if run.held[i]:
            guard[run.needed[i]] = 1
            run.guarded[scope] += 1


@compiled
def misses_in_demand_order(run, n):  # type: ignore[no-untyped-def]
    """Indices of the missing into `lists[0]`: most tokens first, then lowest id; returns their number."""
    missing, m = run.lists[0], 0
    for i in range(n):
        if not run.held[i]:
            at = m
            while at > 0 and run.tokens[missing[at - 1]] < run.tokens[i]:
                missing[at] = missing[at - 1]
                at -= 1
            missing[at] = i
            m += 1
    return m


@compiled
def share_fetched(c, clock, m):  # type: ignore[no-untyped-def]
    """`Split`: how many of m misses cross the link."""
    share = c.share
    if clock[LINK_RATE] and clock[CORES_RATE]:
        share = clock[CORES_RATE] * ONE // (clock[CORES_RATE] + clock[LINK_RATE])
    return min(m, max(1, (m * share + ONE // 2) // ONE))


@compiled
def leave_to_host(c, run, score, m):  # type: ignore[no-untyped-def]
    """Misses for the host go from `lists[0]` to `lists[1]`, both in demand order; returns how many stay."""
    missing, on_host = run.lists[0], run.lists[1]
    fetched = 0 if c.service == ON_CPU else share_fetched(c, run.clock, m)
    best = run.lists[2]
    for i in range(m):
        at = i
        while at > 0 and (
            run.tokens[missing[best[at - 1]]] == run.tokens[missing[i]]
            and score[run.needed[missing[best[at - 1]]]] < score[run.needed[missing[i]]]
        ):
            best[at] = best[at - 1]
            at -= 1
        best[at] = i
    chosen = run.lists[3]
    chosen[:m] = 0
    for i in range(fetched):
        chosen[best[i]] = 1
    stay, leave = 0, 0
    for i in range(m):
        if chosen[i]:
            missing[stay] = missing[i]
            stay += 1
        else:
            on_host[leave] = missing[i]
            leave += 1
    return stay


@compiled
def plan_fetches(c, run, event, layer, scope, m, score, admit, state):  # type: ignore[no-untyped-def]
    """`plan_demand`: of the misses in `lists[0]` those with a slot go to `lists[4]`, the streamed to `lists[5]`."""
    missing, order, slot, victim = run.lists[0], run.lists[2], run.lists[6], run.lists[7]
    first, last = run.first_slot[scope], run.first_slot[scope + 1]
    for i in range(m):
        slot[i] = -1
        at = i
        if c.bypass:
            worth = score[layer, run.needed[missing[i]]]
            while at > 0 and score[layer, run.needed[missing[order[at - 1]]]] < worth:
                order[at] = order[at - 1]
                at -= 1
        order[at] = i
    for j in range(m):
        i = order[j]
        expert = run.needed[missing[i]]
        if run.used[scope] < last - first:
            at = first + run.used[scope]
            run.used[scope] += 1
        else:
            at = lowest_slot(score, run.guard, run.holder, run.since, np.int64(2**62), first, last)
            if at < 0:
                break
            if c.bypass and score.ravel()[run.holder[at]] >= score[layer, expert]:
                break
        slot[i] = at
        key = layer * c.experts + expert
        victim[i] = take(at, key, layer, expert, 1, run.slot_of, run.guard, run.holder, run.guarded, scope)
    admitted = 0
    for i in range(m):
        if slot[i] >= 0:
            record(run, event, DEMAND, layer, run.needed[missing[i]], slot[i], victim[i])
            run.lists[4, admitted] = missing[i]
            admitted += 1
    streamed = 0
    for i in range(m):
        if slot[i] < 0:
            scratch = len(run.holder) + streamed % c.scratch
            record(run, event, STREAM, layer, run.needed[missing[i]], scratch, -1)
            run.lists[5, streamed] = missing[i]
            streamed += 1
    for i in range(admitted):
        admit(event, layer, np.int64(run.needed[run.lists[4, i]]), score, state)
    return admitted, streamed


@compiled
def plan_ahead(c, run, event, layer, target, wanted, room, score, value, admit, state):  # type: ignore[no-untyped-def]
    """`plan_prefetch` for one proposal; returns how many copies were planned."""
    scope = target if c.scopes > 1 else 0
    step = (event + 1) // c.layers if layer < 0 else event // c.layers
    for i in range(len(wanted)):
        expert = np.int64(wanted[i])
        run.values[i] = score[target, expert] if target == layer else value(event, target, expert, score, state)
    first, last = run.first_slot[scope], run.first_slot[scope + 1]
    begun, n = run.clock[LOGGED], 0
    for i in range(len(wanted)):
        expert = wanted[i]
        fresh = run.guard[target, expert] == 0 or run.slot_of[target, expert] < 0
        if fresh and last - first - run.guarded[scope] - 1 < c.top_k:
            break
        if run.slot_of[target, expert] >= 0:
            run.guarded[scope] += run.guard[target, expert] == 0
            run.guard[target, expert] |= 2
            continue
        if n == room:
            continue
        if run.used[scope] < last - first:
            at = first + run.used[scope]
            run.used[scope] += 1
        else:
            at = lowest_slot(score, run.guard, run.holder, run.since, step - c.dwell, first, last)
            if at < 0:
                break
            if score.ravel()[run.holder[at]] >= run.values[i]:
                continue
        key = target * c.experts + expert
        victim = take(at, key, target, expert, 2, run.slot_of, run.guard, run.holder, run.guarded, scope)
        score[target, expert] = run.values[i]
        record(run, event, PREFETCH, target, expert, at, victim)
        n += 1
    for i in range(begun, begun + n):
        admit(event, target, run.log[i, 3], score, state)
    return n


@compiled
def plan_promotions(c, run, event, layer, n, room, score, value, admit, state):  # type: ignore[no-untyped-def]
    """`Cpu.promote`: the most valuable misses, for the layer's next step."""
    best, m = run.lists[2], 0
    for i in range(n):
        if not run.held[i]:
            at = m
            while at > 0 and score[layer, run.needed[best[at - 1]]] < score[layer, run.needed[i]]:
                best[at] = best[at - 1]
                at -= 1
            best[at] = i
            m += 1
    m = min(m, c.promote)
    for i in range(m):
        run.proposed[i] = run.needed[best[i]]
    return plan_ahead(c, run, event, layer, layer, run.proposed[:m], room, score, value, admit, state)


@compiled
def plan_proposals(  # type: ignore[no-untyped-def]
    c, work, run, event, layer, n, rows, room, score, value, admit, state, propose, ahead_state
):
    ahead = np.empty((rows if c.gated else 0, work.ahead.shape[2]), np.int16)
    for row in range(len(ahead)):
        ahead[row] = work.ahead[run.formed[row], layer + 1]
    number = propose(
        event, layer, run.needed[:n], run.tokens[:n], run.chosen, ahead, ahead_state, run.targets, run.ends,
        run.proposed,
    )  # fmt: skip
    begin = 0
    for i in range(number):
        wanted = run.proposed[begin : run.ends[i]]
        room -= plan_ahead(c, run, event, layer, run.targets[i], wanted, room, score, value, admit, state)
        begin = run.ends[i]


@compiled
def remember_dwell(c, run, begun, step):  # type: ignore[no-untyped-def]
    for i in range(begun, run.clock[LOGGED]):
        if run.log[i, 1] == DEMAND or run.log[i, 1] == PREFETCH:
            run.since[run.log[i, 4]] = step


# --- one layer in time


@compiled
def on_host(c, work, run, step, layer, m, copies):  # type: ignore[no-untyped-def]
    """The experts of `lists[1]` on the host's cores; returns when the device has their sum."""
    clock = run.clock
    clock[HOST] += c.submit_ps
    free = max(clock[CORES_FREE], clock[HOST] + run.blocks[THERE])
    for i in range(m):
        at = run.lists[1, i]
        start = max(free, read(c, work, run, layer * c.experts + run.needed[at], clock[HOST]))
        busy = max(c.host_beside_s if copies else c.host_s, run.tokens[at] * c.host_token_s)
        took = round(busy * 1e12)
        free = start + took
        if c.service == SPLIT:
            run.computed[clock[COMPUTED]] = took
            clock[COMPUTED] += 1
    clock[CORES_FREE] = free
    run.steps[step, ON_HOST] += m
    return free + run.blocks[BACK]


@compiled
def send_ahead(c, work, run, begun, layer):  # type: ignore[no-untyped-def]
    """Queue the prefetches among the decisions from row `begun` on."""
    clock = run.clock
    for i in range(begun, clock[LOGGED]):
        if run.log[i, 1] == PREFETCH:
            target = run.log[i, 2]
            key = target * c.experts + run.log[i, 3]
            plan_copy(c, run, key)
            ready = read(c, work, run, key, submit(c, clock))
            if clock[TAIL] == len(run.queue):
                waiting = clock[TAIL] - clock[HEAD]
                run.queue[:waiting] = run.queue[clock[HEAD] : clock[TAIL]].copy()
                clock[HEAD], clock[TAIL] = 0, waiting
            run.queue[clock[TAIL], 0], run.queue[clock[TAIL], 1] = key, ready
            clock[TAIL] += 1
            run.expected[target] += run.ahead[key] == 0
            run.ahead[key] |= EXPECTED | (PROMOTED if target == layer else 0)


@compiled
def wave_end(c, host, free, ready, distinct, pairs):  # type: ignore[no-untyped-def]
    """(host, device) free again after one wave: `device.after`."""
    device_ps = experts_ps(c, distinct, pairs)
    first = max(free, host + c.issue_ps + c.latency_ps, ready)
    host += c.expert_launches * c.issue_ps
    last = -(-device_ps // c.expert_launches)
    return host, max(first + device_ps, host + c.latency_ps + last)


@compiled
def run_wave(c, run, ready, distinct, pairs):  # type: ignore[no-untyped-def]
    return issue(c, run.clock, c.expert_launches, experts_ps(c, distinct, pairs), ready)


@compiled
def choose_waves(c, run, now, hits, hit_pairs, m, pairs):  # type: ignore[no-untyped-def]
    """`waves.choose` among one wave, two, or one per arrival (`lists[2]` index, `lists[3]` moment, by moment)."""
    if c.waves != AUTO:
        return c.waves
    host, free, last = run.clock[HOST], run.clock[FREE], run.lists[3, m - 1]
    _, best = wave_end(c, host, free, last, hits + m, hit_pairs + pairs)
    kind, launches = ONE_WAVE, 1
    h, f = host, free
    if hits:
        h, f = wave_end(c, h, f, now, hits, hit_pairs)
    _, end = wave_end(c, h, f, last, m, pairs)
    if end < best or (end == best and (hits > 0) + 1 < launches):
        kind, best, launches = TWO_WAVES, end, (hits > 0) + 1
    for i in range(m):
        h, f = wave_end(c, h, f, run.lists[3, i], 1, run.tokens[run.lists[2, i]])
    if f < best or (f == best and (hits > 0) + m < launches):
        kind = EACH
    return kind


@compiled
def compute_arrivals(c, run, now, hits, hit_pairs, m):  # type: ignore[no-untyped-def]
    """Hits and arrivals in waves; returns the exposed wait."""
    pairs = 0
    for i in range(m):
        pairs += run.tokens[run.lists[2, i]]
    if m == 0:
        return run_wave(c, run, now, hits, hit_pairs) if hits else 0
    kind, last = choose_waves(c, run, now, hits, hit_pairs, m, pairs), run.lists[3, m - 1]
    if kind == ONE_WAVE:
        return run_wave(c, run, last, hits + m, hit_pairs + pairs)
    wait = run_wave(c, run, now, hits, hit_pairs) if hits else 0
    if kind == TWO_WAVES:
        return wait + run_wave(c, run, last, m, pairs)
    for i in range(m):
        wait += run_wave(c, run, run.lists[3, i], 1, run.tokens[run.lists[2, i]])
    return wait


@compiled
def submit_demand(c, work, run, layer, now, n, admitted):  # type: ignore[no-untyped-def]
    """Late and admitted experts in demand order into `lists[2]` and when each copy may start into `lists[3]`."""
    order, ready, m = run.lists[2], run.lists[3], 0
    for i in range(n):
        if run.held[i] and run.complete[layer * c.experts + run.needed[i]] > now:
            order[m] = i
            m += 1
    late = m
    for i in range(admitted):
        order[m] = run.lists[4, i]
        m += 1
    for i in range(m):
        run.late[order[i]] = i < late
    for i in range(1, m):
        moved, at = order[i], i
        while at > 0 and (
            run.tokens[order[at - 1]] < run.tokens[moved]
            or (run.tokens[order[at - 1]] == run.tokens[moved] and order[at - 1] > moved)
        ):
            order[at] = order[at - 1]
            at -= 1
        order[at] = moved
    for i in range(m):
        key, asked = layer * c.experts + run.needed[order[i]], submit(c, run.clock)
        if run.late[order[i]]:
            ready[i] = max(asked, run.host_has[key])
        else:
            plan_copy(c, run, key)
            ready[i] = read(c, work, run, key, asked)
    return m


@compiled
def serve_layer(  # type: ignore[no-untyped-def]
    c, work, run, step, layer, event, n, rows, score, admit, value, propose, state, ahead_state
):
    """`Place.layer`: the set is classified; plan, copy, compute."""
    clock, scope, now = run.clock, layer if c.scopes > 1 else 0, run.clock[HOST]
    advance(c, work, run, now)
    hits, hit_pairs, held = 0, 0, 0
    for i in range(n):
        if run.held[i]:
            held += 1
            if run.complete[layer * c.experts + run.needed[i]] <= now:
                hits += 1
                hit_pairs += run.tokens[i]
    of_step, of_layer = run.steps[step], run.of_layers[:, layer]
    for at, counted in ((0, n), (1, hits), (2, held - hits), (3, n - held)):
        of_step[NEEDED + at] += counted
        of_layer[at] += counted
    settle(c, run, layer, n)
    begun, admitted, streamed, leave = clock[LOGGED], 0, 0, 0
    if held < n:
        m = misses_in_demand_order(run, n)
        if c.service != WAIT:
            stay = leave_to_host(c, run, score[layer], m)
            leave, m = m - stay, stay
        admitted, streamed = plan_fetches(c, run, event, layer, scope, m, score, admit, state)
        for i in range(leave):
            record(run, event, CPU, layer, run.needed[run.lists[1, i]], -1, -1)
    if c.looks_ahead:
        room = c.most
        if c.promote:
            room -= plan_promotions(c, run, event, layer, n, room, score, value, admit, state)
        plan_proposals(c, work, run, event, layer, n, rows, room, score, value, admit, state, propose, ahead_state)
    if c.dwell:
        remember_dwell(c, run, begun, step)
    clock[HOST] += c.policy_ps
    clock[SUBMITTED] = 0
    from_host = on_host(c, work, run, step, layer, leave, admitted + streamed > 0) if leave else -1
    m = 0
    if hits < n:
        m = submit_demand(c, work, run, layer, now, n, admitted)
        for i in range(streamed):
            key = layer * c.experts + run.needed[run.lists[5, i]]
            plan_copy(c, run, key)
            run.lists[6, i] = read(c, work, run, key, submit(c, clock))
    send_ahead(c, work, run, begun, layer)
    order, moment = run.lists[2], run.lists[3]
    for i in range(m):
        key = layer * c.experts + run.needed[order[i]]
        index, at, done = order[i], i, demand(c, work, run, key, moment[i], SENT_DEMAND)
        while at > 0 and moment[at - 1] > done:
            order[at], moment[at] = order[at - 1], moment[at - 1]
            at -= 1
        order[at], moment[at] = index, done
    if c.shared_experts:
        run_block(c, work, run, SHARED)
    wait = compute_arrivals(c, run, now, hits, hit_pairs, m)
    for i in range(streamed):
        at, ready = run.lists[5, i], run.lists[6, i]
        if i >= c.scratch:
            ready = max(ready, run.lists[7, i - c.scratch])
        done = demand(c, work, run, layer * c.experts + run.needed[at], ready, SENT_STREAM)
        wait += run_wave(c, run, done, 1, run.tokens[at])
        run.lists[7, i] = clock[FREE]
    if leave:
        wait += issue(c, clock, work.launches[ADD], run.blocks[ADD], from_host)
    of_step[WAIT_PS] += wait
    release(run.slot_of[layer], run.guard[layer], run.needed[:n], run.guarded, scope)


@compiled
def tell_split(c, work, run):  # type: ignore[no-untyped-def]
    """What `split` has asked to be told: the host's times, then the copies that are complete by now."""
    clock, landed = run.clock, run.landed
    advance(c, work, run, clock[HOST])
    for i in range(clock[COMPUTED]):
        clock[CORES_RATE] = average(clock[CORES_RATE], c.bytes_per_expert, run.computed[i] // 1000)
    clock[COMPUTED] = 0
    done = 0
    while done < clock[LANDED] and landed[done, 0] <= clock[HOST]:
        at = done
        while at > 0 and landed[at - 1, 0] == landed[at, 0] and landed[at - 1, 1] > landed[at, 1]:
            for column in range(3):
                landed[at - 1, column], landed[at, column] = landed[at, column], landed[at - 1, column]
            at -= 1
        done += 1
    for i in range(done):
        clock[LINK_RATE] = average(clock[LINK_RATE], c.bytes_per_expert, landed[i, 2] // 1000)
    landed[: clock[LANDED] - done] = landed[done : clock[LANDED]].copy()
    clock[LANDED] -= done


# --- a step


@compiled
def form_step(c, work, run, step):  # type: ignore[no-untyped-def]
    """The step's rows into `formed` and its batch into `figures`; returns how many rows, 0 at the end."""
    figures, now = run.figures, run.clock[NOW]
    if c.token_budget:
        rows = next_batch(
            now, c.token_budget, c.key_room, run.requests, run.rows, run.running, run.counts, run.formed, figures
        )
        if rows:
            run.clock[MOST_KEYS] = max(run.clock[MOST_KEYS], figures[HELD_KEYS])
        return rows
    if step == len(work.due):
        return 0
    first, rows = work.starts[step], work.batches[step, 0]
    for row in range(rows):
        run.formed[row] = first + row
    figures[TOKENS], figures[ATTENDED], figures[CACHED] = rows, work.batches[step, 1], work.batches[step, 2]
    figures[OUTPUTS], figures[START_PS_OF_BATCH] = work.batches[step, 3], max(now, work.due[step])
    return rows


@compiled
def price_step(c, work, run):  # type: ignore[no-untyped-def]
    tokens, keys = run.figures[TOKENS], run.figures[CACHED] + run.figures[TOKENS]
    run.blocks[:] = work.tables[tokens]
    run.blocks[HEAD_BLOCK] = work.tables[run.figures[OUTPUTS], HEAD_BLOCK]
    run.blocks[ATTENTION] = block_ps(
        c.attention_bytes + c.key_bytes * keys,
        float(tokens * c.attention_operations + run.figures[ATTENDED] * c.key_operations),
        c.bandwidth, c.flops, c.attention_latency_s,
    )  # fmt: skip


@compiled
def begin_step(work, run, step, rows, state, begin):  # type: ignore[no-untyped-def]
    """Requests that appear are given places; every row learns its request's."""
    clock = run.clock
    for row in range(rows):
        at = run.formed[row]
        if work.first[at]:
            clock[PLACES] -= 1
            place = run.free_places[clock[PLACES]]
            run.place_of[work.request[at]] = place
            begin(place, state)
        run.places[row] = run.place_of[work.request[at]]
        run.order[clock[ROWS_DONE]] = at
        clock[ROWS_DONE] += 1
    run.sizes[step] = rows


@compiled
def end_step(work, run, rows):  # type: ignore[no-untyped-def]
    for row in range(rows):
        if work.last[run.formed[row]]:
            run.free_places[run.clock[PLACES]] = run.places[row]
            run.clock[PLACES] += 1


@compiled
def gather(work, run, rows, layer):  # type: ignore[no-untyped-def]
    """The layer's ids of the step's rows."""
    chosen = run.chosen[layer]
    for row in range(rows):
        for i in range(chosen.shape[1]):
            chosen[row, i] = work.experts[run.formed[row], layer, i]
    return chosen[:rows]


def run_steps(  # type: ignore[no-untyped-def]
    touch, admit, value, begin, propose, c, work, run, score, state, ahead_state, step, stop
):
    """Steps from `step` on, up to `stop`, the end or a nearly full log; returns the step to go on with."""
    clock, layers = run.clock, c.layers
    most = 4 * layers * c.experts  # decisions of one step at most: needs, promotions, proposals before and in it
    while step < stop and clock[LOGGED] + most <= len(run.log):
        rows = form_step(c, work, run, step)
        if rows == 0:
            clock[DONE] = 1
            break
        clock[NOW] = max(clock[NOW], run.figures[START_PS_OF_BATCH])
        clock[HOST] = max(clock[HOST], clock[NOW])
        if step:
            note_traffic(c, work, run, step - 1)
        run.steps[step, START_PS] = clock[NOW]
        busy = clock[BUSY]
        price_step(c, work, run)
        run_block(c, work, run, EMBED)
        begin_step(work, run, step, rows, state, begin)
        if c.gated:
            run_block(c, work, run, GATES)
            sync(c, clock, c.sync_ps)
        if c.looks_ahead:
            begun, event = clock[LOGGED], step * layers - 1
            plan_proposals(c, work, run, event, -1, 0, rows, c.most, score, value, admit, state, propose, ahead_state)
            if c.dwell:
                remember_dwell(c, run, begun, step)
            if clock[LOGGED] > begun:
                clock[HOST] += c.policy_ps
                clock[SUBMITTED] = 0
                send_ahead(c, work, run, begun, -1)
        for of_model in range(len(work.moe)):
            run_block(c, work, run, ATTENTION)
            layer = work.moe[of_model]
            if layer < 0:
                run_block(c, work, run, DENSE)
                continue
            run_block(c, work, run, ROUTER)
            if c.gated:
                run_block(c, work, run, GATES)
            sync(c, clock, c.sync_ps)
            if c.service == SPLIT:
                tell_split(c, work, run)
            event = step * layers + layer
            n = find_union(c, run, gather(work, run, rows, layer))
            protect_needed(c, run, layer, layer if c.scopes > 1 else 0, n)
            touch(event, layer, run.needed[:n], run.tokens[:n], run.chosen, run.places[:rows], score, state)
            serve_layer(c, work, run, step, layer, event, n, rows, score, admit, value, propose, state, ahead_state)
        run_block(c, work, run, HEAD_BLOCK)
        sync(c, clock, c.sync_ps + c.sample_ps)
        run.steps[step, BUSY_PS] = clock[BUSY] - busy
        run.steps[step, END_PS] = clock[NOW]
        end_step(work, run, rows)
        step += 1
    return step
