"""Stack depths under LRU, quicker: which needs lie deeper than the largest needed set, recency alone tells.

There C slots hold the C most recently used experts (ties: the higher id), whatever was streamed from smaller caches.
Uses stand in a row of slots, a bit for each that is its expert's last one; a depth is the number of bits behind it
(the row of Bennett and Kruskal 1975, IBM Journal 19:4, counted by words instead of a tree).
"""

from __future__ import annotations

import numpy as np

from ..policies.compiled import bare, compiled

PROTECTED = np.iinfo(np.int64).max


@bare
def serve(stack, depth, rank, key, worth):  # type: ignore[no-untyped-def]
    """Bring `key` into the stack; returns where it was, `depth` if nowhere.

    Carried down is what each capacity has to part with: at first `key` itself, where everything held outranks it.
    """
    carried, tie = key, -1
    for at in range(depth):
        here = stack[at]
        if here == key:
            stack[at] = carried
            return at
        of_here = rank[here]
        stays = (of_here > worth) | ((of_here == worth) & (here > tie))
        stack[at] = here if stays else carried
        carried = carried if stays else here
        tie = tie if stays else here
        worth = worth if stays else of_here
    stack[depth] = carried
    return depth


@compiled
def recency_depths(needs, pooled, widest):  # type: ignore[no-untyped-def]
    """[G, C + 1]: how many needs were found at each depth; sets have at most `widest` experts, fewer than C."""
    layers, experts, begin, expert, demand = needs.layers, needs.experts, needs.begin, needs.expert, needs.demand
    groups, keys = (1, layers * experts) if pooled else (layers, experts)
    found = np.zeros((groups, keys + 1), np.int64)
    words = keys // 32 + 2
    bits = np.zeros((groups, words), np.uint64)
    count = np.zeros((groups, words), np.int64)
    user = np.empty((groups, words * 64), np.int32)
    end = np.zeros(groups, np.int64)
    last_use = np.full(layers * experts, -1, np.int64)
    top = np.empty((groups, widest), np.int32)  # the stack's upper end; its last entry is spare
    depth = np.zeros(groups, np.int64)
    rank = np.zeros(layers * experts, np.int64)
    layer = -1
    for event in range(len(begin) - 1):
        layer = layer + 1 if layer + 1 < layers else 0
        group = 0 if pooled else layer
        first, last, base = begin[event], begin[event + 1], layer * experts
        word, counts, users = bits[group], count[group], user[group]
        for i in range(first, last):
            key = base + demand[i]
            rank[key] = PROTECTED
            use = last_use[key]
            if use >= 0:
                at = use >> 6
                behind = _ones(word[at] >> np.uint64(use & 63))
                for other in range(at + 1, (end[group] + 63) >> 6):
                    behind += counts[other]
                if behind > widest:
                    found[group, behind] += 1
                    last_use[key] = -2 - use
        for i in range(first, last):
            key = base + demand[i]
            at = serve(top[group], depth[group], rank, key, PROTECTED - 1)
            if at == depth[group]:
                depth[group] = min(at + 1, widest - 1)
                at = widest - 1
            if last_use[key] >= 0:
                found[group, at + 1] += 1
        for i in range(first, last):
            key = base + expert[i]
            rank[key] = event
            use = last_use[key]
            if use != -1:
                use = use if use >= 0 else -2 - use
                word[use >> 6] ^= np.uint64(1) << np.uint64(use & 63)
                counts[use >> 6] -= 1
        if end[group] + last - first > len(users):
            end[group] = _close_up(word, counts, users, end[group], last_use)
        for i in range(first, last):
            key, use = base + expert[i], end[group]
            word[use >> 6] |= np.uint64(1) << np.uint64(use & 63)
            counts[use >> 6] += 1
            users[use] = key
            last_use[key] = use
            end[group] = use + 1
    return found


@bare
def _ones(word):  # type: ignore[no-untyped-def]
    """Bits set in 64."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    word += word >> np.uint64(8)
    word += word >> np.uint64(16)
    return np.int64((word + (word >> np.uint64(32))) & np.uint64(0x7F))


@compiled
def _close_up(word, counts, users, end, last_use):  # type: ignore[no-untyped-def]
    """Move the uses that count to the row's beginning, in order; returns how many."""
    kept = 0
    for use in range(end):
        if (word[use >> 6] >> np.uint64(use & 63)) & np.uint64(1):
            users[kept] = users[use]
            last_use[users[use]] = kept
            kept += 1
    word[:] = 0
    counts[:] = 0
    for use in range(kept):
        word[use >> 6] |= np.uint64(1) << np.uint64(use & 63)
        counts[use >> 6] += 1
    return kept
