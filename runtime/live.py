"""One offloaded model at work: what its routers say becomes decisions, copies and products."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..policies.residency import CPU, DEMAND, EXPERT, KIND, LAYER, PREFETCH, SLOT, STREAM, FetchPlan
from .backend import DeviceBackend
from .decisions import Decision, Decisions, Said
from .gates import Gates
from .host_experts import HostExperts
from .implementations import Implementation, by_steps
from .layout import RowLayout
from .on_host import on_host
from .passes import Pass
from .serving import Serving
from .statistics import Statistics
from .transfers import Transfers


class Live:
    """Serves the experts of every MoE layer. `layout` is of a slot; `transfers` has `held` slots, then scratch."""

    def __init__(
        self, family: str, backend: DeviceBackend, decisions: Decisions, transfers: Transfers, layout: RowLayout,
        waves: str, gates: Gates | None,
    ) -> None:  # fmt: skip
        self.family, self.backend, self.decisions, self.transfers = family, backend, decisions, transfers
        self.layout, self.residency, self.waves, self.gates = layout, decisions.residency, waves, gates
        self.experts, slots = self.residency.experts, self.residency.slots
        self.scratch = range(slots.held, slots.total)
        self.weights = {name: layout.view(transfers.rows, name) for name in layout.names}
        self.statistics = Statistics(transfers.traffic)
        self._pass: Pass | None = None
        self._next_layer = 0
        self._layer_ended = 0  # ns

    def begin(self, now: Pass) -> None:
        """`model.forward` has been called."""
        self._pass, self._next_layer = now, 0
        self.statistics.passes += 1
        self._layer_ended = time.perf_counter_ns()
        if self.gates is None:
            self._begin_step(Said())

    def embedded(self, hidden: Tensor) -> None:
        """The tokens' embeddings [T, H] are about to enter the first layer."""
        if self.gates is not None and self._pass is not None:
            self._begin_step(Said(**on_host(self.gates.ahead(-1, hidden))))

    def _begin_step(self, said: Said) -> None:
        assert self._pass is not None
        self._prefetch(self.decisions.begin(self._pass, said), -1)
        self.transfers.pump()

    def compute(
        self, layer: int, module: Any, implementation: Implementation, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """The output [T, H] of MoE layer `layer` for hidden states [T, H], ids [T, K] and weights [T, K]."""
        began = time.perf_counter_ns()
        self._check(layer, hidden, ids)
        said = self._hear(layer, ids, weights)
        looked = time.perf_counter_ns()
        self.statistics.syncs += 1
        decision = self._decide(layer, said)
        serving = self._serve(layer, said, decision)
        decided = time.perf_counter_ns()
        with torch.no_grad():
            chosen = implementation if serving.host is None else by_steps
            made = chosen(module, serving, hidden, ids, weights)
        serving.done()
        if serving.host is not None:
            for expert, ns in serving.host.took:
                self.residency.computed(layer, expert, self.transfers.size, ns)
        self.transfers.pump()
        self.statistics.layer(serving, looked - began, decided - looked, time.perf_counter_ns() - decided)
        self._done(layer)
        return NoGradient.apply(made, hidden) if hidden.requires_grad and torch.is_grad_enabled() else made

    def _check(self, layer: int, hidden: Tensor, ids: Tensor) -> None:
        now = self._pass
        if now is None:
            raise InputError(
                f"model family {self.family}: experts of MoE layer {layer} ran outside of the model's own forward; "
                "call the model itself"
            )
        if layer != self._next_layer:
            raise InputError(
                f"model family {self.family}: MoE layer {layer} ran where layer {self._next_layer} was expected; "
                "offloading needs every layer once per pass, in order"
            )
        if len(ids) != now.rows or ids.ndim != 2:
            raise InputError(
                f"model family {self.family}: MoE layer {layer} routed {tuple(ids.shape)} where {now.rows} tokens "
                "were expected"
            )
        self._next_layer += 1

    def _hear(self, layer: int, ids: Tensor, weights: Tensor) -> Said:
        """What router and gates said, on the host."""
        if weights.shape[-1] != ids.shape[-1]:  # dense scores [T, E]
            weights = weights.gather(-1, ids)
        told = {"ids": ids, "weights": weights}
        if self.gates is not None:
            told |= self.gates.ahead(layer) | self.gates.scores(layer)
        return Said(**on_host(told))

    def _decide(self, layer: int, said: Said) -> Decision:
        self.transfers.pump()
        for key, ns in self.transfers.landed:
            self.residency.copied(*divmod(key, self.experts), self.transfers.size, ns)
        for late, ns in self.transfers.stalls:
            self.residency.stalled(late, ns)
            self.statistics.exposed_ns += ns
        self.transfers.landed.clear()
        self.transfers.stalls.clear()
        return self.decisions.routed(layer, said)

    def _serve(self, layer: int, said: Said, decision: Decision) -> Serving:
        """Start the copies of a layer, and say where each expert of the call will be."""
        base, plan = layer * self.experts, decision.plan
        needed = np.zeros(0, np.int32) if decision.routed is None else decision.routed.needed
        if self.transfers.expects:
            keys = set((base + needed.astype(np.int64)).tolist())
            self.transfers.settle(range(base, base + self.experts), keys)
        slot_of = self.residency.slot_of[layer].astype(np.int64)
        if not len(plan) and self._all_live() and (self.transfers.complete[slot_of[needed]] == base + needed).all():
            self.statistics.hit += len(needed)
            return self._serving(layer, said, slot_of, needed.tolist(), [], {})
        hits, arriving = self._bring(base, decision, slot_of)
        kinds = dict.fromkeys(plan[plan[:, KIND] == STREAM, EXPERT].tolist(), "stream")
        if not self._all_live():
            self._bring_for_padding(
                base, sorted(set(said.ids.ravel().tolist()) - set(needed.tolist())), slot_of, hits, arriving, kinds
            )
        if len(kinds) <= len(self.scratch):  # whole, at once and early
            for expert, slot in zip(kinds, self.scratch, strict=False):
                self.transfers.demand(base + expert, slot, kinds[expert])
                slot_of[expert] = slot
            arriving, kinds = [*arriving, *kinds], {}
        self._prefetch(plan, layer)
        serving = self._serving(layer, said, slot_of, hits, arriving, kinds)
        on_host = plan[plan[:, KIND] == CPU, EXPERT].tolist()
        if on_host:
            fetches = {expert: self.transfers.source.fetch(base + expert, True) for expert in on_host}
            serving.host = HostExperts(self.layout, fetches)
        return serving

    def _serving(
        self, layer: int, said: Said, slot_of: NDArray[np.int64], hits: list[int], arriving: list[int],
        kinds: dict[int, str],
    ) -> Serving:  # fmt: skip
        split = self.waves != "1" and bool(hits) and bool(arriving) and self.backend.asynchronous
        return Serving(
            layer, self.layout, self.weights, self.transfers, said.ids, slot_of, hits, arriving, list(kinds), kinds,
            self.scratch, split,
        )  # fmt: skip

    def _bring(self, base: int, decision: Decision, slot_of: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """Start demand copies, late experts at their place in demand order. Returns who is there and who is coming."""
        routed, plan = decision.routed, decision.plan
        if routed is None:
            return [], []
        hits = [e for e in routed.needed[routed.held].tolist() if self.transfers.has(base + e, int(slot_of[e]))]
        late = set(routed.needed[routed.held].tolist()) - set(hits)
        admitted = plan[plan[:, KIND] == DEMAND, EXPERT].tolist()
        tokens = dict(zip(routed.needed.tolist(), routed.tokens.tolist(), strict=True))
        coming = sorted([*late, *admitted], key=lambda expert: (-tokens[expert], expert))
        for expert in coming:
            self.transfers.demand(base + expert, int(slot_of[expert]))
        self.statistics.count(len(hits), len(late), decision)
        return hits, coming

    def _bring_for_padding(
        self, base: int, experts: list[int], slot_of: NDArray[np.int64], hits: list[int], arriving: list[int],
        kinds: dict[int, str],
    ) -> None:  # fmt: skip
        """Experts that only rows need which nobody reads: served from where they happen to be, never decided on."""
        for expert in experts:
            slot = int(slot_of[expert])
            if slot < 0:
                kinds[expert] = "padding"
            elif self.transfers.has(base + expert, slot):
                hits.append(expert)
            else:
                self.transfers.demand(base + expert, slot)
                arriving.append(expert)

    def _prefetch(self, plan: FetchPlan, layer: int) -> None:
        if not len(plan):
            return
        for row in plan[plan[:, KIND] == PREFETCH].tolist():
            self.transfers.prefetch(row[LAYER] * self.experts + row[EXPERT], row[SLOT], row[LAYER] != layer)

    def _all_live(self) -> bool:
        return self._pass is not None and self._pass.all_live

    def _done(self, layer: int) -> None:
        now = time.perf_counter_ns()
        self.decisions.done(layer, now - self._layer_ended)
        self._layer_ended = now


class NoGradient(torch.autograd.Function):
    """Passes a result on; a backward pass through it is refused instead of being silently wrong.

    Parameters are not frozen instead: on the CPU whether a weight wants a gradient decides how a product is folded,
    and so its bits.
    """

    @staticmethod
    def forward(ctx: Any, made: Tensor, hidden: Tensor) -> Tensor:
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InputError("offloaded experts have no gradients: detach the model before training it")
