"""The compiled engine: the events engine's results, from array code, over the part of the model that it covers.

It hands whole stretches of steps to `kernel.run_steps` and hashes the decisions in between. `why_not` says what it
does not cover. Without numba the same code runs as plain Python.
"""

from __future__ import annotations

import hashlib
import threading
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
from . import kernel
from . import layout as at
from .batches import Steps, recorded_steps
from .batching import KEYS, Queue
from .cost import CostModel, picoseconds
from .events import Setup
from .kernel_link import note_traffic
from .measurements import STEP_FIELDS, DeviceMeasurements, Measurements
from .tables import BLOCKS, block_tables
from .tiers import NEAR, SSD, TIERS
from .waves import WAVES

SERVICES = {Wait: at.WAIT, Cpu: at.ON_CPU, Split: at.SPLIT}
STEPS_OF = {  # the step that says in arrays what these methods say
    "touch_step": ("touch", "admitted", "prefetch_value", "request_begins", "request_ends", "step_begins", "proposed"),
    "propose_step": ("propose", "propose_first", "planned", "request_begins", "request_ends"),
}
LOG_ROWS = 1 << 16
SLOW_START_S = 2.0  # machine code that is there is loaded in less
SLOW_START = "compiling the engine: half a minute or so, once; kept for later runs"


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
        self.notice: Callable[[str], None] = lambda sentence: None

    def run(self) -> Measurements:
        """Simulate every step; returns what was measured."""
        setup, residency = self.setup, self.setup.residency
        work = _work(setup, self.steps, self.cost)
        run = _run(setup, self.steps, work, self.cost)
        eviction, prefetch = residency.eviction, residency.prefetch
        if eviction.touch_step is None:
            raise ValueError("the eviction policy has no compiled step")
        if eviction.begin_step is not begin_nothing:
            _room_for_requests(eviction, len(run.batch.free_places))
        propose = propose_nothing if prefetch is None else prefetch.propose_step or propose_nothing
        steps = (eviction.touch_step, eviction.admit_step, eviction.value_step, eviction.begin_step, propose)
        prices = _prices(self.cost, int(setup.tiers[0]))
        rest = (
            _fixed(setup, self.cost), prices, work, run, eviction.score, eviction.state,
            state() if prefetch is None else prefetch.state,
        )  # fmt: skip
        late = threading.Timer(SLOW_START_S, self.notice, (SLOW_START,))
        late.daemon = True
        late.start()
        try:
            run_steps, calls = _run_steps(rest), [each.call for each in steps]
        finally:
            late.cancel()
        digest, step, wanted = hashlib.sha256(), 0, np.zeros(len(TIERS), np.int64)
        while not run.clock[at.DONE]:
            step = run_steps(*calls, *rest, step, step + 4096)
            digest.update(run.log[: run.clock[at.LOGGED]].data)
            wanted += _by_tier(setup, run.log[: run.clock[at.LOGGED]])
            run.clock[at.LOGGED] = 0
            self.progress(int(run.clock[at.ROWS_DONE]))
        if step:
            note_traffic(rest[0], run.clock, run.link, run.steps, step - 1)
        if setup.token_budget is not None:
            of_row = np.repeat(np.arange(step, dtype=np.int32), run.batch.sizes[:step])
            self.trace = self.trace.reordered(run.batch.order, of_row)
            self.setup, self.steps = replace(setup, trace=self.trace), recorded_steps(self.trace)
        self.measured = _measurements(setup, run, step, digest.hexdigest(), wanted)
        return self.measured


@cache
def _compiled(rest: Any) -> Callable[..., int]:
    import numba
    from numba import types

    kinds = ("touch", "admit", "value", "begin", "propose")
    steps = [types.FunctionType(signature(kind)) for kind in kinds]
    whole = types.int64(*steps, *rest, types.int64, types.int64)
    return numba.njit(whole, cache=True, nogil=True, error_model="numpy", _nrt=False)(kernel.run_steps)


def _run_steps(rest: tuple[Any, ...]) -> Callable[..., int]:
    """`kernel.run_steps`, compiled once for the one signature that all runs have: so that it can be cached."""
    if not COMPILED:
        return kernel.run_steps
    from numba import typeof

    return _compiled(tuple(typeof(value) for value in rest))


def _fixed(setup: Setup, cost: CostModel) -> NDArray[np.int64]:
    residency, model = setup.residency, setup.model
    prefetch, service, guards = residency.prefetch, residency.miss_service, residency.guards
    promote = service.most if isinstance(service, Cpu) else 0
    every = residency.layers * residency.experts
    values = {
        "LAYERS": residency.layers, "EXPERTS": residency.experts, "SCOPES": len(residency.slots.per_scope),
        "SCRATCH": residency.slots.scratch, "TOP_K": residency.top_k, "BYPASS": residency.eviction.bypass,
        "LOOKS_AHEAD": prefetch is not None or promote > 0, "GATED": prefetch is not None and prefetch.gates > 0,
        "MOST": every if guards.per_layer is None else guards.per_layer, "GRAPH": cost.graph, "DWELL": guards.dwell,
        "SERVICE": SERVICES[type(service)], "PROMOTE": promote,
        "SHARE": round(service.share * ONE) if isinstance(service, Split) else 0, "WAVES": WAVES.index(setup.waves),
        "ISSUE_PS": cost.issue_ps, "LATENCY_PS": cost.launch_latency_ps, "SYNC_PS": cost.sync_ps,
        "SAMPLE_PS": cost.sample_ps, "POLICY_PS": cost.policy_ps, "SUBMIT_PS": cost.submit_ps,
        "SUBMIT_BATCHED_PS": cost.submit_batched_ps, "ALPHA_PS": cost.copy_alpha_ps, "CHUNKS": setup.chunks,
        "READ_ALPHA_PS": cost.read_alpha_ps, "READ_PS": cost.read_ps,
        "SHARED_EXPERTS": model.shared_intermediate > 0, "EXPERT_LAUNCHES": cost.experts(1, 1).launches,
        "BYTES_PER_EXPERT": model.bytes_per_expert, "ATTENTION_OPERATIONS": cost.attention_prices()[2],
        "KEY_OPERATIONS": cost.attention_prices()[3], "TOKEN_BUDGET": setup.token_budget or 0,
        "KEY_ROOM": setup.kv_room,
    }  # fmt: skip
    return np.array([values[name] for name in at.WHOLE], np.int64)


def _prices(cost: CostModel, tier: int) -> NDArray[np.float64]:
    """`tier`: where experts rest that the host computes."""
    attention_bytes, key_bytes, _, _, attention_latency_s = cost.attention_prices()
    return np.array([*cost.expert_prices(), *cost.host_prices(tier), attention_bytes, key_bytes, attention_latency_s])


def _work(setup: Setup, steps: Steps, cost: CostModel) -> at.Work:
    trace, model = setup.trace, setup.model
    requests, request = np.unique(trace.request, return_inverse=True)
    moe = np.full(model.layers, -1, np.int64)
    moe[list(model.moe_layers)] = np.arange(len(model.moe_layers))
    request = request.reshape(-1).astype(np.int64)
    gates = 1 if setup.residency.prefetch is None else max(1, setup.residency.prefetch.gates)
    tables, launches = block_tables(cost, _most_rows(setup, steps), gates)
    first, last = np.zeros((2, trace.rows), np.bool_)
    first[np.unique(request, return_index=True)[1]] = True
    last[trace.rows - 1 - np.unique(request[::-1], return_index=True)[1]] = True
    gated = setup.residency.prefetch is not None and setup.residency.prefetch.gates > 0
    return at.Work(
        starts=steps.starts, batches=steps.figures,
        experts=_ids(trace, "experts", model.experts),
        ahead=_ids(trace, "lookahead", model.experts) if gated else np.zeros((1, 1, 1), np.int16),
        request=request, due=_due(trace, requests, request, steps),
        first=first, last=last, tables=tables, launches=launches, moe=moe,
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


def _run(setup: Setup, steps: Steps, work: at.Work, cost: CostModel) -> at.Run:
    residency: Residency = setup.residency
    layers, experts = residency.layers, residency.experts
    keys = layers * experts
    most_steps = len(steps) if setup.token_budget is None else setup.trace.rows
    clock = np.zeros(at.CLOCK, np.int64)
    batch, layer = _batch(setup, work, most_steps, _most_rows(setup, steps)), _layer(setup, work, steps)
    clock[at.LINK_FREE], clock[at.PLACES] = -1, len(batch.free_places)
    proposals = at.Proposals(
        targets=np.zeros(layers + 1, np.int64), ends=np.zeros(layers + 1, np.int64),
        experts=np.zeros((layers + 1) * experts, np.int32), values=np.zeros(experts),
    )  # fmt: skip
    return at.Run(
        clock=clock, steps=np.zeros((most_steps, at.STEP_COLUMNS), np.int64),
        of_layers=np.zeros((layers, 4), np.int64), log=np.zeros((max(LOG_ROWS, 8 * keys), 6), np.int64),
        slots=_slots(residency), link=_link(setup, cost), batch=batch, layer=layer, proposals=proposals,
    )  # fmt: skip


def _slots(residency: Residency) -> at.Slots:
    layers, experts, slots = residency.layers, residency.experts, residency.slots
    scopes = len(slots.per_scope)
    return at.Slots(
        slot_of=np.full((layers, experts), -1, np.int32), guard=np.zeros((layers, experts), np.uint8),
        holder=np.full(slots.held, -1, np.int64), since=np.zeros(slots.held, np.int64),
        first_slot=np.concatenate(([0], np.cumsum(slots.per_scope))).astype(np.int64),
        used=np.zeros(scopes, np.int64), guarded=np.zeros(scopes, np.int64),
    )  # fmt: skip


def _link(setup: Setup, cost: CostModel) -> at.Link:
    keys = setup.residency.layers * setup.residency.experts
    copies = np.zeros((keys, at.COPY_COLUMNS), np.int64)
    copies[:, at.COMPLETE], copies[:, at.UNSENT] = np.iinfo(np.int64).max, setup.chunks
    copies[:, at.COPY_PS], copies[:, at.IN_RAM] = [cost.copy_from(tier) for tier in setup.tiers], setup.tiers != SSD
    return at.Link(
        copies=copies, expected=np.zeros(setup.residency.layers, np.int64), queue=np.zeros((2 * keys, 2), np.int64),
        landed=np.zeros((4 * keys, 3), np.int64),
    )  # fmt: skip


def _batch(setup: Setup, work: at.Work, most_steps: int, most_rows: int) -> at.Batch:
    rows, queue = setup.trace.rows, Queue.of(setup.trace)
    return at.Batch(
        formed=np.zeros(rows, np.int64), places=np.zeros(most_rows, np.int64),
        place_of=np.zeros(int(work.request.max(initial=0)) + 1, np.int64),
        free_places=np.arange(_most_alive(setup, work, queue), dtype=np.int64)[::-1].copy(),
        blocks=np.zeros((BLOCKS, 3), np.int64), requests=queue.requests, rows=queue.rows, running=queue.running,
        counts=queue.counts, figures=queue.figures, order=np.zeros(rows, np.int64),
        sizes=np.zeros(most_steps, np.int64),
    )  # fmt: skip


def _layer(setup: Setup, work: at.Work, steps: Steps) -> at.Layer:
    layers, experts, rows = setup.residency.layers, setup.residency.experts, _most_rows(setup, steps)
    return at.Layer(
        chosen=np.zeros((layers, rows, setup.trace.experts.shape[2]), np.int16),
        ahead=np.zeros((rows, work.ahead.shape[2]), np.int16), needed=np.zeros(experts, np.int32),
        tokens=np.zeros(experts, np.int32), uses=np.zeros(experts, np.int32),
        lists=np.zeros((at.LISTS, experts), np.int64), computed=np.zeros(experts, np.int64),
    )  # fmt: skip


def _most_rows(setup: Setup, steps: Steps) -> int:
    """Rows that a step can have."""
    most = int(steps.tokens.max(initial=1))
    return most if setup.token_budget is None else min(setup.trace.rows, max(most, setup.token_budget))


def _most_alive(setup: Setup, work: at.Work, queue: Queue) -> int:
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


def _by_tier(setup: Setup, log: NDArray[np.int64]) -> NDArray[np.int64]:
    """Decisions by the tier of the expert that they want, to be copied or computed by the host."""
    keys = log[:, 2] * setup.residency.experts + log[:, 3]
    return np.bincount(setup.tiers[keys], minlength=len(TIERS)).astype(np.int64)


def _measurements(setup: Setup, run: at.Run, steps: int, digest: str, wanted: NDArray[np.int64]) -> Measurements:
    measured = Measurements.empty(steps, setup.residency.layers, setup.chunks)
    names = [name for name in STEP_FIELDS if name not in ("peer_ps", "low_bit", "skipped", "near")]
    for column, name in enumerate(names):
        measured.steps[name][:] = run.steps[:steps, column]
    for row, name in enumerate(("needed", "hit", "late", "miss")):
        measured.layers[name][:] = run.of_layers[:, row]
    clock = run.clock
    measured.compute_busy_ps = int(clock[at.BUSY])
    measured.link_busy_ps = int(clock[at.LINK_BUSY] - max(0, clock[at.LINK_FREE] - clock[at.NOW]))
    measured.ssd_reads = int(clock[at.READS])
    resting = np.bincount(setup.tiers, minlength=len(TIERS))
    measured.tiers = {name: (int(resting[tier]), int(wanted[tier])) for tier, name in enumerate(TIERS)}
    measured.most_keys = int(clock[at.MOST_KEYS])
    measured.decision_log_sha256 = digest
    whole = {name: int(values.sum()) for name, values in measured.layers.items()}
    measured.devices = [
        DeviceMeasurements(**whole, compute_busy_ps=measured.compute_busy_ps, link_busy_ps=measured.link_busy_ps)
    ]
    return measured
