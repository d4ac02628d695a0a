"""The devices of a run, and what passes between them: hidden states where a layer is at home, sums of experts.

Each layer has a home, which computes all of it but the experts of others. Layer split: where two layers' homes differ
the hidden states move. Expert parallel: every device with experts to compute gets the rows of the tokens that chose
them, and its sum goes back and is added. What leaves a home goes one transfer after the other, what comes back too,
first come first served. One device passes nothing, and is what it was without this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.residency import CPU, NEAR, Residency
from ..policies.routed import Routed
from .beside import Beside
from .cost import Batch, CostModel
from .device import Device, HostThread, Span
from .measurements import Measurements
from .place import Place, Share
from .placement import Placement
from .storage import Reader
from .tiers import TIERS


class Places:
    """All places of a run, in device order; `device` is where the next block runs."""

    def __init__(
        self, cost: CostModel, residencies: Iterable[Residency], placement: Placement, measured: Measurements,
        waves: str, chunks: int, tiers: NDArray[np.int8], spans: list[Span] | None,
    ) -> None:  # fmt: skip
        residencies, thread = list(residencies), HostThread()
        if len(residencies) > 1 and any(residency.prefill for residency in residencies):
            raise ValueError("whole layers are streamed to one device")
        bits = getattr(residencies[0].miss_service, "bits", None)
        reader = Reader(cost, tiers, 0 if bits is None else cost.low_bit_read(bits))
        self.cost, self.measured, self.placement, self.reader, self.thread = cost, measured, placement, reader, thread
        self._beside = {CPU: Beside("CPU experts", spans), NEAR: Beside("near memory", spans)}
        self._resting = np.bincount(tiers, minlength=len(TIERS)).tolist()
        self.all = [
            Place(cost, residency, measured, waves, chunks, tiers, reader, spans, thread, self._beside, index)
            for index, residency in enumerate(residencies)
        ]
        self._homes = [self.all[device] for device in sorted(set(placement.home))]
        self._home = self.all[placement.home[0]]
        self._sent = self._received = 0  # when the last transfer out of a home, and into one, is complete
        self._layer_ended = 0
        self._spans = spans

    @property
    def device(self) -> Device:
        return self._home.device

    @property
    def busy_ps(self) -> int:
        """Of the devices that run whole layers."""
        return sum(place.device.busy_ps for place in self._homes)

    @property
    def decision_log_sha256(self) -> str:
        """Of one place its own; of several the digest of theirs, in device order."""
        digests = [place.residency.decision_log_sha256 for place in self.all]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def close(self, end: int) -> None:
        """The run ended at `end`: what was measured per device goes into the measurements."""
        for place in self.all:
            place.close(end)
        measured = self.measured
        measured.devices = [place.own for place in self.all]
        measured.compute_busy_ps = sum(device.compute_busy_ps for device in measured.devices)
        measured.link_busy_ps = sum(device.link_busy_ps for device in measured.devices)
        measured.ssd_reads, measured.ssd_low_bit_reads = self.reader.reads, self.reader.low_bit_reads
        measured.tiers = dict(zip(TIERS, zip(self._resting, self.reader.wanted, strict=True), strict=True))
        measured.decision_log_sha256 = self.decision_log_sha256

    def stop_spans(self) -> None:
        """Keep no more spans for the timeline."""
        self._spans = None
        for place in self.all:
            place.stop_spans()
        for executor in self._beside.values():
            executor.stop_spans()

    def note_traffic(self, step: int, now: int) -> None:
        """What the links have sent until `now` belongs to `step`."""
        for place in self.all:
            place.note_traffic(step, now)

    def request_begins(self, request: int) -> None:
        for place in self.all:
            place.residency.request_begins(request)

    def request_ends(self, request: int) -> None:
        for place in self.all:
            place.residency.request_ends(request)

    def step_begins(self, *event: Any) -> None:
        """The arguments of `Residency.step_begins`, for every place; the first layer's home comes next."""
        for place in self.all:
            place.residency.step_begins(*event)

    def before_first_layer(self) -> None:
        """Carry out what is decided when a step begins."""
        for place in self.all:
            place.before_first_layer()

    def go_home(self, layer: int, step: int, batch: Batch) -> Device:
        """The device of model layer `layer`, to which the hidden states have moved; layer 0 starts from token ids."""
        before, self._home = self._home, self.all[self.placement.home[layer]]
        if layer and self._home is not before:
            self.thread.at += self.cost.submit_ps
            ready = max(before.device.free, self.thread.at)
            arrived = ready + self.cost.peer(batch.tokens)
            self._note(ready, arrived, f"hidden states to {self._home.index}")
            able = max(before.device.free, self.thread.at + self.cost.issue_ps + self.cost.launch_latency_ps)
            self.measured.steps["peer_ps"][step] += max(0, arrived - able)
            self._home.device.free = arrived
        return self._home.device

    def routed(self, layer: int, *event: Any) -> list[Routed]:
        """The arguments of `Residency.routed`, for every place; what each needs of the layer."""
        for place in self.all:
            place.report_copies()
        return [place.residency.routed(layer, *event) for place in self.all]

    def layer(self, step: int, batch: Batch, routed: list[Routed]) -> None:
        """The router has spoken and the sets are classified: plan, copy, compute, add."""
        home, cost, now = self._home, self.cost, self.thread.at
        layer = routed[0].layer
        order = [home, *(place for place in self.all if place is not home)]
        shares = [(place, place.share(step, routed[place.index], now, place is home)) for place in order]
        beside = home.compute_beside(step, batch, shares)
        others = [(place, share, self._send(place, share)) for place, share in shares[1:] if share.computes]
        for place, share in shares:
            place.submit(share)
        results = [self._compute_elsewhere(place, share, now, rows) for place, share, rows in others]
        if cost.model.shared_intermediate:
            home.device.run(cost.shared(batch), "dense", "shared experts")
        waits = {home.index: home.compute(shares[0][1], now)}
        home.stream_on(shares[0][1])
        waits |= {index: wait for _, index, _, wait in results}
        received, last = self._receive(results)
        wait = waits[home.index]
        if beside or results:
            block = cost.add(batch, len(results) + len(beside))
            source = "others" if results else beside[0].track
            beside_done = max((each.done for each in beside), default=0)
            held_up = home.device.hold_up(max((each.seen for each in beside), default=0))
            idle = home.device.run(block, "experts", f"layer {layer} from {source}", max(beside_done, received))
            for_beside = bool(beside) and beside_done >= received
            for_experts = idle if for_beside else min(idle, last)
            self.measured.steps["peer_ps"][step] += idle - for_experts
            wait += held_up + for_experts
        waits[home.index] = wait
        self.measured.steps["wait_ps"][step] += wait
        took = home.device.free - self._layer_ended
        self._layer_ended = home.device.free
        for place, _ in shares:
            place.residency.stalled(layer, waits.get(place.index, 0) // 1000)
            place.residency.layer_done(layer, took // 1000)

    def _send(self, place: Place, share: Share) -> int:
        """The rows of the tokens that chose experts of `place` leave for it; returns how many they are."""
        mine = np.append(self.placement.owner[share.routed.layer] == place.index, False)
        ids = np.minimum(share.routed.ids, len(mine) - 1)
        rows = int(mine[ids].any(axis=1).sum())
        self.thread.at += self.cost.submit_ps
        begins = max(self._sent, self.thread.at)
        self._sent = begins + self.cost.peer(rows)
        place.device.free = max(place.device.free, self._sent)
        self._note(begins, self._sent, f"{rows} rows to {place.index}")
        return rows

    def _compute_elsewhere(self, place: Place, share: Share, now: int, rows: int) -> tuple[int, int, int, int]:
        """(when its sum may leave, device, rows, exposed wait)."""
        wait = place.compute(share, now)
        self.thread.at += self.cost.submit_ps
        return max(self.thread.at, place.device.free), place.index, rows, wait

    def _receive(self, results: list[tuple[int, int, int, int]]) -> tuple[int, int]:
        """When the last sum is there, and how long its device had waited for experts; (0, 0) without any."""
        received = last = 0
        for ready, index, rows, wait in sorted(results):
            begins = max(self._received, ready)
            received = self._received = begins + self.cost.peer(rows)
            last = wait
            self._note(begins, received, f"{rows} rows from {index}")
        return received, last

    def _note(self, start: int, end: int, label: str) -> None:
        if self._spans is not None:
            self._spans.append((start, end, "between devices", label))
