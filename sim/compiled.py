"""The compiled engine: the events engine's results, from array code, over the part of the model that it covers.

It hands whole stretches of steps to `kernel.run_steps` and hashes the decisions in between. `why_not` says what it
does not cover. Without numba the same code runs as plain Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.compiled import COMPILED
from ..policies.cpu import Cpu
from ..policies.eviction import Eviction
from ..policies.prefetch import Prefetch
from ..policies.residency import Residency
from ..policies.split import ONE, Split
from ..policies.steps import begin_nothing, propose_nothing, signature, state
from ..policies.wait import Wait
from ..traces.trace import Trace
from . import kernel as k
from .batches import Steps, recorded_steps
from .batching import KEYS, Queue
from .cost import CostModel, picoseconds
from .events import Setup
from .measurements import STEP_FIELDS, DeviceMeasurements, Measurements
from .tables import BLOCKS, block_tables
from .tiers import NEAR, SSD, TIERS
from .waves import WAVES

SERVICES = {Wait: k.WAIT, Cpu: k.ON_CPU, Split: k.SPLIT}
STEPS_OF = {  # the step that says in arrays what these methods say
    "touch_step": ("touch", "admitted", "prefetch_value", "request_begins", "request_ends", "step_begins", "proposed"),
    "propose_step": ("propose", "propose_first", "planned", "request_begins", "request_ends"),
}
LOG_ROWS = 1 << 16


def why_not(setup: Setup) -> str | None:
    """What about this run the compiled engine does not cover, as the end of a sentence; None when it covers all."""
    residency = setup.residency
    eviction, prefetch = residency.eviction, residency.prefetch
    if setup.others:
        return "several devices are not compiled"
    if not in_steps(eviction, "touch_step") or type(eviction).victim is not Eviction.victim:
        return f"eviction {_name(eviction)} has no compiled step"
    if prefetch is not None and not in_steps(prefetch, "propose_step"):
        return f"prefetch {_name(prefetch)} has no compiled step"
    if type(residency.miss_service) not in SERVICES:
        return f"miss service {_name(residency.miss_service)} is not compiled"
    if residency.guards.in_flight is not None:
        return "prefetch.in_flight asks for time"
    if setup.predictions is not None:
        return "predictors are not compiled"
    if setup.regrouped is not None:
        return "schedules are not compiled"
    if residency.prefill is not None:
        return "whole-layer streaming (miss.prefill) is not compiled"
    if residency.stale:
        return "stale scores are not compiled"
    tiers, cost = set(setup.tiers.tolist()), CostModel(setup.hardware, setup.model)
    if NEAR in tiers:
        return "near memory is not compiled"
    if len({cost.copy_from(tier) for tier in tiers}) > 1:
        return "copies at several rates are not compiled"
    if residency.miss_service.on_host and len({cost.taken(tier) for tier in tiers}) > 1:
        return "the host's cores beside copies from several tiers are not compiled"
    return None


def in_steps(policy: Eviction | Prefetch, step: str) -> bool:
    """A class that overrides what a step stands for, and not the step, has none."""
    for cls in type(policy).__mro__:
        if step in vars(cls):
            return vars(cls)[step] is not None
        if any(method in vars(cls) for method in STEPS_OF[step]):
            return False
    return False


def _name(policy: Any) -> str:
    return type(policy).__module__.rpartition(".")[2].replace("_", "-")


class CompiledEngine:
    """Replays a trace on one device; same interface and results as `EventsEngine`."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.trace = setup, setup.trace
        self.steps: Steps = recorded_steps(setup.trace)
        self.cost = CostModel(setup.hardware, setup.model)
        self.progress: Callable[[int], None] = lambda tokens_done: None

    def run(self) -> Measurements:
        """Simulate every step; returns what was measured."""
        setup, residency = self.setup, self.setup.residency
        work = _work(setup, self.steps, self.cost)
        run = _run(setup, self.steps, work, self.cost)
        eviction, prefetch = residency.eviction, residency.prefetch
        if eviction.touch_step is None:
            raise ValueError("the eviction policy has no compiled step")
        if eviction.begin_step is not begin_nothing:
            _room_for_requests(eviction, len(run.free_places))
        propose = propose_nothing if prefetch is None else prefetch.propose_step or propose_nothing
        steps = (eviction.touch_step, eviction.admit_step, eviction.value_step, eviction.begin_step, propose)
        rest = (
            _constants(setup, self.cost), work, run, eviction.score, eviction.state,
            state() if prefetch is None else prefetch.state,
        )  # fmt: skip
        run_steps, digest, step, decisions = _run_steps(rest), hashlib.sha256(), 0, 0
        while not run.clock[k.DONE]:
            step = run_steps(*(each.call for each in steps), *rest, step, step + 4096)
            digest.update(run.log[: run.clock[k.LOGGED]].data)
            decisions += int(run.clock[k.LOGGED])
            run.clock[k.LOGGED] = 0
            self.progress(int(run.clock[k.ROWS_DONE]))
        if step:
            k.note_traffic(rest[0], work, run, step - 1)
        if setup.token_budget is not None:
            of_row = np.repeat(np.arange(step, dtype=np.int32), run.sizes[:step])
            self.trace = self.trace.reordered(run.order, of_row)
            self.setup, self.steps = replace(setup, trace=self.trace), recorded_steps(self.trace)
        self.measured = _measurements(setup, run, step, digest.hexdigest(), decisions)
        return self.measured


@cache
def _compiled(rest: Any) -> Callable[..., int]:
    import numba
    from numba import types

    kinds = ("touch", "admit", "value", "begin", "propose")
    steps = [types.FunctionType(signature(kind)) for kind in kinds]
    return numba.njit(types.int64(*steps, *rest, types.int64, types.int64), cache=True, nogil=True)(k.run_steps)


def _run_steps(rest: tuple[Any, ...]) -> Callable[..., int]:
    """`kernel.run_steps`, compiled once for the one signature that all runs have: so that it can be cached."""
    if not COMPILED:
        return k.run_steps
    from numba import typeof

    return _compiled(tuple(typeof(value) for value in rest))


def _constants(setup: Setup, cost: CostModel) -> k.Constants:
    residency, model = setup.residency, setup.model
    prefetch, service, guards = residency.prefetch, residency.miss_service, residency.guards
    promote = service.most if isinstance(service, Cpu) else 0
    expert_bytes, operations, bandwidth, flops, latency = cost.expert_prices()
    alone, beside, per_token = cost.host_prices(int(setup.tiers[0]))
    layers, experts = residency.layers, residency.experts
    return k.Constants(
        layers=layers, experts=experts, scopes=len(residency.slots.per_scope), scratch=residency.slots.scratch,
        top_k=residency.top_k, bypass=bool(residency.eviction.bypass),
        looks_ahead=prefetch is not None or promote > 0, gated=prefetch is not None and prefetch.gates > 0,
        most=layers * experts if guards.per_layer is None else guards.per_layer, dwell=guards.dwell,
        service=SERVICES[type(service)], promote=promote,
        share=round(service.share * ONE) if isinstance(service, Split) else 0, waves=WAVES.index(setup.waves),
        issue_ps=cost.issue_ps, latency_ps=cost.launch_latency_ps, sync_ps=cost.sync_ps, sample_ps=cost.sample_ps,
        policy_ps=cost.policy_ps, submit_ps=cost.submit_ps, submit_batched_ps=cost.submit_batched_ps,
        alpha_ps=cost.copy_alpha_ps, chunks=setup.chunks, read_alpha_ps=cost.read_alpha_ps, read_ps=cost.read_ps,
        shared_experts=model.shared_intermediate > 0, expert_launches=cost.experts(1, 1).launches,
        expert_bytes=expert_bytes, expert_operations=operations, bandwidth=bandwidth, flops=flops,
        expert_latency_s=latency, host_s=alone, host_beside_s=beside, host_token_s=per_token,
        bytes_per_expert=model.bytes_per_expert, attention_bytes=cost.attention_prices()[0],
        key_bytes=cost.attention_prices()[1], attention_operations=cost.attention_prices()[2],
        key_operations=cost.attention_prices()[3], attention_latency_s=cost.attention_prices()[4],
        token_budget=setup.token_budget or 0, key_room=setup.kv_room,
    )  # fmt: skip


def _work(setup: Setup, steps: Steps, cost: CostModel) -> k.Work:
    trace, model = setup.trace, setup.model
    requests, request = np.unique(trace.request, return_inverse=True)
    moe = np.full(model.layers, -1, np.int64)
    moe[list(model.moe_layers)] = np.arange(len(model.moe_layers))
    request = request.reshape(-1).astype(np.int64)
    gates = 1 if setup.residency.prefetch is None else max(1, setup.residency.prefetch.gates)
    tables, launches = block_tables(cost, _most_rows(setup, steps), gates)
    batches = [(batch.tokens, batch.attended, batch.cached, batch.outputs) for batch in steps.batches]
    first, last = np.zeros((2, trace.rows), np.bool_)
    first[np.unique(request, return_index=True)[1]] = True
    last[trace.rows - 1 - np.unique(request[::-1], return_index=True)[1]] = True
    gated = setup.residency.prefetch is not None and setup.residency.prefetch.gates > 0
    layers, experts = setup.residency.layers, setup.residency.experts
    copy_ps = cost.copy_from(int(setup.tiers[0]))
    each, extra = divmod(layers * experts if setup.experts_in_ram is None else setup.experts_in_ram, layers)
    return k.Work(
        starts=steps.starts, batches=np.array(batches, np.int64).reshape(-1, 4),
        experts=_ids(trace, "experts", model.experts),
        ahead=_ids(trace, "lookahead", model.experts) if gated else np.zeros((1, 1, 1), np.int16),
        request=request, due=_due(trace, requests, request, steps),
        first=first, last=last, tables=tables, launches=launches, moe=moe,
        marks=np.array([copy_ps * i // setup.chunks for i in range(setup.chunks + 1)], np.int64),
        in_ram=np.array([min(experts, each + (layer < extra)) for layer in range(layers)], np.int64),
    )  # fmt: skip


def _ids(trace: Trace, column: str, experts: int) -> NDArray[np.int16]:
    """Ids as int16, absent ones as E, each row's lookahead flattened; made once per trace."""
    key = f"int16 {column}"
    if key not in trace.derived:
        values = np.minimum(getattr(trace, column), experts).astype(np.int16)
        trace.derived[key] = values.reshape(*values.shape[:2], -1)
    found: NDArray[np.int16] = trace.derived[key]
    return found


def _due(trace: Trace, requests: NDArray[Any], request: NDArray[Any], steps: Steps) -> NDArray[np.int64]:
    arrivals = {r.id: picoseconds(r.arrival_s) for r in trace.meta.requests if r.arrival_s is not None}
    if not arrivals:
        return np.zeros(len(steps), np.int64)
    arrived = np.array([arrivals.get(int(one), 0) for one in requests], np.int64)
    return np.maximum.reduceat(arrived[request], steps.starts[:-1])


def _run(setup: Setup, steps: Steps, work: k.Work, cost: CostModel) -> k.Run:
    residency: Residency = setup.residency
    layers, experts, slots = residency.layers, residency.experts, residency.slots
    keys, rows, queue = layers * experts, _most_rows(setup, steps), Queue.of(setup.trace)
    most_steps = len(steps) if setup.token_budget is None else setup.trace.rows
    places = _most_alive(setup, work, queue)
    clock = np.zeros(k.CLOCK, np.int64)
    clock[k.LINK_FREE], clock[k.PLACES] = -1, places
    scopes = len(slots.per_scope)
    return k.Run(
        clock=clock, steps=np.zeros((most_steps, k.STEP_COLUMNS), np.int64), of_layers=np.zeros((4, layers), np.int64),
        log=np.zeros((max(LOG_ROWS, 8 * keys), 6), np.int64),
        slot_of=np.full((layers, experts), -1, np.int32), guard=np.zeros((layers, experts), np.uint8),
        holder=np.full(slots.held, -1, np.int64), since=np.zeros(slots.held, np.int64),
        first_slot=np.concatenate(([0], np.cumsum(slots.per_scope))).astype(np.int64),
        used=np.zeros(scopes, np.int64), guarded=np.zeros(scopes, np.int64),
        complete=np.full(keys, np.iinfo(np.int64).max), unsent=np.full(keys, setup.chunks, np.int64),
        sent_ahead=np.zeros(keys, np.int64), took=np.zeros(keys, np.int64), host_has=np.zeros(keys, np.int64),
        ahead=np.zeros(keys, np.uint8), expected=np.zeros(layers, np.int64), queue=np.zeros((2 * keys, 2), np.int64),
        landed=np.zeros((4 * keys, 3), np.int64),
        place_of=np.zeros(int(work.request.max(initial=0)) + 1, np.int64),
        free_places=np.arange(places, dtype=np.int64)[::-1].copy(),
        requests=queue.requests, rows=queue.rows, running=queue.running, counts=queue.counts, figures=queue.figures,
        order=np.zeros(setup.trace.rows, np.int64), sizes=np.zeros(most_steps, np.int64),
        formed=np.zeros(setup.trace.rows, np.int64), blocks=np.zeros(BLOCKS, np.int64),
        chosen=np.zeros((layers, rows, setup.trace.experts.shape[2]), np.int16), places=np.zeros(rows, np.int64),
        uses=np.zeros(experts, np.int32), needed=np.zeros(experts, np.int32), tokens=np.zeros(experts, np.int32),
        held=np.zeros(experts, np.bool_), late=np.zeros(experts, np.bool_), computed=np.zeros(experts, np.int64),
        targets=np.zeros(layers + 1, np.int64), ends=np.zeros(layers + 1, np.int64),
        proposed=np.zeros((layers + 1) * experts, np.int32), values=np.zeros(experts),
        lists=np.zeros((8, experts), np.int64),
    )  # fmt: skip


def _most_rows(setup: Setup, steps: Steps) -> int:
    """Rows that a step can have."""
    most = int(steps.tokens.max(initial=1))
    return most if setup.token_budget is None else min(setup.trace.rows, max(most, setup.token_budget))


def _most_alive(setup: Setup, work: k.Work, queue: Queue) -> int:
    """Requests that can be under way at once."""
    if setup.token_budget is not None:
        least = int(queue.requests[:, KEYS].min())
        return max(1, min(len(queue.ids), setup.kv_room // max(1, least)))
    alive: NDArray[np.int64] = np.cumsum(work.first) - np.concatenate(([0], np.cumsum(work.last)[:-1]))
    return int(alive.max(initial=1)) + int(np.diff(work.starts).max(initial=0))  # places come back when a step ends


def _room_for_requests(eviction: Eviction, places: int) -> None:
    kept = eviction.state
    eviction.state = kept._replace(
        requests=np.zeros((places, *kept.requests.shape[1:]), np.float32),
        lengths=np.zeros((places, *kept.lengths.shape[1:])),
    )


def _measurements(setup: Setup, run: k.Run, steps: int, digest: str, decisions: int) -> Measurements:
    """Each of the `decisions` of this engine's part wants one expert, to be copied or computed by the host."""
    measured = Measurements.empty(steps, setup.residency.layers, setup.chunks)
    names = [name for name in STEP_FIELDS if name not in ("peer_ps", "low_bit", "skipped", "near")]
    for column, name in enumerate(names):
        measured.steps[name][:] = run.steps[:steps, column]
    for row, name in enumerate(("needed", "hit", "late", "miss")):
        measured.layers[name][:] = run.of_layers[row]
    clock = run.clock
    measured.compute_busy_ps = int(clock[k.BUSY])
    measured.link_busy_ps = int(clock[k.LINK_BUSY] - max(0, clock[k.LINK_FREE] - clock[k.NOW]))
    measured.ssd_reads = int(clock[k.READS])
    resting, first = np.bincount(setup.tiers, minlength=len(TIERS)).tolist(), int(setup.tiers[0])
    wanted = {first: decisions - measured.ssd_reads, SSD: measured.ssd_reads}
    measured.tiers = {name: (resting[tier], wanted.get(tier, 0)) for tier, name in enumerate(TIERS)}
    measured.most_keys = int(clock[k.MOST_KEYS])
    measured.decision_log_sha256 = digest
    whole = {name: int(values.sum()) for name, values in measured.layers.items()}
    measured.devices = [
        DeviceMeasurements(**whole, compute_busy_ps=measured.compute_busy_ps, link_busy_ps=measured.link_busy_ps)
    ]
    return measured
