"""Belady's rule on predictions: the expert whose next use is expected furthest in the future goes (SeqMoE, 2609.12978).

SeqMoE's own predictor forecasts eight tokens; here any predictor's forecasts are read, as they come. How they are
combined is chosen here: layer by layer the chance that an expert is needed at a target is that of at least one token;
targets count as independent, so

    expected next use = sum_i event_i * chance_i * prod_{j<i} (1 - chance_j)  +  the rest, past the last target

A layer-step between two forecasts takes the chance of the later one. What of a token's top-k a forecast leaves open is
spread over the experts that it does not name by their rate of use so far, none made likelier than the last it names.
Past the last forecast an expert is expected at its rate of use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .compiled import compiled
from .eviction import Eviction
from .future import Future
from .predictor import Predicted
from .residency import Slots
from .routed import Routed, StepBegun


class ProbabilisticBelady(Eviction):
    """score = minus the layer-step at which the next use is expected.

    The rate of use halves its memory every `half_life` steps (64, chosen here).
    """

    needs = ("predicted",)

    def __init__(self, half_life: float = 64.0) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life must be above 0 steps, got {half_life}")
        super().__init__()
        self.half_life = float(half_life)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        self._top_k = meta.model.top_k
        self._rate = np.full((layers, experts), meta.model.top_k / experts)
        self._seen = np.ones(layers)  # decayed steps behind a rate
        self._steps = 1  # steps of forecasts kept, the running one among them
        self._forecast = np.zeros((layers, 1, experts), np.float32)
        self._target = np.full((layers, 1), -1, np.int64)  # layer-step of each forecast

    def step_begins(self, begun: StepBegun) -> None:
        self._hear(begun.event, -1, begun.predicted)

    def touch(self, routed: Routed) -> None:
        layer = routed.layer
        keep = 0.5 ** (1 / self.half_life)
        self._seen[layer] = self._seen[layer] * keep + 1
        rate = self._rate[layer]
        rate *= 1 - 1 / self._seen[layer]
        rate[routed.needed] += 1 / self._seen[layer]
        self._hear(routed.event, layer, routed.predicted)
        self._expect(routed.event, layer)

    def _hear(self, event: int, layer: int, said: Predicted | None) -> None:
        """Keep what is forecast, and bring the scores of its target layers up to date."""
        if said is None:
            return
        layers, probability = len(self.score), said.probability.astype(np.float32)
        steps = (max(said.distances) + layers - 1) // layers + 1
        if steps > self._steps:
            self._make_room(steps)
        for i, distance in enumerate(said.distances):
            target = (layer + distance) % layers
            place = (event + distance) // layers % self._steps
            chance = self._forecast[target, place]
            if _forecast(said.experts[:, i], probability[:, i], self._top_k, self._rate[target], chance):
                self._target[target, place] = event + distance
        for target in {(layer + distance) % layers for distance in said.distances}:
            self._expect(event, target)

    def _make_room(self, steps: int) -> None:
        forecast, target = self._forecast, self._target
        self._forecast = np.zeros((len(forecast), steps, forecast.shape[2]), np.float32)
        self._target = np.full((len(target), steps), -1, np.int64)
        for layer, old in np.argwhere(target >= 0):
            place = target[layer, old] // len(target) % steps
            self._forecast[layer, place], self._target[layer, place] = forecast[layer, old], target[layer, old]
        self._steps = steps

    def _expect(self, event: int, layer: int) -> None:
        _expect(event, layer, self._forecast[layer], self._target[layer], self._rate[layer], self.score)

    def parameters(self) -> dict[str, Any]:
        return {"half_life": self.half_life}


@compiled
def _forecast(experts, probability, top_k, rate, chance):  # type: ignore[no-untyped-def]
    """Fill `chance` [E] from [T, M] experts and probabilities; False, and nothing filled, when no token has one."""
    spoken = False
    none = np.ones(len(chance), np.float64)
    named = np.empty(len(chance), np.bool_)
    for token in range(experts.shape[0]):
        named[:] = False
        least, open_uses, any_named = 1.0, float(top_k), False
        for i in range(experts.shape[1]):
            if experts[token, i] < len(chance):
                share = min(1.0, max(0.0, probability[token, i]))
                named[experts[token, i]] = True
                none[experts[token, i]] *= 1.0 - share
                least, open_uses, any_named = min(least, share), open_uses - share, True
        if not any_named:
            continue
        spoken = True
        unnamed = 1e-12
        for expert in range(len(chance)):
            if not named[expert]:
                unnamed += rate[expert]
        for expert in range(len(chance)):
            if not named[expert]:
                none[expert] *= 1.0 - min(least, rate[expert] * max(0.0, open_uses) / unnamed)
    if spoken:
        for expert in range(len(chance)):
            chance[expert] = 1.0 - none[expert]
    return spoken


@compiled
def _expect(event, layer, forecast, target, rate, score):  # type: ignore[no-untyped-def]
    """Row `layer` of `score`, from its forecasts [S, E] for the layer-steps `target` [S] that are still to come."""
    layers, experts = score.shape
    steps = len(target)
    first = event + (layer - event % layers) % layers  # the layer's next turn
    if first == event:
        first += layers
    places = np.full(steps, -1, np.int64)  # per turn the forecast that speaks for it
    last = -1
    for turn in range(steps):
        place = (first // layers + turn) % steps
        if target[place] == first + turn * layers:
            places[turn] = place
            last = turn
    for turn in range(last - 1, -1, -1):
        if places[turn] < 0:
            places[turn] = places[turn + 1]
    for expert in range(experts):
        unused, expected = 1.0, 0.0
        for turn in range(last + 1):
            chance = forecast[places[turn], expert]
            expected += unused * chance * (first + turn * layers)
            unused *= 1.0 - chance
        beyond = first + (last + 1) * layers + layers * (1.0 / max(rate[expert], 1e-6) - 1.0)
        score[layer, expert] = -(expected + unused * beyond)
