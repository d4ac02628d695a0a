"""A model that routes as a trace says, whatever its own routers think: caching behaves as on the model recorded.

The model computes everything as usual, routers included; only what they chose is replaced on its way to the experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InputError
from ..policies.policy import Policy
from ..traces.model_spec import ModelSpec
from ..traces.routers import MoeLayer
from ..traces.trace import Trace
from .gates import Gates
from .offload import Offload
from .passes import Pass


@dataclass(frozen=True)
class Turn:
    """One pass of a trace as a call of the model: B sequences, S tokens, padded on the left."""

    now: Pass
    fresh: bool  # nothing is cached: a batch begins
    tokens: Tensor  # [B, S]
    mask: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    rows: NDArray[np.int64]  # [B * S]: whose routing each row gets; padding gets that of a live row


def turns_of(trace: Trace, vocabulary: int) -> list[Turn]:
    """The passes of a trace. Raises InputError for one whose batches do not run one after the other."""
    made: list[Turn] = []
    batch: list[int] = []
    seen: set[int] = set()
    for first, last in zip(trace.step_starts[:-1].tolist(), trace.step_starts[1:].tolist(), strict=True):
        rows = {request: first + at for request, at in _rows_of(trace.request[first:last]).items()}
        fresh = not rows.keys() <= set(batch)
        if (fresh and rows.keys() & seen) or len(np.unique(trace.phase[first:last])) > 1:
            raise InputError(
                f"trace: step {trace.step[first]} mixes requests that began in different steps; regroup them with "
                "--batch 1 or more"
            )
        if fresh:
            batch = list(rows)
            seen |= rows.keys()
        made.append(_turn(trace, vocabulary, batch, rows, fresh))
    return made


def _rows_of(requests: NDArray[np.int32]) -> dict[int, NDArray[np.int64]]:
    """Request -> its rows, requests in order of appearance."""
    return {request: np.flatnonzero(requests == request) for request in dict.fromkeys(requests.tolist())}


def _turn(trace: Trace, vocabulary: int, batch: list[int], of: dict[int, NDArray[np.int64]], fresh: bool) -> Turn:
    length = max(len(rows) for rows in of.values())
    any_row = int(next(iter(of.values()))[0])
    rows, live = np.full((len(batch), length), any_row), np.zeros((len(batch), length), np.bool_)
    for at, request in enumerate(batch):
        own = of.get(request)
        if own is not None:
            rows[at, length - len(own) :], live[at, length - len(own) :] = own, True
    chosen = rows[live]
    now = Pass(
        live.shape, int(trace.phase[any_row]), live.reshape(-1), trace.token[chosen], trace.request[chosen],
        trace.position[chosen],
    )  # fmt: skip
    known = (trace.token[rows] >= 0) & (trace.token[rows] < vocabulary)
    tokens = np.where(known, trace.token[rows], rows % vocabulary).astype(np.int64)
    positions = np.where(live, trace.position[rows], 0).astype(np.int64)
    mask = live.astype(np.int64)
    whole = torch.from_numpy
    return Turn(now, fresh, whole(tokens), whole(mask), whole(positions), rows.reshape(-1))


def check_geometry(trace: Trace, model: ModelSpec, name: str) -> None:
    """Raises InputError where a trace cannot be the routing of a model."""
    recorded = trace.meta.model
    said, has = ((len(of.moe_layers), of.experts, of.top_k) for of in (recorded, model))
    if said != has:
        raise InputError(
            f"{name} has {has[0]} MoE layers of {has[1]} experts, top-{has[2]}, but the trace was recorded from "
            f"{recorded.name} with {said[0]} of {said[1]}, top-{said[2]}: give a trace of this geometry"
        )
    if (trace.experts == trace.absent).any():
        raise InputError(
            "trace: some tokens were served by fewer than top-k experts, which cannot be forced on a model"
        )


class ForcedRouting:
    """Ids and weights of `trace`, handed to a model's experts; weights are equal where none were recorded.

    Weights are handed over in float32, which holds the trace's float16 exactly, so that policies read what it says.
    """

    def __init__(self, trace: Trace, device: torch.device) -> None:
        self.trace, self.device = trace, device
        self.turn: Turn | None = None
        self._gates_say: tuple[str, ...] = ()
        self._here: dict[str, Tensor] = {}  # [L, T, ...] of the pass, by column

    def begin(self, turn: Turn) -> None:
        """The next call of the model is this pass."""
        self.turn = turn
        trace, self._here = self.trace, {}
        for name in ("experts", "weights", *self._gates_say):
            values = getattr(trace, name)
            if values is not None:
                self._here[name] = self._on_device(values[turn.rows].swapaxes(0, 1))
        if trace.weights is None:
            ids = self._here["experts"]
            self._here["weights"] = torch.full(ids.shape, 1 / ids.shape[-1], device=self.device)
        self._here["weights"] = self._here["weights"].float()

    def column(self, name: str, at: int) -> Tensor:
        """[T, ...] of the pass on the device: a column of the trace at its index `at`; ids of absent choices are -1."""
        return self._here[name][at]

    def _on_device(self, values: NDArray[Any]) -> Tensor:
        if values.dtype.kind == "u":
            values = np.where(values == self.trace.absent, -1, values.astype(np.int64))
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    @contextmanager
    def on(self, layers: tuple[MoeLayer, ...]) -> Iterator[None]:
        """Within the block a model with these MoE layers routes as the trace says."""
        handles = [self._hook(layer) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def told_to(self, offload: Offload) -> None:
        """An offloaded model's decisions see the trace's requests, tokens and predictions, as the simulator's do."""
        offload._passes.begin = lambda given: self._pass()  # type: ignore[method-assign]
        if offload.gates is not None:
            offload.live.gates = ForcedGates(offload.gates, self)
            self._gates_say = ("lookahead", "lookahead_weights", "probs")

    def _pass(self) -> Pass:
        assert self.turn is not None
        return self.turn.now

    def _hook(self, layer: MoeLayer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
            hidden, ids, weights, *more = (*args, *kwargs.values())
            forced, chosen = self.column("weights", layer.index), self.column("experts", layer.index)
            if weights.shape[-1] != ids.shape[-1]:  # dense scores [T, E]
                forced = torch.zeros_like(weights, dtype=torch.float32).scatter(-1, chosen, forced)
            return (hidden, chosen, forced, *more), {}

        assert layer.experts is not None
        return layer.experts.register_forward_pre_hook(hook, with_kwargs=True)


class ForcedGates(Gates):
    """The model's gates are asked as ever, which takes its time; what they say is the trace's."""

    def __init__(self, asked: Gates, forced: ForcedRouting) -> None:
        self.asked, self.forced = asked, forced

    def scores(self, layer: int) -> dict[str, Tensor]:
        return {name: self.forced.column("probs", layer) for name in self.asked.scores(layer)}

    def ahead(self, source: int, hidden: Tensor | None = None) -> dict[str, Tensor]:
        if not self.asked.ahead(source, hidden):
            return {}
        at = [self.forced.trace.meta.lookahead_distances.index(distance) for distance in self.asked.distances]
        ids = self.forced.column("lookahead", source + 1)[:, at]
        weights = torch.ones(ids.shape, dtype=torch.float16, device=ids.device)
        if self.forced.trace.lookahead_weights is not None:
            weights = self.forced.column("lookahead_weights", source + 1)[:, at]
        return {"ahead": ids, "ahead_weights": weights}


def check_columns(trace: Trace, policy: Policy, distances: tuple[int, ...]) -> None:
    """Raises InputError where a trace lacks what the gates of a policy are to say."""
    lacking = [name for name in ("probs", "lookahead") if name in policy.needs and getattr(trace, name) is None]
    if "lookahead" in policy.needs and not set(distances) <= set(trace.meta.lookahead_distances):
        lacking = ["lookahead"]
    if lacking:
        raise InputError(
            f"policy {policy.name} needs the column {lacking[0]!r} as far as it looks, which the trace lacks: record it"
            " with `trace record --lookahead 4 --probs`, or choose another policy"
        )
