"""What every importer produces, and how it is fitted to a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from ..model_spec import ModelSpec
from ..trace import DECODE, PREFILL, Request, TraceMeta, expert_dtype


@dataclass
class Recording:
    """Rows in execution order. T tokens, L layers, K ranks; a negative expert id is an absent one."""

    experts: NDArray[Any]  # [T, L, K], any integer type
    request: NDArray[Any]  # [T]
    position: NDArray[Any]  # [T]
    phase: NDArray[Any]  # [T], PREFILL or DECODE
    step: NDArray[Any] | None = None  # [T]; None: one step per run of prefill rows and per decode row
    token: NDArray[Any] | None = None  # [T]
    attempt: NDArray[Any] | None = None  # [T]
    flags: NDArray[Any] | None = None  # [T]
    weights: NDArray[Any] | None = None  # [T, L, K]
    layers: tuple[int, ...] | None = None  # model layer of each of the L; None: all, or all that have a router
    model: str = ""  # what the recording calls its model
    experts_named: int | None = None  # how many experts per layer it says there are
    requests: tuple[Request, ...] = ()
    recorded: dict[str, Any] = field(default_factory=dict)
    licence: str = ""

    def meta(self, spec: ModelSpec, recorded: dict[str, Any]) -> TraceMeta:
        requests = self.requests or tuple(Request(int(id)) for id in np.unique(self.request))
        return TraceMeta(spec, requests, recorded, self.licence)

    def columns(self, source: Path, spec: ModelSpec) -> dict[str, NDArray[Any]]:
        """Trace columns in the model's geometry. Raises InputError where the two disagree."""
        self._refuse_other_model(source, spec)
        chosen = self._layer_order(source, spec)
        experts = self.experts[:, chosen]
        absent = experts < 0
        _refuse_unknown_experts(source, experts, spec)
        ids = expert_dtype(spec.experts)
        columns: dict[str, NDArray[Any] | None] = {
            "step": steps(self.request, self.phase) if self.step is None else self.step,
            "request": self.request,
            "position": self.position,
            "token": self.token,
            "phase": self.phase,
            "attempt": self.attempt,
            "flags": self.flags,
            "experts": np.where(absent, np.iinfo(ids).max, experts).astype(ids),
            "weights": None if self.weights is None else np.where(absent, 0, self.weights[:, chosen]),
        }
        return {name: np.asarray(array) for name, array in columns.items() if array is not None}

    def _refuse_other_model(self, source: Path, spec: ModelSpec) -> None:
        ranks = self.experts.shape[-1]
        if self.experts_named not in (None, spec.experts):
            raise InputError(
                f"{source}: the recording has {self.experts_named} experts per layer, but {spec.name} has "
                f"{spec.experts}; give the --model that was recorded"
            )
        if ranks != spec.top_k:
            raise InputError(
                f"{source}: the recording has {ranks} experts per token and layer, but {spec.name} chooses "
                f"{spec.top_k}; give the --model that was recorded"
            )

    def _layer_order(self, source: Path, spec: ModelSpec) -> list[int]:
        """Index into the recording's layers for each MoE layer of the model."""
        count = self.experts.shape[1]
        layers = self.layers
        if layers is None:
            layers = tuple(range(spec.layers)) if count == spec.layers else spec.moe_layers
        unknown = sorted(set(layers) - set(range(spec.layers)))
        missing = sorted(set(spec.moe_layers) - set(layers))
        if len(layers) != count or unknown or missing:
            odd = f"layer {unknown[0]}, which the model lacks" if unknown else f"{count} layers"
            raise InputError(
                f"{source}: the recording has {odd}, but {spec.name} has {len(spec.moe_layers)} MoE layers "
                f"({spec.moe_layers[0]} to {spec.moe_layers[-1]}); give the --model that was recorded"
            )
        dense = [index for index, layer in enumerate(layers) if layer not in spec.moe_layers]
        if (self.experts[:, dense] >= 0).any() and self.layers is not None:
            raise InputError(
                f"{source}: the recording routes layer {layers[dense[0]]}, which has no router in {spec.name}; "
                "give the --model that was recorded"
            )
        return [layers.index(layer) for layer in spec.moe_layers]


def _refuse_unknown_experts(source: Path, experts: NDArray[Any], spec: ModelSpec) -> None:
    bad = experts >= spec.experts
    if bad.any():
        row, layer, rank = (int(index[0]) for index in np.nonzero(bad))
        raise InputError(
            f"{source}: row {row}, layer {spec.moe_layers[layer]} names expert {experts[row, layer, rank]}, but "
            f"{spec.name} has experts 0 to {spec.experts - 1}; give the --model that was recorded"
        )


def steps(request: NDArray[Any], phase: NDArray[Any]) -> NDArray[np.int32]:
    """[T]: a run of prefill rows of one request is one step, every decode row a step of its own."""
    same = (request[1:] == request[:-1]) & (phase[1:] == PREFILL) & (phase[:-1] == PREFILL)
    return np.concatenate(([0], np.cumsum(~same)))[: len(request)].astype(np.int32)


def attempts(request: NDArray[Any], position: NDArray[Any]) -> NDArray[np.int16]:
    """[T]: how many earlier rows have the same request and position."""
    order = np.lexsort((np.arange(len(request)), position, request))
    ordered = np.stack((request[order], position[order]))
    first = np.concatenate(([True], (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)))[: len(request)]
    index = np.arange(len(request))
    counted = index - np.maximum.accumulate(np.where(first, index, 0))
    result = np.empty(len(request), np.int16)
    result[order] = counted
    return result


def phases(position: NDArray[Any], prompt_tokens: int) -> NDArray[np.int8]:
    """[T]: prefill below the prompt's length."""
    return np.where(position < prompt_tokens, PREFILL, DECODE).astype(np.int8)
