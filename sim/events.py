"""The reference engine: SimPy is the clock, one event per layer-step.

The router's answer reaches the host at a moment that only the run itself can tell; that is what the engine yields
for. Between two such moments everything is arithmetic on integers (`Place`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
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
from ..traces.trace import DECODE, PREFILL, Trace
from .batches import Steps, recorded_steps
from .cost import Batch, CostModel, picoseconds
from .device import Span
from .measurements import Measurements
from .place import Place
from .tiers import TIERS, near_experts, tiers_of

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


class EventsEngine:
    """Replays a trace's recorded steps on one device, back to back or as requests arrive."""

    def __init__(self, setup: Setup) -> None:
        model = setup.model
        spans: list[Span] | None = [] if setup.timeline_steps else None
        self.setup, self.trace, self.residency = setup, setup.trace, setup.residency
        self.steps: Steps = recorded_steps(setup.trace)
        self.layers, self.experts = len(model.moe_layers), model.experts
        self.cost = cost = CostModel(setup.hardware, model)
        self.tiers = tiers_of(
            self.layers, self.experts, setup.experts_pinned, setup.experts_in_ram, near_experts(model, setup.hardware)
        )
        self.measured = Measurements.empty(len(self.steps), self.layers, setup.chunks)
        self.place = Place(cost, setup.residency, self.measured, setup.waves, setup.chunks, self.tiers, spans)
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
        self._beginning, self._ending = _lives(setup.trace, self.steps)
        self.progress: Callable[[int], None] = lambda steps_done: None

    def run(self) -> Measurements:
        """Simulate every step; returns what was measured."""
        environment = simpy.Environment()
        environment.process(self._serve(environment))
        environment.run()
        self.measured.compute_busy_ps = self.place.device.busy_ps
        self.measured.link_busy_ps = self.place.link.busy_until(int(environment.now))
        reader, resting = self.place.reader, np.bincount(self.tiers, minlength=len(TIERS)).tolist()
        self.measured.ssd_reads, self.measured.ssd_low_bit_reads = reader.reads, reader.low_bit_reads
        self.measured.tiers = dict(zip(TIERS, zip(resting, reader.wanted, strict=True), strict=True))
        self.measured.decision_log_sha256 = self.residency.decision_log_sha256
        self.measured.spans = self._spans or []
        return self.measured

    def _serve(self, environment: simpy.Environment) -> Clock:
        arrivals = {r.id: picoseconds(r.arrival_s) for r in self.trace.meta.requests if r.arrival_s is not None}
        for step, batch in enumerate(self.steps.batches):
            rows = slice(int(self.steps.starts[step]), int(self.steps.starts[step + 1]))
            if arrivals:
                due = max(arrivals.get(int(request), 0) for request in np.unique(self.trace.request[rows]))
                yield from _until(environment, max(due, int(environment.now)))
            if step == self.setup.timeline_steps:
                self.place.stop_spans()
            self.place.device.host = max(self.place.device.host, int(environment.now))
            self.place.note_traffic(step - 1, int(environment.now))
            self.measured.steps["start_ps"][step] = environment.now
            yield from self._step(environment, step, batch, rows)
            self.measured.steps["end_ps"][step] = environment.now
            self.progress(step + 1)
        self.place.note_traffic(len(self.steps) - 1, int(environment.now))

    def _step(self, environment: simpy.Environment, step: int, batch: Batch, rows: slice) -> Clock:
        cost, device = self.cost, self.place.device
        busy = device.busy_ps
        ids, (ahead, ahead_weights) = self.trace.experts[rows], self._lookahead(rows)
        self._form_batch(step)
        device.run(cost.embed(batch), "dense", "embedding")
        weights = self.trace.weights if "weights" in self._needs else None
        requests = self.trace.request[rows]
        phase = DECODE if self.steps.decode[step] else PREFILL
        for request in self._beginning.get(step, ()):
            self.residency.request_begins(request)
        self.residency.step_begins(
            step, self.trace.token[rows], requests, phase,
            None if ahead is None else ahead[:, 0], None if ahead_weights is None else ahead_weights[:, 0],
            self._predicted(BEFORE_FIRST_LAYER, rows),
            {name: values[rows] for name, values in self._step_columns.items()},
        )  # fmt: skip
        if self._gates:
            device.run(cost.gates(batch, self._gates), "predictor", "gates")
            yield from _until(environment, device.sync(cost.sync_ps))
        self._charge_predictor(BEFORE_FIRST_LAYER)
        self.place.before_first_layer()
        attention, router, moe = cost.attention(batch), cost.router(batch), 0
        for layer in range(self.setup.model.layers):
            device.run(attention, "dense", f"attention {layer}")
            if moe == self.layers or layer != self.setup.model.moe_layers[moe]:
                device.run(cost.dense(batch), "dense", f"feed-forward {layer}")
                continue
            device.run(router, "dense", f"router {layer}")
            if self._gates:
                device.run(cost.gates(batch, self._gates), "predictor", "gates")
            yield from _until(environment, device.sync(cost.sync_ps))
            self.place.report_copies()
            routed = self.residency.routed(
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
            self.place.layer(step, batch, routed)
            moe += 1
        device.run(cost.head(batch), "dense", "LM head")
        yield from _until(environment, device.sync(cost.sync_ps + cost.sample_ps))
        self.measured.steps["busy_ps"][step] = device.busy_ps - busy
        for request in self._ending.get(step, ()):
            self.residency.request_ends(request)

    def _form_batch(self, step: int) -> None:
        """The host decides who shares the batch; keys and values of who is new to it are copied."""
        formed = self.setup.regrouped
        if formed is None:
            return
        self.place.device.host += picoseconds(float(formed.seconds[step]))
        if formed.copied_tokens[step]:
            self.place.device.run(self.cost.merge(int(formed.copied_tokens[step])), "dense", "KV merge")

    def _lookahead(self, rows: slice) -> tuple[NDArray[Any] | None, NDArray[np.float16] | None]:
        """[T, L+1, D, K'] later gates' choices and their probabilities, where a policy reads them."""
        if "lookahead" not in self._needs or self.trace.lookahead is None:
            return None, None
        weights = self.trace.lookahead_weights
        return self.trace.lookahead[rows], None if weights is None else weights[rows]

    def _predicted(self, moment: int, rows: slice) -> Predicted | None:
        return None if self.setup.predictions is None else self.setup.predictions.at(moment, rows)

    def _charge_predictor(self, moment: int) -> None:
        """The host thread predicts before it decides."""
        if self.setup.predictions is not None and moment in self.setup.predictions.moments:
            self.place.device.host += self._predictor_ps


def _until(environment: simpy.Environment, moment: int) -> Clock:
    yield environment.timeout(moment - environment.now)


def _lives(trace: Trace, steps: Steps) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Requests by the step of their first row, and by the step of their last."""
    step = np.repeat(np.arange(len(steps)), steps.tokens)
    beginning: dict[int, list[int]] = {}
    ending: dict[int, list[int]] = {}
    requests, first = np.unique(trace.request, return_index=True)
    last = trace.rows - 1 - np.unique(trace.request[::-1], return_index=True)[1]
    for request, begins, ends in zip(requests.tolist(), step[first].tolist(), step[last].tolist(), strict=True):
        beginning.setdefault(begins, []).append(request)
        ending.setdefault(ends, []).append(request)
    return beginning, ending
