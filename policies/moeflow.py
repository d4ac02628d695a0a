"""moeflow: how soon will it be used again? Seven questions to the past, one straight line; the lowest score goes.

For each expert of a layer, with k = top-k, E = experts, and everything counted from routed events alone, in tokens
(those of a prompt one after the other, those of a batch side by side) or in units of E / k tokens:

    score = sum of WEIGHTS * terms, and the terms are
      log2(recent + .02), log2(lasting + .02)   uses, halved every 2 and every 32 units: LRFU (Lee et al. 2001)
      log2(1 + steps since the last use)
      log2(usual + .02 k/E)                     the share of all tokens so far that used it
      log2(own + .02 k/E)                       the same of the running request, shrunk towards `usual` by 8 tokens
      log2((follow + .3) / (k usual + .3))      uses to come, judging by what has followed the current experts
      log2((beside + .3) / (k usual + .3))      uses of late, had one guessed them from the layer above

`follow` is a successor representation (Dayan 1993, Neural Computation 5:4), counted online. For this layer and the two
above it, table[source, expert] sums over the uses of `expert` how long ago its request used `source`: 1 for the token
before, times gamma for every token earlier, gamma = 1 - 1 / (1 + .15 E/k), forgotten below .1. The current token's
experts in those layers speak, each for its row divided by its uses + 4; the layers are averaged. `beside` asks a table
of the layer above for the same token's experts in this one, before it learns them, and is halved every unit: an expert
that was to be expected and did not come is worth less. In a batch every request speaks, and they are averaged.

Every miss is admitted. Streaming those that are worth less than all who could make room (a causal form of Belady's
bypass) hits a little more, but each stream is a launch of its own, and where launches are slow that costs more time
than the copies it saves. Nothing is trained on your model: counts start empty. WEIGHTS are one linear regression of
minus log2 of the time to the next use, at most 8 units, on the terms, over the fitting halves of the bundled,
V2-Lite, gpt-oss and OLMoE recordings; the other constants were chosen there too. `benchmarks/fit_moeflow.py` fits,
and judges on the other halves.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .eviction import Eviction
from .future import Future
from .log2 import log2_each
from .residency import Slots
from .routed import Routed
from .steps import begin_step, state, touch_step, value_step, with_twice_the_places

WEIGHTS = (0.103, -0.214, -0.132, 0.379, 0.304, 1.427, -0.331)
TERMS = len(WEIGHTS)
HALF_LIVES = (2.0, 32.0, 1.0)  # of `recent`, `lasting` and `beside`, in units of experts / top-k tokens
HORIZON = 0.15  # of `follow`, in the same units
SOURCES = 3  # layers whose choice speaks for `follow`: this one and those above it
SHRINK = 4.0  # uses a source must have had before half of what followed it is believed
OWN = 8.0  # tokens of a request before half of its own share is believed
FAINT = 0.1  # what has faded below this has stopped speaking to `follow`
RARE, PRIOR = 0.02, 0.3  # added before logarithms
RECENT, LASTING, BESIDE, LAST, USES, SEEN = range(6)  # planes of the state; SEEN and on: one per source; then terms
OF_TERMS = SEEN + SOURCES
BASELINE = OF_TERMS + TERMS
STEP, TOKENS = range(2)  # columns of `state.clock`
FADE = len(HALF_LIVES)  # of `state.numbers`, after the decay for each half-life


@touch_step
def _touch(event, layer, needed, tokens, chosen, places, score, state):  # type: ignore[no-untyped-def]
    """Bring counts and tables up to date with what `layer` chose, then its terms and scores."""
    layers, experts = score.shape
    top_k, rows, step = chosen.shape[2], len(places), event // layers
    of, table, clock = state.planes[layer], state.tables[layer], state.clock
    of_requests, lengths, decay, fade = state.requests, state.lengths, state.numbers, state.numbers[FADE]
    now, sources, unit = chosen[layer], min(SOURCES, layer + 1), experts / top_k
    gap = step - clock[layer, STEP]
    clock[layer, STEP] = step
    for kind in range(3):
        of[kind] *= decay[kind] ** gap
    follow, own = np.zeros(experts), np.zeros(experts)
    speakers, after = 0, 0  # `after`: tokens of the same request up to the step's end
    for row in range(rows):
        place = places[row]
        if row == 0 or places[row - 1] != place:
            after = 1
            while row + after < rows and places[row + after] == place:
                after += 1
        after -= 1
        faded = of_requests[place, layer]
        clock[layer, TOKENS] += 1
        lengths[place, layer] += 1
        for i in range(top_k):
            expert = now[row, i]
            if expert < experts:
                of[RECENT, expert] += decay[RECENT] ** float(after)
                of[LASTING, expert] += decay[LASTING] ** float(after)
                of[LAST, expert] = step
                of[USES, expert] += 1
                faded[SOURCES, expert] += 1
        for back in range(sources):
            for source in range(experts):
                weight = faded[back, source]
                if weight > 0:
                    for i in range(top_k):
                        if now[row, i] < experts:
                            table[back, source, now[row, i]] += weight
        if layer > 0:
            above = chosen[layer - 1]
            for i in range(top_k):
                source = above[row, i]
                if source < experts:
                    believed = decay[BESIDE] ** float(after) / (of[SEEN + 1, source] + SHRINK)
                    for expert in range(experts):
                        of[BESIDE, expert] += table[SOURCES, source, expert] * believed
                    for j in range(top_k):
                        if now[row, j] < experts:
                            table[SOURCES, source, now[row, j]] += 1
        for back in range(sources):
            speaking = chosen[layer - back]
            for source in range(experts):
                faded[back, source] = faded[back, source] * fade if faded[back, source] > FAINT else 0.0
            for i in range(top_k):
                source = speaking[row, i]
                if source < experts:
                    faded[back, source] += 1
                    of[SEEN + back, source] += 1
    for row in range(rows):
        if row + 1 < rows and places[row + 1] == places[row]:
            continue  # a prompt: only its last token has a next one
        speakers += 1
        for expert in range(experts):
            usual = of[USES, expert] / clock[layer, TOKENS]
            own[expert] += (of_requests[places[row], layer, SOURCES, expert] + OWN * usual) / (
                lengths[places[row], layer] + OWN
            )
        for back in range(sources):
            speaking = chosen[layer - back]
            for i in range(top_k):
                source = speaking[row, i]
                if source < experts:
                    believed = (1 - fade) / (of[SEEN + back, source] + SHRINK) / sources
                    for expert in range(experts):
                        follow[expert] += table[back, source, expert] * believed
    for expert in range(experts):
        usual = of[USES, expert] / clock[layer, TOKENS]
        of[OF_TERMS + 0, expert] = of[RECENT, expert] + RARE
        of[OF_TERMS + 1, expert] = of[LASTING, expert] + RARE
        of[OF_TERMS + 2, expert] = 1 + step - of[LAST, expert]
        of[OF_TERMS + 3, expert] = usual + RARE / unit
        of[OF_TERMS + 4, expert] = own[expert] / speakers + RARE / unit
        of[OF_TERMS + 5, expert] = follow[expert] / speakers + PRIOR
        of[OF_TERMS + 6, expert] = of[BESIDE, expert] * (1 - decay[BESIDE]) / speakers + PRIOR
        of[BASELINE, expert] = top_k * usual + PRIOR
    log2_each(of[OF_TERMS:].reshape(-1))
    for expert in range(experts):
        of[OF_TERMS + 5, expert] -= of[BASELINE, expert]
        of[OF_TERMS + 6, expert] = of[OF_TERMS + 6, expert] - of[BASELINE, expert] if layer > 0 else 0.0
        score[layer, expert] = 0
        for term in range(TERMS):
            score[layer, expert] += WEIGHTS[term] * of[OF_TERMS + term, expert]


@value_step
def _value(event, layer, expert, score, state):  # type: ignore[no-untyped-def]
    """Whoever is foretold for this very step is worth as much as the best of its layer."""
    return score[layer].max()


@begin_step
def _begin(place, state):  # type: ignore[no-untyped-def]
    state.requests[place] = 0
    state.lengths[place] = 0


class Moeflow(Eviction):
    """See the module. `terms` [layers, experts, 7] holds what the last scores were made of."""

    routing_only = True
    touch_step = _touch
    value_step = _value
    begin_step = _begin

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        unit = experts / meta.model.top_k
        fade = 1 - 1 / (1 + HORIZON * unit)
        self.state = state(
            planes=(layers, BASELINE + 1, experts), clock=(layers, 2),
            tables=(layers, SOURCES + 1, experts, experts), requests=(1, layers, SOURCES + 1, experts),
            numbers=(*(0.5 ** (1 / (np.array(HALF_LIVES) * unit))), fade),
        )  # fmt: skip
        self.state.planes[:, LAST] = -1
        self.state.planes[:, USES] = 0.5 / unit
        self.state.clock[:] = (-1.0, 0.5)
        self._place: dict[int, int] = {}  # request -> its row of the state
        self._free = [0]
        self._step = -1
        self._places = np.zeros(0, np.int64)
        self._chosen = np.zeros((layers, 0, meta.model.top_k), np.int16)

    @property
    def terms(self) -> NDArray[np.float64]:
        return self.state.planes[:, OF_TERMS:BASELINE].transpose(0, 2, 1)

    def request_begins(self, request: int) -> None:
        if not self._free:
            self._free = list(range(len(self.state.lengths), 2 * len(self.state.lengths)))
            self.state = with_twice_the_places(self.state)
        place = self._place[request] = self._free.pop()
        self.begin_step.call(place, self.state)

    def request_ends(self, request: int) -> None:
        self._free.append(self._place.pop(request))

    def touch(self, routed: Routed) -> None:
        if routed.step != self._step:
            if routed.requests is None:
                raise ValueError("moeflow was driven without requests")
            self._step = routed.step
            self._places = np.array([self._place[request] for request in routed.requests.tolist()], np.int64)
            if self._chosen.shape[1] != len(self._places):
                layers, _, top_k = self._chosen.shape
                self._chosen = np.empty((layers, len(self._places), top_k), np.int16)
        self._chosen[routed.layer] = np.minimum(routed.ids, self.score.shape[1])
        self.touch_step.call(
            routed.event, routed.layer, routed.needed, routed.tokens, self._chosen, self._places, self.score, self.state
        )
