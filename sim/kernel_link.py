"""The copy engine and the SSD on arrays: `CopyEngine` and `Reader` of the events engine.

`link` is a `layout.Link`.
"""

from __future__ import annotations

import numpy as np

from ..policies.compiled import bare
from . import layout as at


@bare
def send(fixed, clock, link, key, ready, chunks):  # type: ignore[no-untyped-def]
    copies, all_chunks = link.copies, fixed[at.CHUNKS]
    start = max(clock[at.LINK_FREE], ready)
    begun = start + fixed[at.ALPHA_PS] if start > clock[at.LINK_FREE] else start
    whole = copies[key, at.COPY_PS]
    end = begun + whole
    if chunks < all_chunks:
        first = all_chunks - copies[key, at.UNSENT]
        end = begun + whole * (first + chunks) // all_chunks - whole * first // all_chunks
    copies[key, at.UNSENT] -= chunks
    clock[at.LINK_FREE] = end
    clock[at.LINK_BUSY] += end - start
    copies[key, at.TOOK] += end - start
    if copies[key, at.UNSENT] == 0:
        copies[key, at.COMPLETE] = end
        if fixed[at.SERVICE] == at.SPLIT:
            row = clock[at.LANDED]
            link.landed[row, 0], link.landed[row, 1], link.landed[row, 2] = end, key, copies[key, at.TOOK]
            clock[at.LANDED] += 1


@bare
def advance(fixed, clock, link, now):  # type: ignore[no-untyped-def]
    """Send every waiting prefetch chunk that starts strictly before `now`."""
    clock[at.LINK_ASKED] = now
    while clock[at.HEAD] < clock[at.TAIL]:
        key, ready = link.queue[clock[at.HEAD], 0], link.queue[clock[at.HEAD], 1]
        if max(clock[at.LINK_FREE], ready) >= now:
            return
        send(fixed, clock, link, key, ready, 1)
        clock[at.SENT_PREFETCH] += 1
        link.copies[key, at.SENT_AHEAD] += 1
        if link.copies[key, at.UNSENT] == 0:
            clock[at.HEAD] += 1


@bare
def demand(fixed, clock, link, key, ready, kind):  # type: ignore[no-untyped-def]
    """Send what is missing of `key` ahead of every prefetch; returns when it is complete."""
    advance(fixed, clock, link, ready)
    chunks = link.copies[key, at.UNSENT]
    if chunks:
        clock[kind] += chunks
        send(fixed, clock, link, key, ready, chunks)
    return link.copies[key, at.COMPLETE]


@bare
def plan_copy(fixed, copies, key):  # type: ignore[no-untyped-def]
    copies[key, at.COMPLETE] = np.iinfo(np.int64).max
    copies[key, at.UNSENT] = fixed[at.CHUNKS]
    copies[key, at.SENT_AHEAD] = 0
    copies[key, at.TOOK] = 0


@bare
def queue_ahead(clock, link, key, ready, promoted, target):  # type: ignore[no-untyped-def]
    """A prefetch waits behind those before it; `promoted`: it is for the layer's next step, not for a coming one."""
    queue = link.queue
    if clock[at.TAIL] == len(queue):
        waiting = clock[at.TAIL] - clock[at.HEAD]
        for i in range(waiting):
            queue[i, 0], queue[i, 1] = queue[clock[at.HEAD] + i, 0], queue[clock[at.HEAD] + i, 1]
        clock[at.HEAD], clock[at.TAIL] = 0, waiting
    queue[clock[at.TAIL], 0], queue[clock[at.TAIL], 1] = key, ready
    clock[at.TAIL] += 1
    link.expected[target] += link.copies[key, at.AHEAD] == 0
    link.copies[key, at.AHEAD] |= at.EXPECTED | (at.PROMOTED if promoted else 0)


@bare
def settle(fixed, clock, link, needed, n, layer):  # type: ignore[no-untyped-def]
    """What was prefetched for `layer` and not sent leaves the queue; what was sent in vain is waste."""
    if link.expected[layer] == 0:
        return
    queue, copies, first = link.queue, link.copies, layer * fixed[at.EXPERTS]
    behind = first + fixed[at.EXPERTS]
    kept = 0
    for i in range(clock[at.HEAD], clock[at.TAIL]):
        key = queue[i, 0]
        if not (first <= key < behind and copies[key, at.AHEAD]):
            queue[kept, 0], queue[kept, 1] = key, queue[i, 1]
            kept += 1
    if kept < clock[at.TAIL] - clock[at.HEAD]:
        for i in range(kept):
            queue[i, 1] = max(queue[i, 1], clock[at.LINK_ASKED])
    clock[at.HEAD], clock[at.TAIL] = 0, kept
    for i in range(n):
        if copies[first + needed[i], at.AHEAD]:
            copies[first + needed[i], at.AHEAD] |= at.PROMOTED
    for key in range(first, behind):
        if copies[key, at.AHEAD]:
            if not copies[key, at.AHEAD] & at.PROMOTED:
                clock[at.WASTED] += copies[key, at.SENT_AHEAD]
            copies[key, at.SENT_AHEAD] = 0
            copies[key, at.AHEAD] = 0
    link.expected[layer] = 0


@bare
def read(fixed, clock, copies, key, asked):  # type: ignore[no-untyped-def]
    """When the host has the bytes of `key`."""
    if copies[key, at.IN_RAM]:
        return asked
    idle = asked > clock[at.READER_FREE] or not clock[at.READS]
    start = asked + fixed[at.READ_ALPHA_PS] if idle else clock[at.READER_FREE]
    clock[at.READER_FREE] = start + fixed[at.READ_PS]
    copies[key, at.HOST_HAS] = clock[at.READER_FREE]
    clock[at.READS] += 1
    return clock[at.READER_FREE]


@bare
def note_traffic(fixed, clock, link, steps, step):  # type: ignore[no-untyped-def]
    """Chunks sent until now go to `step`."""
    advance(fixed, clock, link, clock[at.NOW])
    for i in range(4):
        steps[step, at.OF_DEMAND + i] += clock[at.SENT_DEMAND + i] - clock[at.COUNTED_DEMAND + i]
        clock[at.COUNTED_DEMAND + i] = clock[at.SENT_DEMAND + i]
