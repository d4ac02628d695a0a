"""Two lower bounds on time that no policy can beat on this trace, this model and this hardware.

*Resident*: every expert is in device memory, the routing never has to be read back, and nothing is decided. Each
step runs the same blocks, experts in one launch; block ends are max-plus in their inputs, so taking syncs, copies
and extra launches away can only make a step shorter.

*Clairvoyant*: steps are cut into windows. Within a window the link must carry at least the copies that the best
offline choice needs with the same number of slots in one pool, bypass allowed, starting from whatever slots' worth
of experts helps most (cold where the run itself starts cold); copies are serial, so a window lasts at least
copies * time per copy, and at least its resident time. Windows do not overlap, so their bounds add. Every way of
cutting gives a bound; the largest is taken.

The fewest copies: keep an expert from one use to its next and one copy is saved; at most C are kept between two
events. That is interval scheduling on C machines, solved exactly by dropping whatever is needed last whenever more
than C are kept (Faigle and Nawijn 1995, Discrete Applied Mathematics 58). Unlike `belady`, which obeys the replay
contract, it may drop an expert that the running layer needs, so it is a bound on every policy.

Where the host may compute experts (miss services `cpu` and `split`) each of those misses costs the link one copy or
the host one expert, at its fastest; both work at once, so n misses last at least n / (1 / copy + 1 / host). A
near-memory unit that may serve them is one more such server (`CostModel.least_service_ps`). The device may then be
spared any expert, so the resident bound counts none. Runs that change routing have no bounds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import compiled
from ..policies.fewest_copies import fewest_copies
from ..policies.future import Future
from ..traces.model_spec import ModelSpec
from ..traces.trace import Trace
from .batches import Steps
from .cost import CostModel, block_ps
from .tables import ATTENTION, DENSE, EMBED, HEAD_BLOCK, ROUTER, SHARED, block_tables

WINDOW_STEPS = (0, 256, 64, 16)  # 0: as long as possible


@dataclass(frozen=True)
class Clairvoyant:
    """The best cut found: `window_of` [S] (-1: step not counted), `copies` [W], the sums below over counted steps."""

    window_of: NDArray[np.int64]
    copies: NDArray[np.int64]
    copy_ps: int
    token_time_ps: float  # least possible sum over steps of tokens * duration

    def wait_ps(self, duration_ps: NDArray[np.int64], wait_ps: NDArray[np.int64]) -> int:
        """Least exposed wait of a run that spends on everything else what this run does."""
        counted = self.window_of >= 0
        other = _sums(self.window_of[counted], (duration_ps - wait_ps)[counted], len(self.copies))
        return int(np.maximum(0, self.copies * self.copy_ps - other).sum())


def resident_steps(
    trace: Trace, model: ModelSpec, steps: Steps, cost: CostModel, on_host: bool = False
) -> NDArray[np.int64]:
    """[S] picoseconds: each step with everything resident; without its experts if the host may compute those."""
    distinct, assignments = work_of(trace, model.experts, steps)
    moe = np.isin(np.arange(model.layers), model.moe_layers)
    tables, launches = block_tables(cost, int(steps.tokens.max(initial=1)))
    return np.asarray(
        _resident(
            moe, steps.figures, tables, launches, distinct * (not on_host), assignments, cost.attention_prices(),
            cost.expert_prices(), cost.experts(1, 1).launches, bool(model.shared_intermediate), cost.issue_ps,
            cost.launch_latency_ps, cost.graph, cost.sync_ps + cost.sample_ps,
        )
    )  # fmt: skip


def work_of(trace: Trace, experts: int, steps: Steps) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[S, L] distinct experts and assignments of every layer-step; worked out once per trace."""
    if "work" not in trace.derived:
        trace.derived["work"] = routed_work(trace.experts, steps.starts, experts)
    distinct, assignments = trace.derived["work"]
    return distinct, assignments


@compiled
def _resident(  # type: ignore[no-untyped-def]
    moe, batches, tables, launches, distinct, assignments, attention, experts, expert_launches, shared, issue, latency,
    graph, sample,
):  # fmt: skip
    """The end of each step's blocks, one after the other; with graphs one segment carries the whole step."""
    ends = np.empty(len(batches), np.int64)
    weight_bytes, key_bytes, per_token, per_key, attention_s = attention
    expert_bytes, per_pair, bandwidth, flops, expert_s = experts
    order, calls = np.empty(3 * len(moe) + 2 * len(moe) + 2, np.int64), np.empty(5 * len(moe) + 2, np.int64)
    for step in range(len(batches)):
        tokens, attended, cached, outputs = batches[step]
        of_attention = block_ps(
            weight_bytes + key_bytes * (cached + tokens), float(tokens * per_token + attended * per_key), bandwidth,
            flops, attention_s,
        )  # fmt: skip
        order[0], calls[0], n, layer = tables[tokens, EMBED], launches[EMBED], 1, 0
        for routed in moe:
            order[n], calls[n] = of_attention, launches[ATTENTION]
            n += 1
            if not routed:
                order[n], calls[n] = tables[tokens, DENSE], launches[DENSE]
                n += 1
                continue
            order[n], calls[n] = tables[tokens, ROUTER], launches[ROUTER]
            n += 1
            if shared:
                order[n], calls[n] = tables[tokens, SHARED], launches[SHARED]
                n += 1
            if distinct[step, layer]:
                pairs = assignments[step, layer] * per_pair
                order[n] = block_ps(distinct[step, layer] * expert_bytes, pairs, bandwidth, flops, expert_s)
                calls[n] = expert_launches
                n += 1
            layer += 1
        order[n], calls[n] = tables[outputs, HEAD_BLOCK], launches[HEAD_BLOCK]
        host, free = 0, 0
        if graph:
            free = issue + latency
        for i in range(n + 1):
            if graph:
                free += order[i]
            else:
                first = max(free, host + issue + latency)
                host += calls[i] * issue
                free = max(first + order[i], host + latency - (-order[i] // calls[i]))
        ends[step] = max(host, free) + sample
    return ends


def clairvoyant(
    trace: Trace, future: Future, steps: Steps, counted: NDArray[np.bool_], resident_ps: NDArray[np.int64],
    slots: int, copy_ps: int,
) -> Clairvoyant:  # fmt: skip
    """The bound over the steps marked in `counted` [S], for `slots` slots in one pool."""
    uses, keys = future.uses(), future.layers * future.experts
    step_of_use = uses[:, 0] // future.layers
    breaks = _new_request_arrives(trace, steps)
    found = []
    for length in WINDOW_STEPS:
        window_of = _windows(counted, breaks, length or len(steps))
        name = f"copies {slots} {length} {hashlib.sha256(counted.tobytes()).hexdigest()}"
        if name not in trace.derived:
            trace.derived[name] = fewest_copies(step_of_use, uses[:, 0], uses[:, 1], window_of, keys, slots)
        copies = trace.derived[name]
        time = _least_token_time(steps.tokens, resident_ps, window_of, copies * copy_ps)
        found.append(Clairvoyant(window_of, copies, copy_ps, time))
    return max(found, key=lambda bound: (bound.token_time_ps, bound.copies.sum()))


def _least_token_time(
    tokens: NDArray[np.int64], resident_ps: NDArray[np.int64], window_of: NDArray[np.int64], link_ps: NDArray[np.int64]
) -> float:
    counted = window_of >= 0
    window, windows = window_of[counted], len(link_ps)
    fewest = np.full(windows, np.iinfo(np.int64).max)
    np.minimum.at(fewest, window, tokens[counted])
    computing = _sums(window, (tokens * resident_ps)[counted], windows)
    return float(np.maximum(computing, fewest.astype(np.float64) * link_ps).sum())


def _sums(window: NDArray[np.int64], values: NDArray[np.int64], windows: int) -> NDArray[np.int64]:
    totals = np.zeros(windows, np.int64)
    np.add.at(totals, window, values)
    return totals


def _new_request_arrives(trace: Trace, steps: Steps) -> NDArray[np.bool_]:
    """[S]: the step may have waited for an arrival, so that the link had time that no step accounts for."""
    breaks = np.zeros(len(steps), np.bool_)
    if any(request.arrival_s is not None for request in trace.meta.requests):
        first_rows = np.unique(trace.request, return_index=True)[1]
        breaks[np.searchsorted(steps.starts, first_rows, side="right") - 1] = True
    return breaks


@compiled
def _windows(counted, breaks, length):  # type: ignore[no-untyped-def]
    """[S]: window of each counted step, at most `length` contiguous steps each; -1 for the others."""
    window_of = np.full(len(counted), -1, np.int64)
    window, size = -1, 0
    for step in range(len(counted)):
        if not counted[step]:
            continue
        if size == length or breaks[step] or step == 0 or window_of[step - 1] < 0:
            window, size = window + 1, 0
        window_of[step] = window
        size += 1
    return window_of


@compiled
def routed_work(ids, starts, experts):  # type: ignore[no-untyped-def]
    """[S, L] distinct experts and assignments of every layer-step."""
    steps, layers = len(starts) - 1, ids.shape[1]
    distinct = np.zeros((steps, layers), np.int64)
    assignments = np.zeros((steps, layers), np.int64)
    seen = np.full((layers, experts), -1, np.int64)
    for step in range(steps):
        for row in range(starts[step], starts[step + 1]):
            for layer in range(layers):
                for i in range(ids.shape[2]):
                    expert = ids[row, layer, i]
                    if expert < experts:
                        assignments[step, layer] += 1
                        if seen[layer, expert] != step:
                            seen[layer, expert] = step
                            distinct[step, layer] += 1
    return distinct, assignments
