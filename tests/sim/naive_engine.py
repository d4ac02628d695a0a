"""A second engine, from DESIGN section 3: SimPy processes that do one thing at a time, nothing computed ahead.

A host thread issues kernels one by one and submits copies; a device runs kernels in order; a link sends chunks, each
one chosen when the link is free; an SSD reads experts. Several devices have each its own kernels, link and decisions;
what passes between them are processes too. Decisions come from `Residency`, durations from `CostModel`. The one thing
it does not work out itself is `waves: auto`: the kind of waves of each layer-step is told.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import simpy
from moeflow.policies.prefetch import BEFORE_FIRST_LAYER
from moeflow.policies.prices import LayerPrices, Prices
from moeflow.sim.batches import recorded_steps
from moeflow.sim.cost import Batch, CostModel, picoseconds
from moeflow.sim.events import PER_LAYER, Setup
from moeflow.traces.trace import DECODE, PREFILL

ROUTED, CHOICE = 2, 3  # priorities at one moment: what completes (1), then the router's answer, then the link's choice
FIELDS = ("start_ps", "end_ps", "wait_ps", "busy_ps", "peer_ps", "needed", "hit", "late", "miss")
FIELDS += ("demand", "stream", "prefetch", "wasted", "low_bit", "on_host", "skipped", "near")
DEMAND, STREAM, PREFETCH, CPU, SKIPPED, LOW, NEAR, LENT, WHOLE = range(9)
TIER = {"pinned": 0, "pageable": 1, "ssd": 2, "near": 3}
Key = tuple[int, int]


@dataclass
class Copy:
    """A place in one of the link's two queues."""

    key: Key
    kind: str  # demand, stream, prefetch or low_bit
    ready: simpy.Event  # the host holds the bytes and the slot may be written


@dataclass
class Kernel:
    arrives: int
    duration: Fraction
    inputs: simpy.Event | None  # of the first kernel of a block
    done: simpy.Event | None  # of the last one
    charge: Callable[[int, int], None]  # told how long the device idled for the inputs, and for the host before that
    arrival: simpy.Event | None = None  # of hidden states, before the device can be said to idle for experts
    possible: int | None = None  # when it would have arrived, had the host not waited for its cores
    since: simpy.Event | None = None  # who computed them was done: from then on waiting for them counts


class Machine:
    """A device of the run: its kernels, its link, its decisions."""

    def __init__(self, env: simpy.Environment, index: int, residency: Any) -> None:
        self.index, self.residency = index, residency
        self.kernels = simpy.Store(env)
        self.free_at = 0
        self.demanded: deque[Copy] = deque()
        self.prefetched: deque[Copy] = deque()
        self.reports: list[tuple[int, Key, int]] = []
        self.link_called = env.event()
        self.link_busy_ps = self.link_until = self.busy_ps = 0
        self.arrival: tuple[simpy.Event, simpy.Event | None] | None = None  # of the next block's hidden states
        self.waited = 0  # for experts of the layer under way
        self.counts = dict.fromkeys(("needed", "hit", "late", "miss"), 0)


@dataclass
class NaiveEngine:
    setup: Setup
    waves: Iterator[str]  # 1, 2 or each, for every layer-step in turn
    steps: list[dict[str, int]] = field(default_factory=list)
    ssd_reads: int = 0
    ssd_low_bit_reads: int = 0
    wanted: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        setup, self.env = self.setup, simpy.Environment()
        self.machines = [Machine(self.env, i, residency) for i, residency in enumerate(setup.residencies)]
        self.cost = CostModel(setup.hardware, setup.model, len(self.machines))
        self.residency, self.model = setup.residency, setup.model
        self.layers = len(setup.model.moe_layers)
        self.reads = simpy.Store(self.env)
        self.unsent: dict[Key, int] = {}
        self.landed: dict[Key, simpy.Event] = {}  # the copy of what was planned last is complete
        self.in_host: dict[Key, simpy.Event] = {}
        self.sent_ahead: dict[Key, int] = {}
        self.expected: list[set[Key]] = [set() for _ in range(self.layers)]
        self.promoted: list[set[Key]] = [set() for _ in range(self.layers)]
        self.bits = getattr(self.residency.miss_service, "bits", 16)
        self.cores, self.unit = simpy.Store(self.env), simpy.Store(self.env)
        for machine in self.machines:
            machine.residency.priced(self._prices())
        self.outgoing, self.coming = simpy.Store(self.env), []
        self.coming_called = self.env.event()
        self.took: dict[Key, int] = {}
        self.layer_end = 0
        self.last_block = self._now()
        self.home = self.machines[0]
        self.formed: list[list[int]] = []  # rows of each step, in continuous batching
        self.most_keys = 0
        self.steps.append(dict.fromkeys(FIELDS, 0))

    @property
    def link_busy_ps(self) -> int:
        return sum(machine.link_busy_ps for machine in self.machines)

    @property
    def decision_log_sha256(self) -> str:
        digests = [machine.residency.decision_log_sha256 for machine in self.machines]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def run(self) -> dict[str, list[int]]:
        """Per step, under the names of `Measurements`."""
        for machine in self.machines:
            self.env.process(self._device(machine))
            self.env.process(self._link(machine))
        beside = (self._one_by_one(self.cores), self._one_by_one(self.unit))
        for process in (self._ssd(), *beside, self._out(), self._in()):
            self.env.process(process)
        self.env.run(until=self.env.process(self._host()))
        for machine in self.machines:  # less what a chunk that is in flight at the end still takes
            machine.link_busy_ps -= max(0, machine.link_until - self.env.now)
        return {name: [int(step[name]) for step in self.steps[:-1]] for name in FIELDS}

    # --- the device: kernels in order, each when it has arrived, the first of a block when its inputs are there

    def _device(self, machine):
        while True:
            kernel = yield machine.kernels.get()
            yield self.env.timeout(max(0, kernel.arrives - self.env.now))
            if kernel.since is not None:
                yield kernel.since
            if kernel.arrival is not None:
                able = self.env.now
                yield kernel.arrival
                if kernel.since is not None:
                    self.steps[-1]["peer_ps"] += self.env.now - able
            if kernel.inputs is not None:
                able = self.env.now
                held_up = 0 if kernel.possible is None else able - max(machine.free_at, kernel.possible)
                yield kernel.inputs
                kernel.charge(self.env.now - able, held_up)
            yield self.env.timeout(kernel.duration)
            if kernel.done is not None:
                yield self.env.timeout(math.ceil(self.env.now) - self.env.now)
                kernel.done.at = machine.free_at = self.env.now
                kernel.done.succeed()

    # --- the link: whenever it is free, the next chunk of demand, else of a prefetch

    def _link(self, machine):
        free = -1
        while True:
            yield self._last_of_this_moment(CHOICE)
            queues = [queue for queue in (machine.demanded, machine.prefetched) if queue]
            queue = next((queue for queue in queues if queue[0].ready.triggered), None)
            if queue is None:
                machine.link_called = self.env.event()
                yield self.env.any_of([machine.link_called, *(queue[0].ready for queue in queues)])
                continue
            copy = queue[0]
            alpha = self.cost.copy_alpha_ps if self.env.now > free else 0
            if copy.kind == "low_bit":
                queue.popleft()
                self.steps[-1]["low_bit"] += 1
                lasts = alpha + self.cost.low_bit_copy(self.bits, TIER[self._tier(copy.key)])
                machine.link_busy_ps, machine.link_until = machine.link_busy_ps + lasts, self.env.now + lasts
                yield self.env.timeout(lasts)
                free = self.env.now
                self.landed[copy.key].succeed()
                continue
            sent = self.setup.chunks - self.unsent[copy.key]
            whole = self.cost.copy_from(TIER[self._tier(copy.key)])
            marks = [whole * n // self.setup.chunks for n in (sent, sent + 1)]
            self.unsent[copy.key] -= 1
            self.steps[-1][copy.kind] += 1
            if copy.kind == "prefetch":
                self.sent_ahead[copy.key] += 1
            if not self.unsent[copy.key]:
                queue.popleft()
            lasts = alpha + marks[1] - marks[0]
            machine.link_busy_ps, machine.link_until = machine.link_busy_ps + lasts, self.env.now + lasts
            self.took[copy.key] = took = self.took.get(copy.key, 0) + lasts
            landed = None if self.unsent[copy.key] else self.landed[copy.key]
            yield self.env.timeout(lasts)  # meanwhile its slot may be lent, and the expert planned anew
            free = self.env.now
            if landed is not None:
                landed.succeed()
                machine.reports.append((int(self.env.now), copy.key, took))

    def _queue(self, machine: Machine, kind: str, key: Key, *conditions: simpy.Event) -> None:
        queue = machine.prefetched if kind == "prefetch" else machine.demanded
        ready = self.env.event()  # not the condition itself: SimPy's any_of breaks the conditions inside it
        self.env.all_of(conditions).callbacks.append(lambda _: ready.succeed())
        queue.append(Copy(key, kind, ready))
        self._call_link(machine)

    def _call_link(self, machine: Machine) -> None:
        """The queues have changed."""
        if not machine.link_called.triggered:
            machine.link_called.succeed()

    def _planned(self, key: Key) -> None:
        self.unsent[key], self.sent_ahead[key], self.landed[key] = self.setup.chunks, 0, self.env.event()
        self.took[key] = 0

    # --- the host's cores and the near-memory unit: one expert after the other

    def _one_by_one(self, work: simpy.Store):
        while True:
            inputs, lasts, done = yield work.get()
            yield inputs
            yield self.env.timeout(lasts)
            done.succeed()

    def _compute_on_host(self, layer, batch, asked):
        """Hands over the experts of `asked` [(machine, routed, plan)]; returns the event of their sum being back."""
        experts = [(machine, routed, int(row[2])) for machine, routed, plan in asked for row in plan if row[0] == CPU]
        if not experts:
            return None
        there, back = self.cost.activations(batch)
        yield self.env.timeout(self.cost.submit_ps)
        copied_from = [
            {TIER[self._tier((layer, int(row[2])))] for row in plan if row[0] in (DEMAND, STREAM, LOW)}
            for _, _, plan in asked
        ]
        arrived = self.env.timeout(there)
        for machine, routed, expert in experts:
            tokens = dict(zip(routed.needed.tolist(), routed.tokens.tolist(), strict=True))[expert]
            tier, done = TIER[self._tier((layer, expert))], self.env.event()
            lasts = self.cost.host_expert(tokens, copied_from, tier)
            self.cores.put((self.env.all_of([arrived, self._read((layer, expert))]), lasts, done))
            machine.residency.computed(layer, expert, self.model.bytes_per_expert, lasts // 1000)
        self.steps[-1]["on_host"] += len(experts)
        result = self.env.event()
        result.computed = done
        self.env.process(self._bring_back(done, back, result))
        return result

    def _compute_in_memory(self, layer, batch, asked):
        """The same for the near-memory unit."""
        experts = [(machine, routed, int(row[2])) for machine, routed, plan in asked for row in plan if row[0] == NEAR]
        if not experts:
            return None
        there, back = self.cost.near_activations(batch)
        yield self.env.timeout(self.cost.submit_ps)
        arrived, result = self.env.timeout(there), self.env.event()
        for machine, routed, expert in experts:
            count = int(routed.tokens[routed.needed == expert][0])
            lasts, done = self.cost.near_expert(count), self.env.event()
            self._read((layer, expert))
            self.unit.put((arrived, lasts, done))
            machine.residency.computed(layer, expert, self.model.bytes_per_expert, lasts // 1000)
        self.steps[-1]["near"] += len(experts)
        self.env.process(self._bring_back(done, back, result))
        return result

    def _bring_back(self, done, back, result):
        yield done
        yield self.env.timeout(back)
        result.at = self.env.now
        result.succeed()

    def _prices(self) -> Prices:
        """Told to the miss service: nanoseconds, rounded half up."""
        ns = lambda ps: math.floor(Fraction(ps, 1000) + Fraction(1, 2))  # noqa: E731
        shape = (self.layers, self.model.experts)
        copy, near = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for key in np.ndindex(shape):
            tier = self._tier(key)
            near[key] = tier == "near"
            slowest = max(self.cost.copy_from(TIER[tier]), self.cost.read_ps if tier == "ssd" else 0)
            copy[key] = ns(slowest)
        there_and_back, expert, token = [0, 0], 0, 0
        if near.any():
            of = [Batch(tokens, 0, 0, 0) for tokens in (0, 1)]
            there_and_back = [sum(self.cost.near_activations(b)) + self.cost.add(b).device_ps for b in of]
            unit = self.setup.hardware.near_memory
            weights = self.model.matrices * self.model.hidden * self.model.intermediate
            expert = picoseconds(self.model.bytes_per_expert / unit.internal_bandwidth)
            token = picoseconds(2 * weights / unit.flops)
        exchange, more = there_and_back[0], there_and_back[1] - there_and_back[0]
        shared = self.cost.shared(Batch(1, 1, 1, 0)).device_ps if self.model.shared_intermediate else 0
        dense = self.cost.attention(Batch(1, 1, 1, 0)).device_ps + self.cost.router(Batch(1, 1, 1, 0)).device_ps
        size, operations, bandwidth, flops, latency = self.cost.expert_prices()
        router = 2 * self.model.experts * self.model.hidden
        beside = 2 * self.model.matrices * self.model.hidden * self.model.shared_intermediate
        layer = LayerPrices(
            ns(dense + shared + self.cost.sync_ps + self.cost.policy_ps),
            ns(picoseconds((self.cost.attention_prices()[2] + router + beside) / flops)),
            ns(picoseconds(size / bandwidth)), ns(picoseconds(operations / flops)),
            max(ns((1 if self.cost.graph else 7) * self.cost.issue_ps), ns(picoseconds(latency))),
        )  # fmt: skip
        first, each = ns(self.cost.copy_alpha_ps), (ns(exchange), ns(more), ns(expert), ns(token))
        return Prices(copy, first, near, *each, layer)

    # --- between devices: what leaves a home, one after the other, and what comes back

    def _out(self):
        while True:
            rows, arrived = yield self.outgoing.get()
            yield self.env.timeout(self.cost.peer(rows))
            arrived.succeed()

    def _in(self):
        while True:
            yield self._last_of_this_moment(CHOICE)
            if not self.coming:
                self.coming_called = self.env.event()
                yield self.coming_called
                continue
            at = min(range(len(self.coming)), key=lambda i: self.coming[i][:2])
            _, _, rows, arrived = self.coming.pop(at)
            yield self.env.timeout(self.cost.peer(rows))
            arrived.at = self.env.now
            arrived.succeed()

    def _send_back(self, machine, rows):
        """The sum leaves when it is computed; returns the event of its arrival."""
        arrived, computed = self.env.event(), self.last_block

        def leave():
            yield computed
            self.coming.append((self.env.now, machine.index, rows, arrived))
            if not self.coming_called.triggered:
                self.coming_called.succeed()

        self.env.process(leave())
        return arrived

    def _go_home(self, model_layer, batch):
        """The hidden states move to the layer's device, if they are on another."""
        placement = self.setup.placement
        home = self.machines[placement.home[model_layer] if placement is not None else 0]
        if model_layer and home is not self.home:
            yield self.env.timeout(self.cost.submit_ps)
            computed, arrived = self.last_block, self.env.event()

            def move():
                yield computed
                yield self.env.timeout(self.cost.peer(batch.tokens))
                arrived.succeed()

            self.env.process(move())
            home.arrival = (arrived, computed)
        self.home = home

    def _report(self, layer: int | None) -> None:
        """What was measured since the last boundary; `layer` has been computed."""
        if layer is None:
            return
        for machine in self.machines:
            machine.residency.stalled(layer, machine.waited // 1000)
            machine.residency.layer_done(layer, int(self.layer_block.at - self.layer_end) // 1000)
        self.layer_end = self.layer_block.at

    def _report_copies(self) -> None:
        for machine in self.machines:
            for _, key, took in sorted(machine.reports):
                machine.residency.copied(*key, self.model.bytes_per_expert, took // 1000)
            machine.reports = []

    # --- the SSD: first come, first served; experts with low ids rest in host memory, the lowest in pinned memory

    def _ssd(self):
        free = -1
        while True:
            asked, lasts, done = yield self.reads.get()
            yield self.env.timeout((self.cost.read_alpha_ps if asked > free else 0) + lasts)
            free = self.env.now
            done.succeed()

    def _tier(self, key: Key) -> str:
        """Experts are dealt out, one to each layer in turn, to the first tier that has room."""
        unit, dealt = self.setup.hardware.near_memory, key[1] * self.layers + key[0]
        if unit is not None:
            if (dealt + 1) * self.model.bytes_per_expert <= unit.capacity_bytes:
                return "near"
            dealt -= unit.capacity_bytes // self.model.bytes_per_expert
        if self.setup.experts_in_ram is not None and dealt >= self.setup.experts_in_ram:
            return "ssd"
        return "pageable" if self.setup.experts_pinned is not None and dealt >= self.setup.experts_pinned else "pinned"

    def _read(self, key: Key, low_bit: bool = False) -> simpy.Event:
        self.wanted[self._tier(key)] += 1
        if self._tier(key) == "ssd":
            self.in_host[key] = self.env.event()
            lasts = self.cost.low_bit_read(self.bits) if low_bit else self.cost.read_ps
            self.reads.put((self.env.now, lasts, self.in_host[key]))
            self.ssd_reads += not low_bit
            self.ssd_low_bit_reads += low_bit
        else:
            self.in_host[key] = self._now()
        return self.in_host[key]

    # --- the host thread

    def _host(self):
        if self.setup.token_budget is not None:
            yield from self._serve()
            return
        trace, steps = self.setup.trace, recorded_steps(self.setup.trace)
        arrival = {r.id: picoseconds(r.arrival_s) for r in trace.meta.requests if r.arrival_s is not None}
        alive: set[int] = set()
        for index, batch in enumerate(steps.batches):
            rows = slice(steps.starts[index], steps.starts[index + 1])
            requests = set(trace.request[rows].tolist())
            yield self.env.timeout(max(0, max(arrival.get(r, 0) for r in requests) - self.env.now))
            self.steps[-1]["start_ps"] = self.env.now
            for request in sorted(requests - alive):
                for machine in self.machines:
                    machine.residency.request_begins(request)
            alive |= requests
            yield from self._step(index, batch, rows, (trace.phase[rows] == DECODE).all())
            for request in sorted(requests - set(trace.request[rows.stop :].tolist())):
                for machine in self.machines:
                    machine.residency.request_ends(request)
            yield self._last_of_this_moment(ROUTED)  # a chunk that starts now is the next step's
            self.steps[-1]["end_ps"] = self.env.now
            self.steps.append(dict.fromkeys(FIELDS, 0))

    def _serve(self):
        """Continuous batching: a request is what is left of its passes, a prompt row being a pass by itself."""
        trace, budget, model = self.setup.trace, self.setup.token_budget, self.model
        arrives = {r.id: picoseconds(r.arrival_s) for r in trace.meta.requests if r.arrival_s is not None}
        left: dict[int, list[list[int]]] = {}
        for row in range(trace.rows):
            passes = left.setdefault(int(trace.request[row]), [])
            before = passes[-1][-1] if passes else None
            if (
                before is not None
                and self._decodes(row)
                and self._decodes(before)
                and trace.step[before] == trace.step[row]
            ):
                passes[-1].append(row)
            else:
                passes.append([row])
        keys = {r: max(int(trace.position[row]) + 1 for each in passes for row in each) for r, passes in left.items()}
        waiting = sorted(left, key=lambda r: (arrives.get(r, 0), left[r][0][0]))
        capacity = self.setup.hardware.device.memory_bytes - self.setup.hardware.device.reserve_bytes
        capacity -= model.dense_bytes + self.residency.slots.total * model.bytes_per_expert
        running: list[int] = []
        done: dict[int, list[int]] = {r: [] for r in left}
        while waiting or running:
            if not running:
                yield self.env.timeout(max(0, arrives.get(waiting[0], 0) - self.env.now))
            while waiting and arrives.get(waiting[0], 0) <= self.env.now:
                promised = sum(keys[r] for r in [*running, waiting[0]])
                if promised * model.kv_bytes_per_token > capacity:
                    break
                running.append(waiting.pop(0))
            rows: list[int] = []
            decoding = [r for r in running if self._decodes(left[r][0][0])]
            for r in decoding:
                if not rows or len(rows) + len(left[r][0]) <= budget:
                    done[r] += left[r][0]
                    rows += left[r].pop(0)
            for r in running:
                while r not in decoding and left[r] and not self._decodes(left[r][0][0]) and len(rows) < budget:
                    done[r] += left[r][0]
                    rows += left[r].pop(0)
            self.formed.append(rows)
            self.most_keys = max(
                self.most_keys, sum(max((int(trace.position[n]) + 1 for n in done[r]), default=0) for r in running)
            )
            yield from self._formed_step(len(self.formed) - 1, rows, done, left)
            running = [r for r in running if left[r]]

    def _formed_step(self, index, rows, done, left):
        trace, requests = self.setup.trace, sorted(set(self.setup.trace.request[rows].tolist()))
        self.steps[-1]["start_ps"] = self.env.now
        attended = sum(int(trace.position[n]) + 1 for n in rows)
        cached = sum(max(int(trace.position[n]) + 1 for n in rows if trace.request[n] == r) for r in requests)
        prompts = {int(trace.request[n]) for n in rows if not self._decodes(n)}
        batch = Batch(len(rows), attended, cached, sum(map(self._decodes, rows)) + len(prompts))
        for request in requests:
            if done[request][0] in rows:
                for machine in self.machines:
                    machine.residency.request_begins(request)
        yield from self._step(index, batch, rows, not prompts)
        for request in requests:
            if not left[request]:
                for machine in self.machines:
                    machine.residency.request_ends(request)
        yield self._last_of_this_moment(ROUTED)
        self.steps[-1]["end_ps"] = self.env.now
        self.steps.append(dict.fromkeys(FIELDS, 0))

    def _decodes(self, row: int) -> bool:
        return bool(self.setup.trace.phase[row] == DECODE)

    def _step(self, index, batch, rows, decode):
        cost, residency, trace = self.cost, self.residency, self.setup.trace
        gates = residency.prefetch.gates if residency.prefetch is not None else 0
        gates += self.setup.predictor_gates
        ahead = trace.lookahead[rows] if gates else None
        chances = trace.lookahead_weights[rows] if gates and trace.lookahead_weights is not None else None
        said = self.setup.predictions
        yield from self._go_home(0, batch)
        yield from self._issue(cost.embed(batch))
        phase = DECODE if decode else PREFILL
        of_tokens = (trace.token[rows], trace.request[rows])
        for machine in self.machines:
            machine.residency.step_begins(
                index, *of_tokens, phase,
                None if ahead is None else ahead[:, 0], None if chances is None else chances[:, 0],
                None if said is None else said.at(BEFORE_FIRST_LAYER, rows),
                {} if trace.embedding is None else {"embedding": trace.embedding[rows]},
            )  # fmt: skip
        if gates:
            yield from self._issue(cost.gates(batch, gates))
            yield from self._sync(cost.sync_ps)
        if said is not None and BEFORE_FIRST_LAYER in said.moments:
            yield self.env.timeout(picoseconds(self.setup.predictor_s))
        for machine in self.machines:
            plan = machine.residency.fetch_plan(BEFORE_FIRST_LAYER)
            if len(plan):
                yield self.env.timeout(cost.policy_ps)
                yield from self._prefetch(machine, plan, False)
            if machine.residency.streaming:
                yield from self._begin_streaming(machine, plan)
        for layer in range(self.model.layers):
            yield from self._go_home(layer, batch)
            yield from self._issue(cost.attention(batch))
            if layer not in self.model.moe_layers:
                yield from self._issue(cost.dense(batch))
                continue
            moe = self.model.moe_layers.index(layer)
            yield from self._issue(cost.router(batch))
            if gates:
                yield from self._issue(cost.gates(batch, gates))
            yield from self._sync(cost.sync_ps)
            yield self._last_of_this_moment(ROUTED)
            self._report(moe - 1 if moe else None)
            self._report_copies()
            routed = [
                machine.residency.routed(
                    moe,
                    trace.experts[rows, moe],
                    None if trace.weights is None else trace.weights[rows, moe],
                    trace.request[rows],
                    None if ahead is None else ahead[:, moe + 1],
                    {name: getattr(trace, name)[rows, moe] for name in PER_LAYER if getattr(trace, name) is not None},
                    None if chances is None else chances[:, moe + 1],
                    None if said is None else said.at(moe, rows),
                )
                for machine in self.machines
            ]
            if said is not None and moe in said.moments:
                yield self.env.timeout(picoseconds(self.setup.predictor_s))
            yield from self._layer(moe, batch, routed, trace.experts[rows, moe])
        yield from self._issue(cost.head(batch))
        yield from self._sync(cost.sync_ps + cost.sample_ps)
        self._report(self.layers - 1)

    def _layer(self, layer, batch, routed, ids):
        classified = []
        for machine, its in zip(self.machines, routed, strict=True):
            machine.waited = 0
            classified.append(self._classify(machine, layer, its))
        order = sorted(self.machines, key=lambda machine: (machine is not self.home, machine.index))
        asked = []
        for machine in order:
            plan = machine.residency.fetch_plan(layer)
            if machine is self.home or len(plan) or len(routed[machine.index].needed):
                yield self.env.timeout(self.cost.policy_ps)
            self.steps[-1]["skipped"] += sum(row[0] == SKIPPED for row in plan)
            asked.append((machine, routed[machine.index], plan))
        from_host = yield from self._compute_on_host(layer, batch, asked)
        from_unit = yield from self._compute_in_memory(layer, batch, asked)
        beside = [done for done in (from_host, from_unit) if done is not None]
        sent = {}
        for machine, its, plan in asked[1:]:
            if its.held.any() or any(row[0] in (DEMAND, STREAM, LOW) for row in plan):
                owned = [int(e) for e in np.flatnonzero(self.setup.placement.owner[layer] == machine.index)]
                sent[machine.index] = rows = sum(any(e in owned for e in token) for token in ids.tolist())
                yield self.env.timeout(self.cost.submit_ps)
                arrived = self.env.event()
                self.outgoing.put((rows, arrived))
                machine.arrival = (arrived, None)
        queued = []
        if self.residency.streaming:
            yield from self._compute_streamed(self.home, layer, batch, asked[0][2], classified[0])
            self.layer_block = self.last_block
            return
        for machine, _, plan in asked:
            copies = yield from self._fetch(machine, layer, plan, *classified[machine.index])
            queued.append((machine, copies))
        results = []
        for machine, copies in queued[1:]:
            if machine.index in sent:
                yield from self._compute(machine, classified[machine.index], *copies)
                yield self.env.timeout(self.cost.submit_ps)
                results.append((self._send_back(machine, sent[machine.index]), machine))
        if self.model.shared_intermediate:
            yield from self._issue(self.cost.shared(batch))
        yield from self._compute(self.home, classified[self.home.index], *queued[0][1])
        coming = [arrived for arrived, _ in results] + beside
        if coming:
            block, home = self.cost.add(batch, len(coming)), self.home
            charge = lambda idle, held_up: self._charge_last(idle, held_up, home, beside, results)  # noqa: E731
            possible = None
            if from_host is not None and not self.cost.graph:
                possible = self.env.now + self.cost.issue_ps + self.cost.launch_latency_ps
                yield from_host.computed
            yield from self._issue(block, self.env.all_of(coming), charge=charge, possible=possible)
        self.layer_block = self.last_block

    # --- whole layers, through two buffers

    def _begin_streaming(self, machine, plan):
        """What waits is taken back: it comes with its layer. What loses its slot is cancelled."""
        for row in plan[plan[:, 0] == LENT]:
            key = (int(row[1]), int(row[2]))
            if key in self.expected[key[0]]:
                self.steps[-1]["wasted"] += self.sent_ahead[key]
                self.expected[key[0]].remove(key)
                self.promoted[key[0]].discard(key)
        machine.prefetched.clear()
        self.incoming, self.buffered = {}, {}
        submitted = False
        for layer in range(min(2, self.layers)):
            submitted = yield from self._stream_layer(machine, plan, layer, [], submitted)

    def _stream_layer(self, machine, plan, layer, buffer_is_free, submitted):
        self.incoming[layer], self.buffered[layer] = [], 0
        for expert in range(self.model.experts):
            key = (layer, expert)
            if machine.residency.slot_of[key] >= 0 and self.unsent[key]:
                yield from self._submit(submitted)
                submitted = True
                self._queue(machine, "demand", key, self.in_host[key])
                self.incoming[layer].append(key)
        for row in plan:
            if row[0] == WHOLE and row[1] == layer:
                key = (layer, int(row[2]))
                yield from self._submit(submitted)
                submitted = True
                self._planned(key)
                self._queue(machine, "stream", key, self._read(key), *buffer_is_free)
                self.incoming[layer].append(key)
                self.buffered[layer] += 1
        return submitted

    def _compute_streamed(self, machine, layer, batch, plan, classified):
        tokens, _, _ = classified
        if self.model.shared_intermediate:
            yield from self._issue(self.cost.shared(batch))
        complete = self.env.all_of([self.landed[key] for key in {*tokens, *self.incoming[layer]}])
        if tokens:
            yield from self._issue(self.cost.experts(len(tokens), sum(tokens.values())), complete)
        else:
            self.last_block = self.env.event()
            charge = lambda idle, held_up: self._wait(machine, idle + held_up, True)  # noqa: E731
            yield machine.kernels.put(Kernel(self.env.now, Fraction(0), complete, self.last_block, charge))
        kept = sum(row[0] == DEMAND for row in plan)
        if kept:
            yield from self._issue(self.cost.keep(kept))
        if layer + 2 < self.layers:
            yield from self._stream_layer(machine, plan, layer + 2, [self.last_block], False)

    def _charge_last(self, idle, held_up, home, beside, results):
        """The home idled for sums: whose came last, and had that one waited for experts?"""
        last = max(results, key=lambda result: result[0].at, default=None)
        waited = idle
        if last is not None and all(done.at < last[0].at for done in beside):
            waited = min(idle, last[1].waited)
        self._wait(home, waited + held_up, True)
        self.steps[-1]["peer_ps"] += idle - waited

    def _wait(self, machine, ps, at_home):
        machine.waited += ps
        if at_home:
            self.steps[-1]["wait_ps"] += ps

    def _classify(self, machine, layer, routed):
        """(tokens of each needed key, hits, late ones); what is not needed is cancelled."""
        record = self.steps[-1]
        tokens = {(layer, e): t for e, t in zip(routed.needed.tolist(), routed.tokens.tolist(), strict=True)}
        held = {key for key, is_held in zip(tokens, routed.held, strict=True) if is_held}
        hits = {key for key in held if self.landed[key].triggered}
        late = held - hits
        for name, keys in (("needed", tokens), ("hit", hits), ("late", late), ("miss", tokens.keys() - held)):
            record[name] += len(keys)
            machine.counts[name] += len(keys)
        here = machine.residency.here
        expected = {key for key in self.expected[layer] if here is None or here[key]}
        machine.prefetched = deque(copy for copy in machine.prefetched if copy.key not in expected)
        unneeded = expected - tokens.keys() - self.promoted[layer]
        record["wasted"] += sum(self.sent_ahead[key] for key in unneeded)
        self.expected[layer] -= expected
        self.promoted[layer] -= expected
        if machine.residency.streaming:
            record["wasted"] += (self.buffered[layer] - len(tokens.keys() - held)) * self.setup.chunks
        self._call_link(machine)
        return tokens, hits, late

    def _fetch(self, machine, layer, plan, tokens, hits, late):
        """Submits a layer's copies; returns (landing order, streams, the event of each stream being computed)."""
        admitted = {(layer, int(row[2])) for row in plan if row[0] == 0}
        demanded = sorted(late | admitted, key=lambda key: (-tokens[key], key))
        flying = [key for key in demanded if key in late and not self.unsent[key]]
        for i, key in enumerate(demanded):
            yield from self._submit(i > 0)
            if key in admitted:
                self._planned(key)
                self._read(key)
            if key not in flying:
                self._queue(machine, "demand", key, self.in_host[key])
        streamed = [(layer, int(row[2])) for row in plan if row[0] in (STREAM, LOW)]
        low = {(layer, int(row[2])) for row in plan if row[0] == LOW}
        computed = [self.env.event() for _ in streamed]
        scratch = machine.residency.slots.scratch
        for i, key in enumerate(streamed):
            yield from self._submit(bool(demanded) or i > 0)
            self._planned(key)
            slot_is_free = [computed[i - scratch]] if i >= scratch else []
            read = self._read(key, key in low)
            self._queue(machine, "low_bit" if key in low else "stream", key, read, *slot_is_free)
        yield from self._prefetch(machine, plan, bool(demanded or streamed), layer)
        return flying + [key for key in demanded if key not in flying], streamed, computed

    def _compute(self, machine, classified, landing, streamed, computed):
        tokens, hits, _ = classified
        for wave in self._waves(hits, landing):
            yield from self._experts(machine, wave, tokens)
        for key, done in zip(streamed, computed, strict=True):
            yield from self._experts(machine, [key], tokens)
            self.last_block.callbacks.append(lambda _, done=done: done.succeed())

    def _waves(self, hits: set[Key], landing: list[Key]) -> list[list[Key]]:
        kind, rest = next(self.waves), []
        if kind == "1":
            return [[*hits, *landing]] if hits or landing else []
        if landing:
            rest = [landing] if kind == "2" else [[key] for key in landing]
        return [[*hits], *rest] if hits else rest

    def _prefetch(self, machine, plan: np.ndarray, submitted: bool, layer: int = BEFORE_FIRST_LAYER):
        for row in plan[plan[:, 0] == 2]:
            yield from self._submit(submitted)
            submitted, key = True, (int(row[1]), int(row[2]))
            self._planned(key)
            self._queue(machine, "prefetch", key, self._read(key))
            self.expected[key[0]].add(key)
            if key[0] == layer:
                self.promoted[layer].add(key)

    def _submit(self, batched: bool):
        yield self.env.timeout(self.cost.submit_batched_ps if batched else self.cost.submit_ps)

    def _experts(self, machine, keys: list[Key], tokens: dict[Key, int]):
        block = self.cost.experts(len(keys), sum(tokens[key] for key in keys))
        yield from self._issue(block, self.env.all_of([self.landed[key] for key in keys]), machine)

    def _issue(
        self, block, inputs: simpy.Event | None = None, machine: Machine | None = None, charge=None, possible=None
    ):
        machine = machine or self.home
        machine.busy_ps += block.device_ps
        if self.setup.placement is None or machine.index in self.setup.placement.home:
            self.steps[-1]["busy_ps"] += block.device_ps
        at_home = machine is self.home  # now: the host may be layers ahead when the device comes to it
        charge = charge or (lambda idle, held_up: self._wait(machine, idle + held_up, at_home))
        self.last_block = self.env.event()
        (arrival, since), machine.arrival = machine.arrival or (None, None), None
        for i in range(block.launches):
            yield self.env.timeout(self.cost.issue_ps)
            last = self.last_block if i == block.launches - 1 else None
            each = Fraction(block.device_ps, block.launches)
            kernel = Kernel(self.env.now + self.cost.launch_latency_ps, each, None if i else inputs, last, charge)
            if i == 0:
                kernel.arrival, kernel.since, kernel.possible = arrival, since, possible
            yield machine.kernels.put(kernel)

    def _sync(self, cost_ps: int):
        yield self.last_block
        yield self.env.timeout(cost_ps)

    def _now(self) -> simpy.Event:
        return self.env.event().succeed()

    def _last_of_this_moment(self, priority: int) -> simpy.Event:
        event: Any = self.env.event()
        event._ok, event._value = True, None
        self.env.schedule(event, priority)
        return event
