"""Where experts are computed: one device with its link, and what serves every device: the host thread, the SSD, and
what computes beside devices.

Between two moments at which the routing becomes known everything here is arithmetic on integers; the engine supplies
those moments. Picoseconds throughout.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..policies.prefetch import BEFORE_FIRST_LAYER
from ..policies.residency import (
    CPU,
    DEMAND,
    EXPERT,
    KIND,
    LAYER,
    LENT,
    LOW,
    PREFETCH,
    SKIPPED,
    STREAM,
    WHOLE,
    FetchPlan,
    Residency,
)
from ..policies.routed import Routed
from .beside import Beside
from .cost import Batch, CostModel
from .device import Device, HostThread, Span
from .link import CopyEngine
from .measurements import DeviceMeasurements, Measurements
from .storage import Reader
from .tiers import NEAR as NEAR_TIER
from .tiers import PINNED
from .waves import Arrival, Wave, Waves


@dataclass(frozen=True)
class Sum:
    """What was computed beside the devices. With eager dispatch the host thread waits for the host's cores before it
    submits anything that takes their result; a graph waits on the device."""

    track: str
    seen: int  # when the host thread may go on
    done: int  # when the device has it


@dataclass
class Share:
    """What one place does in a layer-step."""

    routed: Routed
    hit: NDArray[np.bool_]
    plan: FetchPlan
    demand: list[Arrival] = field(default_factory=list)
    streams: list[Arrival] = field(default_factory=list)

    @property
    def copies(self) -> bool:
        return bool(np.isin(self.plan[:, KIND], (DEMAND, STREAM, LOW)).any())

    @property
    def computes(self) -> bool:
        """The device has experts to compute, be it that they are still to be copied."""
        return bool(self.routed.held.any()) or self.copies


class Place:
    """Carries out what its `residency` decides, and measures it.

    Host thread, SSD and `beside`, which computes what plans call CPU or NEAR, are every place's.
    """

    def __init__(
        self, cost: CostModel, residency: Residency, measured: Measurements, waves: str, chunks: int,
        tiers: NDArray[np.int8], reader: Reader, spans: list[Span] | None, thread: HostThread,
        beside: dict[int, Beside], index: int = 0,
    ) -> None:  # fmt: skip
        model = cost.model
        layers, self._experts, self._chunks = len(model.moe_layers), model.experts, chunks
        name = f" {index}" if index else ""
        self.cost, self.residency, self.measured, self.index = cost, residency, measured, index
        self.device = Device(cost, spans, thread, name)
        self.link = CopyEngine(cost.copy_alpha_ps, cost.copy_ps, chunks, layers * self._experts, spans, name)
        self.link.report = not residency.timing_free
        self.reader, self.beside = reader, beside
        present = np.unique(tiers).tolist()
        for tier in present:
            if tier != PINNED:
                self.link.slower(np.flatnonzero(tiers == tier).tolist(), cost.copy_from(tier))
        bits = getattr(residency.miss_service, "bits", None)
        self._low_bit_ps = {} if bits is None else {tier: cost.low_bit_copy(bits, tier) for tier in present}
        residency.priced(cost.prices(tiers))
        self.waves = Waves(cost, self.device, self.link, waves, residency.slots.scratch)
        self.own = DeviceMeasurements()
        self._expected: list[set[int]] = [set() for _ in range(layers)]  # prefetched, target not yet routed
        self._promoted: list[set[int]] = [set() for _ in range(layers)]
        self._incoming: list[list[int]] = [[] for _ in range(layers)]  # keys for which a streamed layer waits
        self._buffered = [0] * layers  # of those, how many go to a buffer
        self._counted: dict[str, int] = {}  # chunks that steps already account for
        self._submitted_now = 0  # copies of the submission batch under way

    def close(self, end: int) -> None:
        """The run ended at `end`."""
        self.own.compute_busy_ps, self.own.link_busy_ps = self.device.busy_ps, self.link.busy_until(end)

    def note_traffic(self, step: int, now: int) -> None:
        """What the link has sent until `now`, the gap before the next step included, belongs to `step`."""
        self.link.advance(now)
        for name, chunks in vars(self.link.traffic).items():
            self.measured.steps[name][step] += chunks - self._counted.get(name, 0)
            self._counted[name] = chunks

    def stop_spans(self) -> None:
        """Keep no more spans for the timeline."""
        self.device.spans = self.link.spans = None

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
        if self.residency.streaming:
            self._begin_streaming(plan)

    def _begin_streaming(self, plan: FetchPlan) -> None:
        """Copies that were under way to slots that are lent are cancelled; the first two layers come."""
        self.link.advance(self.device.host)
        for row in plan[plan[:, KIND] == LENT].tolist():
            layer, key = row[LAYER], row[LAYER] * self._experts + row[EXPERT]
            if key in self._expected[layer]:
                self.link.settle({key}, set())
                self._expected[layer].discard(key)
                self._promoted[layer].discard(key)
        self.link.withdraw()
        self._submitted_now = 0
        for layer in range(min(2, len(self._incoming))):
            self._stream(plan, layer, 0)

    def _stream(self, plan: FetchPlan, layer: int, buffer_free: int) -> None:
        """All of `layer` that is not on the device is copied: what held experts lack, then the others to a buffer."""
        first = layer * self._experts
        lacking = [first + held for held in self.residency.held(layer).tolist() if self.link.lacks(first + held)]
        for key in lacking:
            self.link.demand(key, self.reader.host_has(key, self._submit()))
        whole = (first + plan[(plan[:, KIND] == WHOLE) & (plan[:, LAYER] == layer), EXPERT]).tolist()
        for key in whole:
            self.link.plan(key)
            ready = max(buffer_free, self.reader.read(key, self._submit()))
            self.link.demand(key, ready, streamed=True)
        self._incoming[layer] = lacking + whole
        self._buffered[layer] = len(whole)

    def _compute_streamed(self, share: Share, now: int) -> int:
        """Experts of a layer that is streamed, in one launch once it is complete; returns the exposed wait."""
        routed, layer = share.routed, share.routed.layer
        keys = layer * self._experts + routed.needed.astype(np.int64)
        label, complete = f"layer {layer}", self.link.complete
        whole = max((int(complete[key]) for key in self._incoming[layer]), default=now)
        if len(keys):
            block = self.cost.experts(len(keys), int(routed.tokens.sum()))
            wait = self.device.run(block, "experts", label, max(whole, int(complete[keys].max())))
        else:
            able = max(self.device.free, self.device.host)
            wait, self.device.free = max(0, whole - able), max(able, whole)
        kept = int(np.count_nonzero(share.plan[:, KIND] == DEMAND))
        if kept:
            self.device.run(self.cost.keep(kept), "experts", f"{label} keeps {kept}")
        return wait

    def stream_on(self, share: Share) -> None:
        """The layer has been computed: the layer after the next one follows into its buffer."""
        following = share.routed.layer + 2
        if self.residency.streaming and following < len(self._incoming):
            self._submitted_now = 0
            self._stream(share.plan, following, self.device.free)

    def share(self, step: int, routed: Routed, now: int, leads: bool) -> Share:
        """The router has spoken at `now` and the set is classified: settle what was expected, and plan."""
        layer = routed.layer
        self.link.advance(now)
        keys = layer * self._experts + routed.needed.astype(np.int64)
        hit = routed.held & (self.link.complete[keys] <= now)
        self.measured.count(step, layer, routed.held, hit, self.own)
        self.link.settle(self._expected[layer], self._promoted[layer].union(keys.tolist()))
        self._expected[layer], self._promoted[layer] = set(), set()
        if self.residency.streaming:
            unneeded = self._buffered[layer] - int((~routed.held).sum())
            self.link.traffic.wasted += unneeded * self._chunks
        plan = self.residency.fetch_plan(layer)
        if leads or len(keys) or len(plan):
            self._decide()
        self.measured.steps["skipped"][step] += np.count_nonzero(plan[:, KIND] == SKIPPED)
        return Share(routed, hit, plan)

    def submit(self, share: Share) -> None:
        """Copies of a layer-step: demand, streams and prefetches."""
        if self.residency.streaming:
            return
        demand, share.streams = self._demand(share.routed, share.hit, share.plan)
        # prefetches before demand is sent: while its bytes come from the SSD the link is free
        self._prefetch(share.plan, share.routed.layer)
        share.demand = [Arrival(self.link.demand(copy.key, copy.at), copy.tokens, copy.key) for copy in demand]
        share.demand.sort(key=lambda arrival: arrival.at)

    def compute(self, share: Share, now: int) -> int:
        """Experts of a layer-step; returns the exposed wait."""
        if self.residency.streaming:
            return self._compute_streamed(share, now)
        routed, hit = share.routed, share.hit
        hits = Wave(now, int(hit.sum()), int(routed.tokens[hit].sum()))
        return self.waves.compute(f"layer {routed.layer}", hits, share.demand, share.streams)

    def _decide(self) -> None:
        self.device.host += self.cost.policy_ps
        self._submitted_now = 0

    def _submit(self) -> int:
        """The host submits one more copy; returns when the engine may start it."""
        self.device.host += self.cost.submit_batched_ps if self._submitted_now else self.cost.submit_ps
        self._submitted_now += 1
        return self.device.host

    def compute_beside(self, step: int, batch: Batch, shares: list[tuple[Place, Share]]) -> list[Sum]:
        """What is computed beside the devices, for all places.

        Each branch is handed over before any copy is submitted. While copies of this layer cross links they take
        their share of the host's memory.
        """
        size, sums = self.cost.model.bytes_per_expert, []
        for kind, executor in self.beside.items():
            given = [
                (place, share.routed, expert)
                for place, share in shares
                for expert in share.plan[share.plan[:, KIND] == kind, EXPERT].tolist()
            ]
            if not given:
                continue
            there, back = self.cost.activations(batch) if kind == CPU else self.cost.near_activations(batch)
            self.device.host += self.cost.submit_ps
            copied_from = [place.copied_from(share) for place, share in shares]
            work = []
            for place, routed, expert in given:
                key = routed.layer * self._experts + expert
                tier, tokens = self.reader.tier(key), int(routed.tokens[np.searchsorted(routed.needed, expert)])
                if kind == CPU:
                    took = self.cost.host_expert(tokens, copied_from, tier)
                elif tier == NEAR_TIER:
                    took = self.cost.near_expert(tokens)
                else:
                    raise ValueError(f"layer {routed.layer} expert {expert} is not in near memory")
                ready = self.reader.read(key, self.device.host)
                work.append((ready, took, f"layer {routed.layer} expert {expert}"))
                place.residency.computed(routed.layer, expert, size, took // 1000)
            done = executor.run(self.device.host + there, work)
            seen = done if kind == CPU and not self.cost.graph else 0
            sums.append(Sum(executor.track, seen, done + back))
            self.measured.steps["on_host" if kind == CPU else "near"][step] += len(given)
        return sums

    def copied_from(self, share: Share) -> set[int]:
        """The tiers from which copies of this layer-step cross the link."""
        copied = share.plan[np.isin(share.plan[:, KIND], (DEMAND, STREAM, LOW)), EXPERT]
        return {self.reader.tier(share.routed.layer * self._experts + expert) for expert in copied.tolist()}

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
