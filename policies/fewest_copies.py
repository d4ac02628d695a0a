"""The fewest copies that any policy can do with, knowing the trace: the optimum of offline caching with bypass.

Keep an expert from one use to its next and one copy is saved; at most so many are kept between two events as there are
slots. That is interval scheduling on as many machines, solved exactly by dropping whatever is needed last (Faigle and
Nawijn 1995, Discrete Applied Mathematics 58).
"""

from __future__ import annotations

import heapq

import numpy as np

from ..traces.trace import Trace
from .compiled import compiled
from .future import future_of


def fewest_copies_of(trace: Trace, slots: int) -> int:
    """Copies of the whole trace, which starts cold, with `slots` slots in one pool."""
    future = future_of(trace)
    uses = future.uses()
    steps = uses[:, 0] // future.layers
    windows = np.zeros(len(trace.step_starts) - 1, np.int64)
    return int(fewest_copies(steps, uses[:, 0], uses[:, 1], windows, future.layers * future.experts, slots).sum())


@compiled
def fewest_copies(step_of_use, event, key, window_of, keys, slots):  # type: ignore[no-untyped-def]
    """[W]: least copies of each window. A window that starts at step 0 starts cold, the others as they like."""
    windows = window_of.max() + 1 if len(window_of) else 0
    copies = np.zeros(windows, np.int64)
    following = np.full(len(event), -1, np.int64)  # event of the same expert's next use in the same window
    seen = np.full(keys, -1, np.int64)
    for i in range(len(event) - 1, -1, -1):
        later = seen[key[i]]
        if later >= 0 and window_of[step_of_use[later]] == window_of[step_of_use[i]]:
            following[i] = event[later]
        seen[key[i]] = i
    first_of = np.full(keys, -1, np.int64)  # last window in which the expert's first use was met
    kept = np.zeros(keys, np.bool_)
    i = 0
    while i < len(event):
        window = window_of[step_of_use[i]]
        stop = i
        while stop < len(event) and window_of[step_of_use[stop]] == window:
            stop += 1
        if window >= 0:
            heap = [np.int64(0) for _ in range(0)]
            held = 0
            if step_of_use[i] > 0:
                for j in range(i, stop):
                    if first_of[key[j]] != window:
                        first_of[key[j]] = window
                        kept[key[j]] = True
                        heapq.heappush(heap, -(event[j] * keys + key[j]))
                        held += 1
                while held > slots:
                    kept[-heapq.heappop(heap) % keys] = False
                    held -= 1
            while i < stop:
                now, begin = event[i], i
                while i < stop and event[i] == now:
                    if kept[key[i]]:
                        kept[key[i]] = False
                        held -= 1
                    else:
                        copies[window] += 1
                    i += 1
                for j in range(begin, i):
                    if following[j] >= 0:
                        kept[key[j]] = True
                        heapq.heappush(heap, -(following[j] * keys + key[j]))
                        held += 1
                while held > slots:
                    kept[-heapq.heappop(heap) % keys] = False
                    held -= 1
            kept[:] = False
        i = stop
    return copies
