"""`moeflow.offload`: a transformers model whose experts move, under the same policy that the simulator replays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..errors import InputError
from ..policies.next_gate import NextGate
from ..policies.policy import Policy
from ..policies.residency import Slots
from ..traces.recorder import spec_of
from ..traces.routers import MoeLayer, family, find_stacks, is_dispatched
from ..traces.trace import TraceMeta
from .backend import DeviceBackend
from .bare_model import checkpoint_folder, load_bare, module_paths, refuse_quantised, skeleton_of
from .checkpoint import Checkpoint
from .decisions import Decisions
from .devices import backend_for, default_device
from .disk_tier import DiskTier
from .gates import Gates, distances
from .host_store import HostStore
from .implementations import implementation
from .layout import RowLayout, expert_weights, row_layout
from .live import Live
from .memory import dense_bytes, rows_in_ram, slots_for
from .passes import Passes
from .reader import Reader
from .saved_experts import SavedExperts
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
    """Serve the experts of a transformers model from a few slots; returns the model, which generates as before.

    model: a loaded model, whose experts then move out of its parameters, or a checkpoint's folder or hub id, whose
    experts are never loaded anywhere but where they stay. policy: a document, its file or a preset's name.
    budget: expert slots plus scratch as bytes ("20GiB"), slots (512), a fraction (0.25) or "auto", the device's free
    memory; or vram: the whole device ("24GiB"), less dense weights, workspace and KV for `max_context` tokens
    (default 4096). ram: host memory for experts ("4GiB"); the others are read from the checkpoint when needed.

    The result has `detach()` and is a context that detaches at its end. Raises InputError, by name, for a model,
    number format, policy or budget that cannot be served.
    """
    if isinstance(model, Offloaded):
        raise InputError("this model is offloaded already: detach it before offloading it in another way")
    chosen = servable(load_policy(policy))
    if isinstance(model, (str, Path)):
        return Offload.of_checkpoint(checkpoint_folder(model), chosen, budget, vram, ram, max_context).model
    if ram is not None:
        raise InputError("ram= leaves experts in their checkpoint: give its folder or id, not a model that is loaded")
    return Offload.of_model(model, chosen, budget, vram, max_context).model


def servable(policy: Policy) -> Policy:
    """The policy, if a model that runs can follow it. Raises InputError that says why not."""
    predictor, service, schedule = policy.predictor(), policy.miss_service(), policy.schedule()
    if schedule is not None:
        reason = "schedule: the caller of the model forms the batches"
    elif predictor is not None and not isinstance(predictor, NextGate):
        reason = "predict: only next-gate runs live so far"
    elif service.exactness == "lossy":
        reason = "miss: what changes the model's output does not run live so far"
    else:
        return policy
    kind = policy.document[reason.partition(":")[0]]["kind"]
    raise InputError(f"policy {policy.name}: {reason}, not {kind}; change that part of the document")


def load_policy(policy: Policy | str | Path | dict[str, Any]) -> Policy:
    """A checked policy from whatever `offload` accepts. Raises InputError."""
    if isinstance(policy, Policy):
        return policy
    return Policy.from_document(policy) if isinstance(policy, dict) else Policy.load(policy)


class Offload:
    """One model under offload, until `detach`. Made by `of_model` or `of_checkpoint`."""

    def __init__(
        self, model: Any, policy: Policy, slots: Slots, source: HostStore | DiskTier, layout: RowLayout,
        backend: DeviceBackend, rows: Tensor, keep_log: bool = False,
    ) -> None:  # fmt: skip
        """`rows` [slots, row bytes] on the device; the experts' parameters are on meta, their bytes in `source`."""
        self.model, self.policy, self.slots, self.source, self.layout = model, policy, slots, source, layout
        self.backend, self.family, self.moe, self.spec = backend, family(model), served_layers(model), spec_of(model)
        needs = frozenset(policy.needs) | _wanted(policy)
        meta = TraceMeta(self.spec, lookahead_distances=distances(policy, len(self.moe)))
        residency = policy.live_residency(meta, slots, COLUMNS, keep_log)
        self.transfers = Transfers(backend, source, rows)
        self.transfers.report = not residency.timing_free
        self.decisions = Decisions(residency, meta, needs, policy.predictor() is not None)
        waves = policy.document["miss"]["waves"]
        self.gates = self._gates(meta, "probs" in needs)
        self.live = Live(self.family, backend, self.decisions, self.transfers, layout, waves, self.gates)
        self._attach()

    @classmethod
    def of_model(
        cls, model: Any, policy: Policy, budget: Any, vram: str | None = None, max_context: int | None = None,
        backend: DeviceBackend | None = None, keep_log: bool = False,
    ) -> Offload:  # fmt: skip
        """Move the experts of a loaded model into host memory."""
        refuse_quantised(model.config, f"model family {family(model)}")
        moe, spec, kind = served_layers(model), spec_of(model), family(model)
        for layer in moe:
            implementation(experts_of(layer).config._experts_implementation, kind)
        layout = one_layout(moe, kind)
        backend = backend or backend_for(next(iter(expert_weights(experts_of(moe[0])).values())).device)
        dense = dense_bytes(model) - layout.size * len(moe) * spec.experts
        taken = 0 if backend.device.type == "cpu" else -layout.size * len(moe) * spec.experts
        slots = slots_for(budget, vram, max_context, policy, spec, layout.size, backend, dense, taken)
        slots = policy.live_slots(slots, spec)
        policy.live_residency(TraceMeta(spec, lookahead_distances=distances(policy, len(moe))), slots, COLUMNS)
        store, on_host = HostStore(backend, layout, spec.experts), backend.device.type == "cpu"
        try:  # on a device that holds the experts already their memory has to be had back first
            rows = backend.rows(slots.total, layout.size) if on_host else None
            store.take(moe)
            rows = backend.rows(slots.total, layout.size) if rows is None else rows
            return cls(model, policy, slots, store, layout, backend, rows, keep_log)
        except BaseException:
            store.give_back()
            raise

    @classmethod
    def of_checkpoint(
        cls, folder: Path, policy: Policy, budget: Any, vram: str | None = None, ram: str | None = None,
        max_context: int | None = None, backend: DeviceBackend | None = None, keep_log: bool = False,
    ) -> Offload:  # fmt: skip
        """Load everything but the experts, and those into host memory as far as `ram` goes."""
        skeleton = skeleton_of(folder)
        moe, spec, kind = served_layers(skeleton), spec_of(skeleton), family(skeleton)
        layout, backend = one_layout(moe, kind), backend or backend_for(default_device())
        paths = module_paths(skeleton, moe)
        saved = SavedExperts(Checkpoint(folder, skeleton, paths, spec.experts, layout), Reader())
        model = load_bare(folder, skeleton, moe, backend.device)
        taken = layout.size * len(moe) * spec.experts if backend.device.type == "cpu" and ram is None else 0
        slots = slots_for(budget, vram, max_context, policy, spec, layout.size, backend, dense_bytes(model), taken)
        slots = policy.live_slots(slots, spec)
        in_ram = rows_in_ram(ram, slots, spec, layout.size, backend.device)
        rows = backend.rows(slots.total, layout.size)
        source: HostStore | DiskTier
        if in_ram is None:
            source = HostStore(backend, layout, spec.experts)
            source.read(saved, len(moe))
            source.homes_of(served_layers(model), backend.device)
            saved.close()
        else:
            held = backend.host_rows(in_ram + 1, layout.size)
            backend.pin(held)
            source = DiskTier(backend, saved, held)
        return cls(model, policy, slots, source, layout, backend, rows, keep_log)

    @property
    def residency(self) -> Any:
        return self.decisions.residency

    def statistics(self) -> dict[str, Any]:
        """What was hit, missed, copied and waited for so far."""
        return {
            **self._disk(),
            "policy": self.policy.name,
            "exactness": self.policy.miss_service().exactness,
            "device": str(self.backend.device),
            "slots": {
                "held": self.slots.held,
                "scratch": self.slots.scratch,
                "bytes": self.slots.total * self.layout.size,
            },
            **self.live.statistics.report(),
            "notes": self._notes(),
            "decision_log_sha256": self.residency.decision_log_sha256,
        }

    def _notes(self) -> list[str]:
        """What did not go as it should, and what would change that."""
        notes = []
        if self._passes.masks_unread:
            notes.append(
                f"{self._passes.masks_unread} passes came with a mask from which padding cannot be told, so padding "
                "was counted as text: pass a two-dimensional attention_mask"
            )
        if self.transfers.lost_prefetches:
            notes.append(f"{self.transfers.lost_prefetches} prefetches could not be read from disk; see its health")
        if isinstance(self.source, DiskTier) and not self.source.statistics()["direct"]:
            notes.append("the file system refuses direct reads, so experts pass through the page cache; use another")
        return notes

    def _disk(self) -> dict[str, Any]:
        return {"disk": self.source.statistics()} if isinstance(self.source, DiskTier) else {}

    def detach(self) -> None:
        """Give the model its experts back, as it was before. Those on disk are read for it."""
        self.decisions.end()
        self.transfers.forget()
        for handle in self._handles:
            handle.remove()
        for layer in self.moe:
            del experts_of(layer).__dict__["_moeflow"]
        if isinstance(self.source, HostStore):
            self.source.give_back()
        else:
            store = HostStore(self.backend, self.layout, self.spec.experts)
            store.read(self.source.saved, len(self.moe))
            self.source.close()
            store.homes_of(self.moe, self.backend.device)
            store.give_back()
        for config, name in self._implementations.values():
            config._experts_implementation_internal = name
        self.model.__class__ = self._class
        del self.model.__dict__["_moeflow"]

    def _gates(self, meta: TraceMeta, probs: bool) -> Gates | None:
        ahead, spec = meta.lookahead_distances, self.spec
        if not ahead and not probs:
            return None
        return Gates(self.moe, self.family, spec.experts, spec.top_k, spec.routing.score, ahead, probs)

    def _attach(self) -> None:
        ALL_EXPERTS_FUNCTIONS.register(NAME, _served)
        self._implementations: dict[int, tuple[Any, str | None]] = {}
        for layer in self.moe:
            module = experts_of(layer)
            config: Any = module.config
            if id(config) not in self._implementations:
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
        self.model.__class__ = type(
            self._class.__name__, (Offloaded, self._class), {"__module__": self._class.__module__}
        )
        self.model.__dict__["_moeflow"] = self

    def mirror(self, names: str | dict[str, str]) -> None:
        """Set the implementation of every config, or of those that a dict names as transformers does."""
        for key, config in self._configs().items():
            name = names if isinstance(names, str) else names.get(key)
            if name is not None:
                implementation(name, self.family)
                self._implementations[id(config)] = config, name

    def mirrored(self) -> dict[str, str | None]:
        """As `get_experts_implementation` gives it without offload."""
        found = self._class.get_experts_implementation(self.model)
        return found | {key: self._implementations[id(config)][1] for key, config in self._configs().items()}

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """The swap of `GenerationMixin._optimize_model_for_decode`."""
        before = dict(self._implementations)
        if self.model.device.type != "cpu":
            swap = {"grouped_mm": "batched_mm"}
            self._implementations = {key: (of, swap.get(name or "", name)) for key, (of, name) in before.items()}
        try:
            yield
        finally:
            self._implementations = before

    def _configs(self) -> dict[str, Any]:
        """The configs that have experts, by the names that transformers gives them."""
        config = self.model.config
        named = {"": config, **{key: getattr(config, key, None) for key in config.sub_configs}}
        return {key: one for key, one in named.items() if id(one) in self._implementations}

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Choose which of transformers' implementations is mirrored. Raises InputError for one that cannot be."""
        _offload_of(self).mirror(experts_implementation)

    def get_experts_implementation(self) -> dict[str, str | None]:
        """Which implementations are mirrored."""
        return _offload_of(self).mirrored()

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        """`generate` computes decode steps with another implementation on accelerators; so does what mirrors it."""
        with _offload_of(self).decoding():
            yield

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise InputError("an offloaded model has no experts to save: detach it first")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to`, `half` and their like: nothing to do, or refused."""
        offload = _offload_of(self)
        held = next(one for one in offload.model.parameters() if one.device.type != "meta")
        probe = held.detach()[:0]
        moved = fn(probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise InputError(
                "an offloaded model cannot be moved or converted: detach it, do that, and offload it again"
            )
        return self


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


def experts_of(layer: MoeLayer) -> Any:
    """The experts module of a layer that `served_layers` has found."""
    assert layer.experts is not None
    return layer.experts


def one_layout(layers: tuple[MoeLayer, ...], kind: str) -> RowLayout:
    """The row of every expert of these layers. Raises InputError when they differ or cannot be moved."""
    layouts = {row_layout(expert_weights(experts_of(layer)), kind) for layer in layers}
    if len(layouts) > 1:
        raise InputError(f"model family {kind}: its layers' experts differ in shape, which slots cannot hold")
    return layouts.pop()


def _wanted(policy: Policy) -> frozenset[str]:
    parts = (policy.eviction(), policy.prefetch())
    return frozenset(name for part in parts if part is not None for name in part.wants if name in FREE)
