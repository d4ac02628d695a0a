"""Where experts are computed: one device and the host thread that feeds it, the link, the store, and
what computes beside it.

Between two moments at which the routing becomes known everything here is arithmetic on integers; the engine supplies
those moments. Picoseconds throughout.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..policies.prefetch import BEFORE_FIRST_LAYER
from ..policies.residency import (
    CPU,
    DEMAND,
    EXPERT,
    KIND,
    LAYER,
    LOW,
    NEAR,
    PREFETCH,
    SKIPPED,
    STREAM,
    FetchPlan,
    Residency,
)
from ..policies.routed import Routed
from .beside import Beside
from .cost import Batch, CostModel
from .device import Device, Span
from .link import CopyEngine
from .measurements import Measurements
from .storage import Reader
from .tiers import NEAR as NEAR_TIER
from .tiers import PINNED
from .waves import Arrival, Wave, Waves


class Place:
    """Carries out what its `residency` decides, and measures it."""

    def __init__(
        self, cost: CostModel, residency: Residency, measured: Measurements, waves: str, chunks: int,
        tiers: NDArray[np.int8], spans: list[Span] | None,
    ) -> None:  # fmt: skip
        model = cost.model
        layers, self._experts = len(model.moe_layers), model.experts
        self.cost, self.residency, self.measured = cost, residency, measured
        self.device = Device(cost, spans)
        self.link = CopyEngine(cost.copy_alpha_ps, cost.copy_ps, chunks, layers * self._experts, spans)
        self.link.report = not residency.timing_free
        present = np.unique(tiers).tolist()
        for tier in present:
            if tier != PINNED:
                self.link.slower(np.flatnonzero(tiers == tier).tolist(), cost.copy_from(tier))
        bits = getattr(residency.miss_service, "bits", None)
        self._low_bit_ps = {} if bits is None else {tier: cost.low_bit_copy(bits, tier) for tier in present}
        residency.miss_service.priced(cost.prices(tiers))
        self.reader = Reader(cost, tiers, 0 if bits is None else cost.low_bit_read(bits))
        self.waves = Waves(cost, self.device, self.link, waves, residency.slots.scratch)
        self._expected: list[set[int]] = [set() for _ in range(layers)]  # prefetched, target not yet routed
        self._promoted: list[set[int]] = [set() for _ in range(layers)]
        self._layer_ended = 0
        self._executors = {CPU: Beside("CPU experts", spans), NEAR: Beside("near memory", spans)}
        self._counted: dict[str, int] = {}  # chunks that steps already account for
        self._submitted_now = 0  # copies of the submission batch under way

    def note_traffic(self, step: int, now: int) -> None:
        """What the link has sent until `now`, the gap before the next step included, belongs to `step`."""
        self.link.advance(now)
        for name, chunks in vars(self.link.traffic).items():
            self.measured.steps[name][step] += chunks - self._counted.get(name, 0)
            self._counted[name] = chunks

    def stop_spans(self) -> None:
        """Keep no more spans for the timeline."""
        self.device.spans = self.link.spans = None
        for executor in self._executors.values():
            executor.spans = None

    def report_copies(self) -> None:
        """Tell a policy that asks for time which copies are complete by now."""
        if self.link.report:
            self.link.advance(self.device.host)
            size = self.cost.model.bytes_per_expert
            for key, took in self.link.landed_by(self.device.host):
                self.residency.copied(*divmod(key, self._experts), size, took // 1000)

    def before_first_layer(self) -> None:
        """Carry out what is decided when a step begins."""
        plan = self.residency.fetch_plan(BEFORE_FIRST_LAYER)
        if len(plan):
            self._decide()
            self._prefetch(plan)

    def layer(self, step: int, batch: Batch, routed: Routed) -> None:
        """The router has spoken and the set is classified: plan, copy, compute."""
        layer, now = routed.layer, self.device.host
        self.link.advance(now)
        keys = layer * self._experts + routed.needed.astype(np.int64)
        hit = routed.held & (self.link.complete[keys] <= now)
        self.measured.count(step, layer, routed.held, hit)
        self.link.settle(self._expected[layer], self._promoted[layer].union(keys.tolist()))
        self._expected[layer], self._promoted[layer] = set(), set()
        plan = self.residency.fetch_plan(layer)
        self._decide()
        sums = self._beside_device(step, batch, routed, plan)
        demand, streams = self._demand(routed, hit, plan)
        self._prefetch(plan, layer)  # before demand is sent: while its bytes come from the SSD the link is free
        arrivals = [Arrival(self.link.demand(copy.key, copy.at), copy.tokens, copy.key) for copy in demand]
        arrivals.sort(key=lambda arrival: arrival.at)
        if self.cost.model.shared_intermediate:
            self.device.run(self.cost.shared(batch), "dense", "shared experts")
        hits = Wave(now, int(hit.sum()), int(routed.tokens[hit].sum()))
        wait = self.waves.compute(f"layer {layer}", hits, arrivals, streams)
        for track, done in sums:
            wait += self.device.run(self.cost.add(batch), "experts", f"layer {layer} from {track}", done)
        self.measured.steps["skipped"][step] += np.count_nonzero(plan[:, KIND] == SKIPPED)
        self.measured.steps["wait_ps"][step] += wait
        self.residency.stalled(layer, wait // 1000)
        self.residency.layer_done(layer, (self.device.free - self._layer_ended) // 1000)
        self._layer_ended = self.device.free

    def _decide(self) -> None:
        self.device.host += self.cost.policy_ps
        self._submitted_now = 0

    def _submit(self) -> int:
        """The host submits one more copy; returns when the engine may start it."""
        self.device.host += self.cost.submit_batched_ps if self._submitted_now else self.cost.submit_ps
        self._submitted_now += 1
        return self.device.host

    def _beside_device(self, step: int, batch: Batch, routed: Routed, plan: FetchPlan) -> list[tuple[str, int]]:
        """What is computed beside the device: on which track, and when the device has its sum.

        Each branch is handed over before any copy is submitted. While copies of this layer cross the link they take
        their share of the host's memory.
        """
        size, sums, keys = self.cost.model.bytes_per_expert, [], routed.layer * self._experts
        for kind, executor in self._executors.items():
            experts = plan[plan[:, KIND] == kind, EXPERT].tolist()
            if not experts:
                continue
            tokens = dict(zip(routed.needed.tolist(), routed.tokens.tolist(), strict=True))
            copied = plan[np.isin(plan[:, KIND], (DEMAND, STREAM, LOW)), EXPERT].tolist()
            copied_from = {self.reader.tier(keys + expert) for expert in copied}
            there, back = self.cost.activations(batch) if kind == CPU else self.cost.near_activations(batch)
            self.device.host += self.cost.submit_ps
            work = []
            for expert in experts:
                tier = self.reader.tier(keys + expert)
                if kind == CPU:
                    took = self.cost.host_expert(tokens[expert], copied_from, tier)
                elif tier == NEAR_TIER:
                    took = self.cost.near_expert(tokens[expert])
                else:
                    raise ValueError(f"layer {routed.layer} expert {expert} is not in near memory")
                ready = self.reader.read(keys + expert, self.device.host)
                work.append((ready, took, f"layer {routed.layer} expert {expert}"))
                self.residency.computed(routed.layer, expert, size, took // 1000)
            sums.append((executor.track, executor.run(self.device.host + there, work) + back))
            self.measured.steps["on_host" if kind == CPU else "near"][step] += len(experts)
        return sums

    def _demand(self, routed: Routed, hit: NDArray[np.bool_], plan: FetchPlan) -> tuple[list[Arrival], list[Arrival]]:
        """Demand copies with when each may start, late experts at their place in demand order; then the streams."""
        if hit.all():
            return [], []
        tokens = dict(zip(routed.needed.tolist(), routed.tokens.tolist(), strict=True))
        late = set(routed.needed[routed.held & ~hit].tolist())
        admitted = plan[plan[:, KIND] == DEMAND, EXPERT].tolist()
        demand, streams = [], []
        for expert in sorted([*late, *admitted], key=lambda e: (-tokens[e], e)):
            key, asked = routed.layer * self._experts + expert, self._submit()
            if expert in late:
                ready = self.reader.host_has(key, asked)
            else:
                self.link.plan(key)
                ready = self.reader.read(key, asked)
            demand.append(Arrival(ready, tokens[expert], key))
        for expert in plan[plan[:, KIND] == STREAM, EXPERT].tolist():
            key = routed.layer * self._experts + expert
            self.link.plan(key)
            streams.append(Arrival(self.reader.read(key, self._submit()), tokens[expert], key))
        for expert in plan[plan[:, KIND] == LOW, EXPERT].tolist():
            key = routed.layer * self._experts + expert
            ready = self.reader.read(key, self._submit(), low_bit=True)
            streams.append(Arrival(ready, tokens[expert], -1, self._low_bit_ps[self.reader.tier(key)]))
        return demand, streams

    def _prefetch(self, plan: FetchPlan, layer: int = BEFORE_FIRST_LAYER) -> None:
        for row in plan[plan[:, KIND] == PREFETCH].tolist():
            key = row[LAYER] * self._experts + row[EXPERT]
            self.link.plan(key)
            self.link.prefetch(key, self.reader.read(key, self._submit()))
            self._expected[row[LAYER]].add(key)
            if row[LAYER] == layer:  # for the same layer's next step: kept, not wasted, if that does not need it
                self._promoted[layer].add(key)
