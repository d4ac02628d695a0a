"""Later layers' own gates asked early, and full router scores, of a model that runs: what some policies read.

The live counterpart of the trace's columns `lookahead`, `lookahead_weights` and `probs` (traces/recorder.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..policies.policy import Policy
from ..traces.routers import Gate, MoeLayer, Reading, score_rule

FURTHEST = 4  # layers ahead for policies that look as far as they are given. Chosen here

Hook = Callable[..., None]


def distances(policy: Policy, layers: int) -> tuple[int, ...]:
    """How many layers ahead this policy's gates are asked: 1 ... as far as it looks; none when it reads none."""
    if "lookahead" not in policy.needs:
        return ()
    prefetch = policy.prefetch()
    asked = getattr(prefetch, "distance", None) or getattr(prefetch, "reach", None) or FURTHEST
    return tuple(range(1, min(int(asked), layers) + 1))


class Gates:
    """Reads every router as the model calls it, and asks those of the next `distances` layers on the same input.

    A gate that the model has not called yet says nothing: its predictions are absent. Raises InputError, naming the
    family, where a router cannot be asked again.
    """

    def __init__(
        self,
        layers: tuple[MoeLayer, ...],
        family: str,
        experts: int,
        top_k: int,
        score: str,
        distances: tuple[int, ...],
        probs: bool,
    ) -> None:
        self.family, self.top_k, self.expected, self.distances, self.probs = family, top_k, score, distances, probs
        self.gates = [Gate(layer, family, experts) for layer in layers]
        self.layers = layers
        self._known: set[int] = set()  # gates that have reproduced their layer's own choice
        self._input: dict[int, Tensor] = {}  # layer -> its router's input [T, H] in this pass
        self._scores: dict[int, Tensor] = {}  # layer -> [T, E]

    def attach(self, embedded: Callable[[Tensor], None], first: nn.Module) -> list[Any]:
        """Hook the routers, and `first`, the layer whose input is the embedding [T, H]."""
        handles: list[Any] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or hidden.ndim != 3:
                raise InputError(f"model family {self.family}: no embedding [B, S, H] enters layer 0, so no lookahead")
            embedded(hidden.detach().reshape(-1, hidden.shape[-1]))

        handles.append(first.register_forward_pre_hook(before, with_kwargs=True))
        for gate in self.gates:
            handles.append(gate.router.register_forward_hook(self._hook(gate), with_kwargs=True))
        return handles

    def _hook(self, gate: Gate) -> Hook:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden, reading = gate.seen(args, kwargs, output)
            if gate.layer.index not in self._known:
                self._verify(gate, hidden, reading)
            if self.distances:
                self._input[gate.layer.index] = hidden.detach().clone()  # the block may go on to change it in place
            if self.probs:
                self._scores[gate.layer.index] = gate.scores(reading.logits).half()

        return hook

    def _verify(self, gate: Gate, hidden: Tensor, reading: Reading) -> None:
        gate.score = score_rule(reading, self.expected, self.family)
        again = gate(hidden.clone()) if self.distances else reading
        if not torch.equal(again.ids.sort(-1).values, reading.ids.sort(-1).values):
            raise InputError(
                f"model family {self.family}: repeating the routing of MoE layer {gate.layer.index} gives other "
                "experts, so no policy that looks ahead can run on it"
            )
        self._known.add(gate.layer.index)

    def scores(self, layer: int) -> dict[str, Tensor]:
        """`probs` [T, E] float16 of the layer that is being served, where they are kept."""
        return {"probs": self._scores.pop(layer)} if self.probs else {}

    @torch.no_grad()
    def ahead(self, source: int, hidden: Tensor | None = None) -> dict[str, Tensor]:
        """Ids (-1 absent) and float16 scores [T, D, K] of the layers after `source`; -1 is the embedding, `hidden`."""
        if not self.distances:
            return {}
        hidden = self._input.pop(source) if hidden is None else hidden
        shape = (len(hidden), len(self.distances), self.top_k)
        ids = torch.full(shape, -1, dtype=torch.int64, device=hidden.device)
        scores = torch.zeros(shape, dtype=torch.float16, device=hidden.device)
        for at, distance in enumerate(self.distances):
            target = source + distance
            if target < len(self.gates) and target in self._known:
                gate = self.gates[target]
                reading = gate(hidden)
                ids[:, at] = reading.ids
                scores[:, at] = gate.scores(reading.logits).gather(-1, reading.ids).half()
        return {"ahead": ids, "ahead_weights": scores}
