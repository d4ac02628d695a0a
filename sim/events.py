"""The reference engine: SimPy is the clock, one event per layer-step.

The router's answer reaches the host at a moment that only the run itself can tell; that is what the engine yields
for. Between two such moments everything is arithmetic on integers (`Place`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from ..hwprofiles.profile import Hardware
from ..policies.predictor import Predicted, Predictions
from ..policies.prefetch import BEFORE_FIRST_LAYER
from ..policies.residency import Residency
from ..policies.schedule import Regrouped
from ..traces.model_spec import ModelSpec
from ..traces.trace import Trace
from .batches import Steps, recorded_steps
from .cost import CostModel, picoseconds
from .device import Span
from .feed import ContinuousFeed, Formed, RecordedFeed, Rows
from .measurements import Measurements
from .placement import Placement, one_device
from .places import Places
from .tiers import near_experts, tiers_of

PER_LAYER = {"candidates", "candidate_logits", "probs"}  # optional columns with one entry per MoE layer
PER_STEP = {"embedding"}  # and those known when a step begins

Clock = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Setup:
    """Everything one run is made of."""

    trace: Trace
    model: ModelSpec  # its sizes price the run; its geometry is the trace's
    hardware: Hardware
    residency: Residency
    waves: str = "auto"
    chunks: int = 3  # per expert copy; a chunk is not pre-empted
    experts_pinned: int | None = None  # of those in host memory; the others there are pageable; None: all
    experts_in_ram: int | None = None  # of those not in near memory; the others rest on the SSD; None: all
    timeline_steps: int = 0  # spans are kept for the first so many steps
    predictions: Predictions | None = None
    predictor_gates: int = 0  # router evaluations of one prediction
    predictor_s: float = 0.0  # host time of one prediction
    regrouped: Regrouped | None = None  # how `trace` came to have its steps, where a schedule formed them
    placement: Placement | None = None  # who does what of several devices; None: one device
    others: tuple[Residency, ...] = ()  # of the devices 1, 2 ...
    token_budget: int | None = None  # of a step in continuous batching; None: the trace's own steps

    @property
    def residencies(self) -> tuple[Residency, ...]:
        """One per device."""
        return (self.residency, *self.others)

    @property
    def tiers(self) -> NDArray[np.int8]:
        """[layers * experts]: where each expert rests while no slot holds it."""
        model = self.model
        near = near_experts(model, self.hardware)
        return tiers_of(len(model.moe_layers), model.experts, self.experts_pinned, self.experts_in_ram, near)

    @property
    def kv_room(self) -> int:
        """Tokens of KV cache for which one device has memory beside dense weights, workspace and slots."""
        model, device = self.model, self.hardware.device
        used = device.reserve_bytes + model.dense_bytes + self.residency.slots.total * model.bytes_per_expert
        return (device.memory_bytes - used) // max(1, model.kv_bytes_per_token)


class EventsEngine:
    """Replays a trace on one device or several, in its recorded steps or in those that requests form as they arrive."""

    def __init__(self, setup: Setup) -> None:
        model = setup.model
        spans: list[Span] | None = [] if setup.timeline_steps else None
        self.setup, self.trace, self.residency = setup, setup.trace, setup.residency
        self.steps: Steps = recorded_steps(setup.trace)
        self.feed: RecordedFeed | ContinuousFeed = RecordedFeed(setup.trace, self.steps)
        most_steps = len(self.steps)
        if setup.token_budget is not None:
            self.feed = ContinuousFeed(setup.trace, setup.token_budget, setup.kv_room)
            most_steps = setup.trace.rows
        self.layers, self.experts = len(model.moe_layers), model.experts
        self.cost = cost = CostModel(setup.hardware, model, len(setup.residencies))
        self.measured = Measurements.empty(most_steps, self.layers, setup.chunks)
        self.places = Places(
            cost, setup.residencies, setup.placement or one_device(model), self.measured,
            setup.waves, setup.chunks, setup.tiers, spans,
        )  # fmt: skip
        self._spans = spans
        self._gates = self.residency.prefetch.gates if self.residency.prefetch else 0
        self._gates += setup.predictor_gates
        self._predictor_ps = picoseconds(setup.predictor_s)
        policies = (self.residency.eviction, self.residency.prefetch, self.residency.miss_service)
        self._needs = {name for policy in policies if policy is not None for name in policy.needs}
        wanted = {name for policy in policies[:2] if policy is not None for name in policy.wants}
        self._needs |= {name for name in wanted if getattr(self.trace, name, None) is not None}
        self._columns = {name: getattr(self.trace, name) for name in sorted(self._needs & PER_LAYER)}
        self._step_columns = {name: getattr(self.trace, name) for name in sorted(self._needs & PER_STEP)}
        self.progress: Callable[[int], None] = lambda tokens_done: None

    def run(self) -> Measurements:
        """Simulate every step; returns what was measured.

        `setup` and `steps` are then those of the batches that were formed.
        """
        environment = simpy.Environment()
        environment.process(self._serve(environment))
        environment.run()
        self.places.close(int(environment.now))
        self.measured.spans = self._spans or []
        if isinstance(self.feed, ContinuousFeed):
            self.setup = replace(self.setup, trace=self.feed.trace())
            self.steps = recorded_steps(self.setup.trace)
            self.measured.steps = {name: of_step[: len(self.steps)] for name, of_step in self.measured.steps.items()}
            self.measured.most_keys = self.feed.most_keys
        return self.measured

    def first_spans(self) -> list[Span]:
        """What a timeline shows of the first steps, of a run that ends with them."""
        environment = simpy.Environment()
        environment.process(self._serve(environment, self.setup.timeline_steps))
        environment.run()
        return self._spans or []

    def _serve(self, environment: simpy.Environment, most_steps: int | None = None) -> Clock:
        step = tokens = 0
        while step != most_steps and (formed := self.feed.next(int(environment.now))) is not None:
            yield from _until(environment, formed.start_ps)
            if step == self.setup.timeline_steps:
                self.places.stop_spans()
            self.places.thread.at = max(self.places.thread.at, int(environment.now))
            self.places.note_traffic(step - 1, int(environment.now))
            self.measured.steps["start_ps"][step] = environment.now
            yield from self._step(environment, step, formed)
            self.measured.steps["end_ps"][step] = environment.now
            step, tokens = step + 1, tokens + formed.batch.tokens
            self.progress(tokens)
        self.places.note_traffic(step - 1, int(environment.now))

    def _step(self, environment: simpy.Environment, step: int, formed: Formed) -> Clock:
        batch, rows = formed.batch, formed.rows
        cost, device = self.cost, self.places.go_home(0, step, batch)
        busy = self.places.busy_ps
        ids, (ahead, ahead_weights) = self.trace.experts[rows], self._lookahead(rows)
        self._form_batch(step)
        device.run(cost.embed(batch), "dense", "embedding")
        weights = self.trace.weights if "weights" in self._needs else None
        requests = self.trace.request[rows]
        for request in formed.beginning:
            self.places.request_begins(request)
        self.places.step_begins(
            step, self.trace.token[rows], requests, formed.phase,
            None if ahead is None else ahead[:, 0], None if ahead_weights is None else ahead_weights[:, 0],
            self._predicted(BEFORE_FIRST_LAYER, rows),
            {name: values[rows] for name, values in self._step_columns.items()},
        )  # fmt: skip
        if self._gates:
            device.run(cost.gates(batch, self._gates), "predictor", "gates")
            yield from _until(environment, device.sync(cost.sync_ps))
        self._charge_predictor(BEFORE_FIRST_LAYER)
        self.places.before_first_layer()
        attention, router, moe = cost.attention(batch), cost.router(batch), 0
        for layer in range(self.setup.model.layers):
            device = self.places.go_home(layer, step, batch)
            device.run(attention, "dense", f"attention {layer}")
            if moe == self.layers or layer != self.setup.model.moe_layers[moe]:
                device.run(cost.dense(batch), "dense", f"feed-forward {layer}")
                continue
            device.run(router, "dense", f"router {layer}")
            if self._gates:
                device.run(cost.gates(batch, self._gates), "predictor", "gates")
            yield from _until(environment, device.sync(cost.sync_ps))
            routed = self.places.routed(
                moe,
                ids[:, moe],
                None if weights is None else weights[rows, moe],
                requests,
                None if ahead is None else ahead[:, moe + 1],
                {name: values[rows, moe] for name, values in self._columns.items()},
                None if ahead_weights is None else ahead_weights[:, moe + 1],
                self._predicted(moe, rows),
            )
            self._charge_predictor(moe)
            self.places.layer(step, batch, routed)
            moe += 1
        device.run(cost.head(batch), "dense", "LM head")
        yield from _until(environment, device.sync(cost.sync_ps + cost.sample_ps))
        self.measured.steps["busy_ps"][step] = self.places.busy_ps - busy
        for request in formed.ending:
            self.places.request_ends(request)

    def _form_batch(self, step: int) -> None:
        """The host decides who shares the batch; keys and values of who is new to it are copied."""
        formed = self.setup.regrouped
        if formed is None:
            return
        self.places.thread.at += picoseconds(float(formed.seconds[step]))
        if formed.copied_tokens[step]:
            self.places.device.run(self.cost.merge(int(formed.copied_tokens[step])), "dense", "KV merge")

    def _lookahead(self, rows: Rows) -> tuple[NDArray[Any] | None, NDArray[np.float16] | None]:
        """[T, L+1, D, K'] later gates' choices and their probabilities, where a policy reads them."""
        if "lookahead" not in self._needs or self.trace.lookahead is None:
            return None, None
        weights = self.trace.lookahead_weights
        return self.trace.lookahead[rows], None if weights is None else weights[rows]

    def _predicted(self, moment: int, rows: Rows) -> Predicted | None:
        return None if self.setup.predictions is None else self.setup.predictions.at(moment, rows)

    def _charge_predictor(self, moment: int) -> None:
        """The host thread predicts before it decides."""
        if self.setup.predictions is not None and moment in self.setup.predictions.moments:
            self.places.thread.at += self._predictor_ps


def _until(environment: simpy.Environment, moment: int) -> Clock:
    yield environment.timeout(moment - environment.now)
