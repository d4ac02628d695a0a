"""moeflow: how soon will it be used again? Seven questions to the past, one straight line; the lowest score goes.

For each expert of a layer, with k = top-k, E = experts, time in units of E / k tokens, and everything counted from
routed events alone, a token's prompt neighbours counting as earlier tokens:

    score = sum of WEIGHTS * terms, terms =
      log2(recent + .02), log2(lasting + .02)   uses, halved every 2 and every 32 units (LRFU: Lee et al. 2001)
      log2(1 + tokens since the last use)       recency
      log2(usual + .02 k/E)                     share of all tokens so far that used it
      log2(own + .02 k/E)                       the same of the running request, shrunk to `usual` by 8 tokens
      log2((follow + .3) / (k usual + .3))      uses to come, from what has followed the current token's experts
      log2((beside + .3) / (k usual + .3))      uses one would have guessed from the experts chosen a layer above

`follow` is a successor representation (Dayan 1993, Neural Computation 5:4): table[b, e, s] sums, over the times that
s was used b layers above, the discounted uses of e by the tokens after it. The current token's experts at this layer
and the two above it speak, each table row divided by its uses + 4; gamma is 1 - 1 / (1 + 0.15 E/k), so about the next
token and a few more. `beside` takes the table of the layer above -> this layer at the same token, and halves every
unit; an expert that should have been used and was not sits lower. In a batch the speakers' terms are averaged.

A miss that is worth less than all that could make room for it is streamed past the cache (Belady's bypass, by the
same score). Nothing is trained on your model: counts start empty. WEIGHTS are one linear regression of
-log2(time to the next use, at most 8 units) on the terms, over the fitting half of the recorded traces;
`benchmarks/fit_moeflow.py` repeats it and judges it on the other half. All other constants were chosen there, too.
"""

from __future__ import annotations

import numpy as np

from ..traces.trace import TraceMeta
from .compiled import compiled
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed

WEIGHTS = (0.124, -0.216, -0.122, 0.394, 0.271, 1.345, -0.237)
TERMS = len(WEIGHTS)
HALF_LIVES = (2.0, 32.0, 1.0)  # of `recent`, `lasting` and `beside`, in units of experts / top-k tokens
HORIZON = 0.15  # of `follow`, in the same units
SOURCES = 3  # layers whose choice speaks for `follow`: this one and those above it
SHRINK = 4.0  # uses a source must have had before half of what followed it is believed
OWN = 8.0  # tokens of a request before half of its own share is believed
RARE, PRIOR = 0.02, 0.3  # added before logarithms
RECENT, LASTING, BESIDE, LAST, USES, SEEN = range(6)  # rows of `_experts`; SEEN and on: one per source
STEP, TOKENS = range(2)  # columns of `_clock`


class Moeflow(Eviction):
    """See the module. `terms` [layers, experts, 7] holds what the last scores were made of."""

    bypass = True

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        unit = experts / meta.model.top_k
        self.terms = np.zeros((layers, experts, TERMS))
        self._fade = 1 - 1 / (1 + HORIZON * unit)
        self._decay = 0.5 ** (1 / (np.array(HALF_LIVES) * unit))
        self._experts = np.zeros((layers, SEEN + SOURCES, experts))
        self._experts[:, LAST] = -1
        self._experts[:, USES] = 0.5 / unit
        self._clock = np.tile([-1.0, 0.5], (layers, 1))
        self._tables = np.zeros((layers, SOURCES + 1, experts, experts), np.float32)
        self._requests = np.zeros((1, layers, SOURCES + 1, experts), np.float32)  # what has faded, per source; own uses
        self._lengths = np.zeros((1, layers))
        self._place: dict[int, int] = {}  # request -> row of the two
        self._free = [0]
        self._step = -1
        self._places = np.zeros(0, np.int64)
        self._chosen = np.zeros((SOURCES, 0, meta.model.top_k), np.int64)  # of the latest layers, by layer % SOURCES

    def request_begins(self, request: int) -> None:
        if not self._free:
            self._free = list(range(len(self._lengths), 2 * len(self._lengths)))
            self._requests = np.concatenate((self._requests, np.zeros_like(self._requests)))
            self._lengths = np.concatenate((self._lengths, np.zeros_like(self._lengths)))
        place = self._place[request] = self._free.pop()
        self._requests[place], self._lengths[place] = 0, 0

    def request_ends(self, request: int) -> None:
        self._free.append(self._place.pop(request))

    def touch(self, routed: Routed) -> None:
        if routed.step != self._step:
            if routed.requests is None:
                raise ValueError("moeflow was driven without requests")
            self._step = routed.step
            self._places = np.array([self._place[request] for request in routed.requests.tolist()], np.int64)
            if self._chosen.shape[1] != len(self._places):
                self._chosen = np.empty((SOURCES, len(self._places), routed.ids.shape[1]), np.int64)
        self._chosen[routed.layer % SOURCES] = routed.ids
        _touch(
            routed.layer, routed.step, self._chosen, self._places, self._decay, self._fade, self._experts, self._clock,
            self._tables, self._requests, self._lengths, self.terms, self.score,
        )  # fmt: skip

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        """As though it had been used now."""
        uses = self._experts[layer, :LASTING + 1, expert] + RARE
        fresher = float(np.log2((uses + 1) / uses) @ WEIGHTS[:2]) - WEIGHTS[2] * self.terms[layer, expert, 2]
        return float(self.score[layer, expert] + fresher)


@compiled
def _touch(  # type: ignore[no-untyped-def]
    layer, step, chosen, places, decay, fade, of_experts, clock, of_layers, of_requests, lengths, of_terms, scores
):
    experts, top_k, rows = scores.shape[1], chosen.shape[2], len(places)
    of, table, terms, score = of_experts[layer], of_layers[layer], of_terms[layer], scores[layer]
    now, sources, unit = chosen[layer % SOURCES], min(SOURCES, layer + 1), experts / top_k
    gap = step - clock[layer, STEP]
    clock[layer, STEP] = step
    for kind in range(3):
        of[kind] *= decay[kind] ** gap
    follow, own = np.zeros(experts), np.zeros(experts)
    speakers = 0
    after = 0  # tokens of the same request up to the step's end
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
                of[RECENT, expert] += decay[RECENT] ** after
                of[LASTING, expert] += decay[LASTING] ** after
                of[LAST, expert] = step
                of[USES, expert] += 1
                faded[SOURCES, expert] += 1
                for back in range(sources):
                    for source in range(experts):
                        table[back, expert, source] += faded[back, source]
        if layer > 0:
            above = chosen[(layer - 1) % SOURCES]
            for i in range(top_k):
                source = above[row, i]
                if source < experts:
                    believed = decay[BESIDE] ** after / (of[SEEN + 1, source] + SHRINK)
                    for expert in range(experts):
                        of[BESIDE, expert] += table[SOURCES, source, expert] * believed
                    for j in range(top_k):
                        if now[row, j] < experts:
                            table[SOURCES, source, now[row, j]] += 1
        for back in range(sources):
            speaking = chosen[(layer - back) % SOURCES]
            for source in range(experts):
                faded[back, source] *= fade
            for i in range(top_k):
                source = speaking[row, i]
                if source < experts:
                    faded[back, source] += 1
                    of[SEEN + back, source] += 1
        if after == 0:
            speakers += 1
            for expert in range(experts):
                usual = of[USES, expert] / clock[layer, TOKENS]
                own[expert] += (faded[SOURCES, expert] + OWN * usual) / (lengths[place, layer] + OWN)
    for row in range(rows):
        if row + 1 < rows and places[row + 1] == places[row]:
            continue  # a prompt: only its last token has a next one
        for back in range(sources):
            speaking = chosen[(layer - back) % SOURCES]
            for i in range(top_k):
                source = speaking[row, i]
                if source < experts:
                    believed = (1 - fade) / (of[SEEN + back, source] + SHRINK) / sources
                    for expert in range(experts):
                        follow[expert] += table[back, expert, source] * believed
    for expert in range(experts):
        usual = of[USES, expert] / clock[layer, TOKENS]
        baseline = np.log2(top_k * usual + PRIOR)
        terms[expert, 0] = np.log2(of[RECENT, expert] + RARE)
        terms[expert, 1] = np.log2(of[LASTING, expert] + RARE)
        terms[expert, 2] = np.log2(1 + step - of[LAST, expert])
        terms[expert, 3] = np.log2(usual + RARE / unit)
        terms[expert, 4] = np.log2(own[expert] / speakers + RARE / unit)
        terms[expert, 5] = np.log2(follow[expert] / speakers + PRIOR) - baseline
        if layer > 0:
            guessed = of[BESIDE, expert] * (1 - decay[BESIDE]) / speakers
            terms[expert, 6] = np.log2(guessed + PRIOR) - baseline
        score[expert] = 0
        for term in range(TERMS):
            score[expert] += WEIGHTS[term] * terms[expert, term]
