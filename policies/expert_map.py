"""Expert maps: how the stored forward pass went on whose routing was most like this one's so far (FineMoE, 2502.05370).

A map holds one request's gate probabilities [layers, experts] in one step, normalised per layer, its tokens added up.
Maps of finished steps are stored; after every layer the stored map nearest by cosine over the layers routed so far
(the trajectory) predicts the others. The probabilities are the trace's `probs`, else its gate `weights`, else equal
for the chosen experts.

FineMoE seeks a map for the first layers by the prompt's embedding; events carry none, so here a step's first layers
have no prediction until one is routed. Its threshold for prefetching is known only to be dynamic and higher the less
similar the match: 1 - similarity is chosen here, as are the store's size and replacing the most similar map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .compiled import compiled
from .eviction import Eviction
from .future import Future
from .prefetch import Prefetch, Proposal
from .residency import Slots
from .routed import Routed

EPSILON = 1e-3  # added to a probability, so that frequency tells experts apart that no map names


class MapStore:
    """At most `capacity` maps of L layers x E experts; when full, a new map replaces the one most like it."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 map, got {capacity}")
        self.capacity = capacity

    def start(self, meta: TraceMeta) -> None:
        layers, experts = len(meta.model.moe_layers), meta.model.experts
        self._shape = layers, experts
        self._maps = np.zeros((layers, experts, self.capacity), np.float32)
        self._lengths = np.zeros((layers, self.capacity), np.float32)  # squared, of the layers up to this one
        self._stored = 0
        self._step = -1
        self._requests = np.zeros(0, np.int32)
        self._running = np.zeros((0, layers, experts), np.float32)
        self._dots = np.zeros((0, self.capacity), np.float32)
        self._own = np.zeros(0, np.float32)

    def match(self, routed: Routed) -> NDArray[np.int64]:
        """The number of the nearest map per request of the step; -1 while none is stored."""
        if routed.requests is None:
            raise ValueError("expert-map was driven without requests")
        if routed.step != self._step:
            self._finish()
            self._step = routed.step
            self._requests = np.unique(routed.requests)
            self._running = np.zeros((len(self._requests), *self._shape), np.float32)
            self._dots = np.zeros((len(self._requests), self.capacity), np.float32)
            self._own = np.zeros(len(self._requests), np.float32)
        places = np.searchsorted(self._requests, routed.requests)
        gates = _gates(routed, self._shape[1])
        _add(gates, places, self._running[:, routed.layer])
        found = np.empty(len(self._requests), np.int64)
        self.similarity = np.empty(len(found), np.float32)
        _match(
            self._running[:, routed.layer], self._maps[routed.layer], self._lengths[routed.layer], self._stored,
            self._dots, self._own, found, self.similarity,
        )  # fmt: skip
        return found

    def layer_of(self, found: int, layer: int) -> NDArray[np.float32]:
        """[E]: the probabilities of map `found` at `layer`."""
        return self._maps[layer, :, found]

    def predicted(self, found: NDArray[np.int64]) -> NDArray[np.float32]:
        """[L, E]: the matched maps added up."""
        known = found[found >= 0]
        return self._maps[:, :, known[0]] if len(known) == 1 else self._maps[:, :, known].sum(axis=2)

    def _finish(self) -> None:
        """The step before is over: its maps are stored."""
        for place in range(len(self._requests)):
            if self._stored < self.capacity:
                at, self._stored = self._stored, self._stored + 1
            else:
                at = int(np.argmax(self._dots[place] / np.sqrt(np.maximum(self._lengths[-1], 1e-12))))
            whole = self._running[place]
            self._maps[:, :, at] = whole
            self._lengths[:, at] = np.cumsum((whole * whole).sum(axis=1))


class ExpertMap(Eviction):
    """score = (probability in the nearest maps + epsilon) * (steps that used the expert + 1).

    FineMoE evicts by probability times frequency; `capacity` maps are stored. Layers that this step has behind it are
    scored by the same map: the next step's routing there is nearest to it as far as anybody knows.
    """

    wants = ("probs", "weights")

    def __init__(self, capacity: int = 1000) -> None:
        super().__init__()
        self._store = MapStore(capacity)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        self._store.start(meta)
        self._uses = np.ones_like(self.score)

    def touch(self, routed: Routed) -> None:
        found = self._store.match(routed)
        self._uses[routed.layer, routed.needed] += 1
        np.multiply(self._store.predicted(found) + EPSILON, self._uses, out=self.score)

    def parameters(self) -> dict[str, Any]:
        return {"capacity": self._store.capacity}


class ExpertMapPrefetch(Prefetch):
    """Of the layer `distance` ahead the likeliest experts of the nearest map, at least top-k, until their share of the
    layer's probability reaches 1 - similarity.

    FineMoE pauses prefetching while a missing expert is loaded: the copy engine does that, demand going first.
    With several requests in a batch each adds its own, the likeliest of any request first.
    """

    wants = ("probs", "weights")

    def __init__(self, distance: int = 3, capacity: int = 1000) -> None:
        if distance < 1:
            raise ValueError(f"distance must be at least 1, got {distance}")
        self.distance = distance
        self._store = MapStore(capacity)

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._store.start(meta)
        self._layers, self._top_k = len(meta.model.moe_layers), meta.model.top_k

    def propose(self, routed: Routed) -> list[Proposal]:
        found, target = self._store.match(routed), routed.layer + self.distance
        if target >= self._layers or found[0] < 0:
            return []
        chances = np.zeros(self._store.layer_of(0, target).shape, np.float32)
        for number, similarity in zip(found.tolist(), self._store.similarity.tolist(), strict=True):
            _choose(self._store.layer_of(number, target), 1 - similarity, self._top_k, chances)
        best = np.argsort(-chances, kind="stable")
        return [(target, best[: np.count_nonzero(chances)].astype(np.int32))]

    def parameters(self) -> dict[str, Any]:
        return {"distance": self.distance, "capacity": self._store.capacity}


def _gates(routed: Routed, experts: int) -> NDArray[np.float32]:
    """[T, E]: each token's probabilities, adding up to 1 where it has any."""
    if "probs" in routed.columns:
        gates = routed.columns["probs"].astype(np.float32)
    else:
        gates = np.zeros((len(routed.ids), experts), np.float32)
        weights = np.ones(routed.ids.shape, np.float32) if routed.weights is None else routed.weights
        _spread(np.ascontiguousarray(routed.ids), weights.astype(np.float32), gates)
    return gates / np.maximum(gates.sum(axis=1, keepdims=True), np.float32(1e-6))


@compiled
def _spread(ids, weights, gates):  # type: ignore[no-untyped-def]
    for row in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            if ids[row, i] < gates.shape[1]:
                gates[row, ids[row, i]] += weights[row, i]


@compiled
def _add(gates, places, maps):  # type: ignore[no-untyped-def]
    """Add up the tokens of each request, then let each layer of a map add up to 1."""
    for row in range(len(gates)):
        for expert in range(gates.shape[1]):
            maps[places[row], expert] += gates[row, expert]
    for place in range(len(maps)):
        total = maps[place].sum()
        if total > 0:
            for expert in range(maps.shape[1]):
                maps[place, expert] /= total


@compiled
def _match(layer_maps, stored_layer, lengths, stored, dots, own, found, similarity):  # type: ignore[no-untyped-def]
    """Bring every request's dot products with every stored map up to date; the nearest, the lowest number on ties."""
    for place in range(len(layer_maps)):
        for expert in range(layer_maps.shape[1]):
            gate = layer_maps[place, expert]
            if gate > 0:
                own[place] += gate * gate
                for number in range(stored):
                    dots[place, number] += gate * stored_layer[expert, number]
        found[place], best = -1, -1.0
        for number in range(stored):
            cosine = dots[place, number] / np.sqrt(max(lengths[number] * own[place], 1e-12))
            if cosine > best:
                found[place], best = number, cosine
        similarity[place] = min(1.0, max(0.0, best))


@compiled
def _choose(chances, threshold, least, chosen):  # type: ignore[no-untyped-def]
    """Keep in `chosen` [E] the larger chance of each expert that is among the likeliest."""
    order = np.argsort(-chances, kind="mergesort")
    total = chances.sum()
    mass = 0.0
    for rank in range(len(order)):
        chance = chances[order[rank]]
        if chance <= 0 or (rank >= least and mass >= threshold * total):
            break
        mass += chance
        chosen[order[rank]] = max(chosen[order[rank]], chance)
