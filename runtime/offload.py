"""`moeflow.offload`: a transformers model whose experts move, under the same policy that the simulator replays."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import InputError
from ..policies.budget import slots_for_budget
from ..policies.next_gate import NextGate
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..policies.wait import Wait
from ..traces.recorder import spec_of
from ..traces.routers import MoeLayer, family, find_stacks, is_dispatched
from ..traces.trace import TraceMeta
from .backend import DeviceBackend, HostBackend
from .decisions import Decisions
from .gates import Gates, distances
from .host_store import HostStore
from .implementations import implementation
from .layout import RowLayout, expert_weights, row_layout
from .live import Live
from .passes import Passes
from .transfers import Transfers

NAME = "moeflow"  # of the experts implementation that transformers is given
COLUMNS = ("weights", "lookahead", "probs")  # of a trace that a running model supplies
FREE = ("weights",)  # at no cost, so to whoever can use them


def offload(
    model: Any,
    policy: Policy | str | Path | dict[str, Any] = "lru",
    budget: str | float | int = "auto",
    *,
    vram: str | None = None,
    ram: str | None = None,
    max_context: int | None = None,
) -> Any:
    """Move the experts of `model` out of its parameters and serve them from slots; returns the model."""
    chosen = servable(load_policy(policy))
    return Offload(model, chosen, budget, HostBackend()).model


def servable(policy: Policy) -> Policy:
    """The policy, if a model that runs can follow it. Raises InputError that says why not."""
    predictor, service, schedule = policy.predictor(), policy.miss_service(), policy.schedule()
    kind = {"miss": service, "predict": predictor, "schedule": schedule}
    if schedule is not None:
        reason = "schedule: the caller of the model forms the batches"
    elif predictor is not None and not isinstance(predictor, NextGate):
        reason = "predict: only next-gate runs live so far"
    elif not isinstance(service, Wait):
        reason = "miss: only wait runs live so far"
    elif policy.split != "uniform":
        reason = "cache.split: only uniform runs live so far"
    else:
        return policy
    part = reason.partition(":")[0].partition(".")[0]
    what = f" {policy.document[part]['kind']}" if part in kind else f" {policy.split}"
    raise InputError(f"policy {policy.name}: {reason}, not{what}; change that part of the document")


def load_policy(policy: Policy | str | Path | dict[str, Any]) -> Policy:
    """A checked policy from whatever `offload` accepts. Raises InputError."""
    if isinstance(policy, Policy):
        return policy
    return Policy.from_document(policy) if isinstance(policy, dict) else Policy.load(policy)


class Offload:
    """One model under offload, until `detach`."""

    def __init__(self, model: Any, policy: Policy, budget: Any, backend: DeviceBackend, keep_log: bool = False) -> None:
        self.model, self.policy, self.backend = model, policy, backend
        self.family, self.moe = family(model), served_layers(model)
        self.spec = spec_of(model)
        weights = [expert_weights(self._experts(layer)) for layer in self.moe]
        self.layout = self._one_layout(weights)
        self.slots = self._slots(budget)
        needs = frozenset(policy.needs) | _wanted(policy)
        meta = TraceMeta(self.spec, lookahead_distances=distances(policy, len(self.moe)))
        residency = policy.live_residency(meta, self.slots, COLUMNS, keep_log)
        self.store = HostStore(backend, self.layout, self.spec.experts)
        rows = backend.rows(self.slots.total, self.layout.size)
        self._move_out(weights)
        self.transfers = Transfers(backend, self.store, rows)
        self.transfers.report = not residency.timing_free
        self.decisions = Decisions(residency, meta, needs, policy.predictor() is not None)
        waves = policy.document["miss"]["waves"]
        self.gates = self._gates(meta, "probs" in needs)
        self.live = Live(self.family, backend, self.decisions, self.transfers, self.layout, waves, self.gates)
        self._attach()

    @property
    def residency(self) -> Any:
        return self.decisions.residency

    def statistics(self) -> dict[str, Any]:
        """What was hit, missed, copied and waited for so far."""
        return {
            "policy": self.policy.name,
            "exactness": self.policy.miss_service().exactness,
            "device": str(self.backend.device),
            "slots": {"held": self.slots.held, "scratch": self.slots.scratch, "bytes": self.slots.total * self.layout.size},
            **self.live.statistics.report(),
            "decision_log_sha256": self.residency.decision_log_sha256,
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def detach(self) -> None:
        """Give the model its experts back, as it was before."""
        for handle in self._handles:
            handle.remove()
        self.decisions.end()
        self.transfers.forget()
        for layer in self.moe:
            del self._experts(layer).__dict__["_moeflow"]
        self._move_back()
        for config, name in self._implementations.values():
            config._experts_implementation_internal = name
        self.model.__class__ = self._class
        del self.model.__dict__["_moeflow"]

    def _experts(self, layer: MoeLayer) -> nn.Module:
        assert layer.experts is not None
        return layer.experts

    def _one_layout(self, weights: list[dict[str, Tensor]]) -> RowLayout:
        layouts = {row_layout(of_layer, self.family) for of_layer in weights}
        if len(layouts) > 1:
            raise InputError(f"model family {self.family}: its layers' experts differ in shape, which slots cannot hold")
        return layouts.pop()

    def _gates(self, meta: TraceMeta, probs: bool) -> Gates | None:
        ahead, spec = meta.lookahead_distances, self.spec
        if not ahead and not probs:
            return None
        return Gates(self.moe, self.family, spec.experts, spec.top_k, spec.routing.score, ahead, probs)

    def _slots(self, budget: Any) -> Slots:
        return slots_for_budget(budget, self.spec, self.policy.scope, self.policy.scratch, self.layout.size)

    @torch.inference_mode(False)  # what is made here is used outside of inference mode too
    @torch.no_grad()
    def _move_out(self, weights: list[dict[str, Tensor]]) -> None:
        """Layer by layer into the store, freeing the parameters: never two copies of more than one layer."""
        self._homes: list[dict[str, tuple[torch.device, bool]]] = []
        try:
            for layer, of_layer in zip(self.moe, weights, strict=True):
                rows = self.store.add_layer()
                self._homes.append({name: (weight.device, weight.requires_grad) for name, weight in of_layer.items()})
                for name in list(of_layer):
                    weight = of_layer.pop(name)
                    self.layout.view(rows, name).copy_(weight)
                    # On meta, not gone: whatever would read or move it fails loudly
                    setattr(self._experts(layer), name, nn.Parameter(weight.detach().to("meta"), requires_grad=False))
                self.backend.pin(rows)
        except BaseException:
            self._move_back()
            raise

    def _move_back(self) -> None:
        for layer, homes in zip(self.moe, self._homes, strict=False):
            rows = self.store.layers[layer.index]
            for name, (device, wants_gradient) in homes.items():
                whole = self.layout.view(rows, name).to(device, copy=True)
                setattr(self._experts(layer), name, nn.Parameter(whole, requires_grad=wants_gradient))
            self.store.drop(layer.index)

    def _attach(self) -> None:
        ALL_EXPERTS_FUNCTIONS.register(NAME, _served)
        self._implementations: dict[int, tuple[Any, str | None]] = {}
        for layer in self.moe:
            module = self._experts(layer)
            config: Any = module.config
            if id(config) not in self._implementations:
                implementation(config._experts_implementation, self.family)
                self._implementations[id(config)] = config, config._experts_implementation
                config._experts_implementation_internal = NAME
            module.__dict__["_moeflow"] = self, layer.index
        self._passes = Passes(self.model)
        self._handles = [
            self.model.register_forward_pre_hook(self._passes.hook(self.live.begin), with_kwargs=True, prepend=True)
        ]
        if self.gates is not None:
            self._handles += self.gates.attach(self.live.embedded, find_stacks(self.model)[0].first)
        self._class = type(self.model)
        self.model.__class__ = type(self._class.__name__, (Offloaded, self._class), {"__module__": self._class.__module__})
        self.model.__dict__["_moeflow"] = self

    def compute(self, index: int, module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """One call of an experts module."""
        name = self._implementations[id(module.config)][1]
        return self.live.compute(index, module, implementation(name, self.family), hidden, ids, weights)


class Offloaded:
    """What an offloaded model can do besides what its class can: it is also a context that detaches at its end."""

    def detach(self) -> None:
        """Give the experts back to the model's parameters."""
        _offload_of(self).detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()


@torch.compiler.disable
def _served(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation that transformers calls."""
    offload, index = module.__dict__["_moeflow"]
    return offload.compute(index, module, hidden_states, top_k_index, top_k_weights)


def stats(model: Any) -> dict[str, Any]:
    """What an offloaded model did so far. Raises InputError for a model that is not offloaded."""
    return _offload_of(model).statistics()


def _offload_of(model: Any) -> Offload:
    found = getattr(model, "__dict__", {}).get("_moeflow")
    if not isinstance(found, Offload):
        raise InputError(f"{type(model).__name__} is not offloaded: pass it to moeflow.offload first")
    return found


def served_layers(model: Any) -> tuple[MoeLayer, ...]:
    """The MoE layers of a model whose experts can be served. Raises InputError, by name, for one that cannot."""
    stacks = find_stacks(model)
    layers = tuple(layer for stack in stacks for layer in stack.layers)
    strange = [layer for layer in layers if layer.experts is None or not is_dispatched(layer.experts)]
    if len(stacks) > 1 or strange:
        raise InputError(
            f"model family {family(model)} cannot be offloaded: its experts do not go through transformers' experts "
            "interface (`use_experts_implementation`)"
        )
    return layers


def _wanted(policy: Policy) -> frozenset[str]:
    parts = (policy.eviction(), policy.prefetch())
    return frozenset(name for part in parts if part is not None for name in part.wants if name in FREE)
