"""The engine that one writes first: a SimPy process for every missing expert, queueing for the link as a Resource.

Same decisions (`Residency`), same durations (`CostModel`), same host and device (`Device`) as the events engine, for
what it covers: recorded decode steps, an eviction policy that only waits, one wave per layer. `benchmarks/engine.py`
measures what processes per expert cost, after checking that both engines end at the same picosecond.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import simpy
from moeflow.policies.residency import DEMAND, EXPERT, KIND
from moeflow.sim.batches import recorded_steps
from moeflow.sim.cost import CostModel
from moeflow.sim.device import Device
from moeflow.sim.events import Setup


class NaiveEngine:
    """Replays `setup.trace`. Raises ValueError for a run that it does not cover."""

    def __init__(self, setup: Setup) -> None:
        residency = setup.residency
        if setup.waves != "1" or residency.prefetch is not None or not residency.timing_free:
            raise ValueError("one wave, no prefetch, no measured time")
        self.setup, self.residency, self.steps = setup, residency, recorded_steps(setup.trace)
        self.cost = CostModel(setup.hardware, setup.model)
        self.device = Device(self.cost)
        self.environment = simpy.Environment()
        self.link = simpy.Resource(self.environment, capacity=1)
        self.link_free = -1

    def run(self) -> int:
        """Simulate every step; returns picoseconds from the first step's start to the last one's end."""
        self.environment.process(self._serve())
        self.environment.run()
        return int(self.environment.now)

    def _serve(self) -> Iterator[simpy.Event]:
        for request in np.unique(self.setup.trace.request).tolist():
            self.residency.request_begins(request)
        for step, batch in enumerate(self.steps.batches):
            rows = slice(int(self.steps.starts[step]), int(self.steps.starts[step + 1]))
            yield from self._step(step, batch, self.setup.trace.experts[rows], self.setup.trace.request[rows])

    def _step(self, step: int, batch: Any, ids: Any, requests: Any) -> Iterator[simpy.Event]:
        cost, device = self.cost, self.device
        device.run(cost.embed(batch), "dense", "embedding")
        self.residency.step_begins(step, requests=requests)
        moe = 0
        for layer in range(self.setup.model.layers):
            device.run(cost.attention(batch), "dense", "attention")
            if moe == len(self.setup.model.moe_layers) or layer != self.setup.model.moe_layers[moe]:
                device.run(cost.dense(batch), "dense", "feed-forward")
                continue
            device.run(cost.router(batch), "dense", "router")
            yield self._until(device.sync(cost.sync_ps))
            yield from self._layer(moe, batch, ids[:, moe], requests)
            moe += 1
        device.run(cost.head(batch), "dense", "LM head")
        yield self._until(device.sync(cost.sync_ps + cost.sample_ps))

    def _layer(self, layer: int, batch: Any, ids: Any, requests: Any) -> Iterator[simpy.Event]:
        cost, device = self.cost, self.device
        routed = self.residency.routed(layer, ids, requests=requests)
        plan = self.residency.fetch_plan(layer)
        if (plan[:, KIND] != DEMAND).any():
            raise ValueError("a needed set does not fit its slots")
        device.host += cost.policy_ps
        copies = []
        for expert in range(len(plan)):
            device.host += cost.submit_batched_ps if expert else cost.submit_ps
            copies.append(self.environment.process(self._copy(int(plan[expert, EXPERT]), device.host)))
        if cost.model.shared_intermediate:
            device.run(cost.shared(batch), "dense", "shared experts")
        if copies:
            yield self.environment.all_of(copies)
        block = cost.experts(len(routed.needed), int(routed.tokens.sum()))
        device.run(block, "experts", "experts", int(self.environment.now))
        self.residency.layer_done(layer)

    def _copy(self, expert: int, asked: int) -> Iterator[simpy.Event]:
        """One missing expert's life."""
        yield self._until(asked)
        with self.link.request() as turn:
            yield turn
            idle = self.environment.now > self.link_free
            yield self.environment.timeout(self.cost.copy_ps + (self.cost.copy_alpha_ps if idle else 0))
            self.link_free = self.environment.now

    def _until(self, moment: int) -> simpy.Event:
        return self.environment.timeout(moment - self.environment.now)
