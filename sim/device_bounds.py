"""The two bounds of `bounds.py` for several devices.

*Resident*: every device holds its experts; no read-back, decision, copy or further wave. The same blocks run in the
run's order on the same devices, and what passes between devices takes its time: ends are max-plus in their inputs, so
taking things away can only make a step shorter.

*Clairvoyant*: the needs of one device's experts, with that device's slots and its link, bound the whole run, because
no other link carries them. Each device gives a bound; the largest is taken. Copies that the best choice of every
device needs add up, since no expert is on two devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..policies.future import Future
from ..traces.model_spec import ModelSpec
from ..traces.trace import Trace
from .batches import Steps
from .bounds import Clairvoyant, clairvoyant, routed_work
from .cost import Batch, Block, CostModel
from .device import after
from .placement import Placement


def resident_steps_on(
    placement: Placement, trace: Trace, model: ModelSpec, steps: Steps, cost: CostModel, on_host: bool = False
) -> NDArray[np.int64]:
    """[S] picoseconds: each step with everything resident; without its experts if the host may compute those."""
    shape = (placement.devices, len(steps), len(model.moe_layers))
    distinct, assignments, rows = (np.zeros(shape, np.int64) for _ in range(3))
    for device, its in enumerate(_parts(placement, trace)):
        distinct[device], assignments[device] = routed_work(its.experts, steps.starts, model.experts)
        rows[device] = np.add.reduceat((its.experts < model.experts).any(axis=2), steps.starts[:-1], axis=0)
    distinct *= not on_host
    return np.array(
        [
            _Step(placement, model, cost, batch).run(distinct[:, step], assignments[:, step], rows[:, step])
            for step, batch in enumerate(steps.batches)
        ],
        np.int64,
    )


def clairvoyant_on(
    placement: Placement, trace: Trace, steps: Steps, counted: NDArray[np.bool_], resident_ps: NDArray[np.int64],
    slots: list[int], copy_ps: int,
) -> list[Clairvoyant]:  # fmt: skip
    """One bound per device, each with its own `slots` slots; every one of them holds for the whole run."""
    return [
        clairvoyant(its, Future(its), steps, counted, resident_ps, held, copy_ps)
        for its, held in zip(_parts(placement, trace), slots, strict=True)
    ]


def _parts(placement: Placement, trace: Trace) -> Iterator[Trace]:
    """The trace with the experts of one device, the others absent; for each device in turn."""
    experts = trace.meta.model.experts
    owner = np.append(placement.owner, np.full((len(placement.owner), 1), -1), axis=1)
    of_id = owner[np.arange(len(owner))[:, None], np.minimum(trace.experts, experts)]
    for device in range(placement.devices):
        mine = np.where(of_id == device, trace.experts, trace.absent).astype(trace.experts.dtype)
        yield replace(trace, experts=mine)


@dataclass
class _Step:
    """One step in the order in which `Places` runs it. With graphs one launch carries all of it."""

    placement: Placement
    model: ModelSpec
    cost: CostModel
    batch: Batch

    def __post_init__(self) -> None:
        cost = self.cost
        self.host, self.sent, self.received = 0, 0, 0
        started = cost.issue_ps + cost.launch_latency_ps if cost.graph else 0
        self.issue, self.latency = (0, 0) if cost.graph else (cost.issue_ps, cost.launch_latency_ps)
        self.free = [started] * self.placement.devices

    def run(self, distinct: NDArray[np.int64], assignments: NDArray[np.int64], rows: NDArray[np.int64]) -> int:
        """Picoseconds. [devices, MoE layers]: distinct experts, (token, expert) pairs, tokens with either."""
        cost, batch, model = self.cost, self.batch, self.model
        home, moe = self.placement.home[0], 0
        self._issue(home, cost.embed(batch))
        for layer in range(model.layers):
            before, home = home, self.placement.home[layer]
            if home != before:
                self.free[home] = max(self.free[before], self.host) + cost.peer(batch.tokens)
            self._issue(home, cost.attention(batch))
            if moe == len(model.moe_layers) or layer != model.moe_layers[moe]:
                self._issue(home, cost.dense(batch))
                continue
            self._issue(home, cost.router(batch))
            self._experts(home, distinct[:, moe].tolist(), assignments[:, moe].tolist(), rows[:, moe].tolist())
            moe += 1
        self._issue(home, cost.head(batch))
        return max(self.host, self.free[home]) + cost.sync_ps + cost.sample_ps

    def _experts(self, home: int, distinct: list[int], assignments: list[int], rows: list[int]) -> None:
        cost = self.cost
        others = [device for device in range(len(distinct)) if distinct[device] and device != home]
        for device in others:
            self.sent = max(self.sent, self.free[home]) + cost.peer(rows[device])
            self.free[device] = max(self.free[device], self.sent)
        for device in others:
            self._issue(device, cost.experts(distinct[device], assignments[device]))
        if self.model.shared_intermediate:
            self._issue(home, cost.shared(self.batch))
        if distinct[home]:
            self._issue(home, cost.experts(distinct[home], assignments[home]))
        for ready, device in sorted((self.free[device], device) for device in others):
            self.received = max(self.received, ready) + cost.peer(rows[device])
        if others:
            self._issue(home, cost.add(self.batch, len(others)), self.received)

    def _issue(self, device: int, block: Block, ready: int = 0) -> None:
        self.host, self.free[device] = after(
            block, self.host, self.free[device], self.issue, self.latency, ready
        )  # fmt: skip
