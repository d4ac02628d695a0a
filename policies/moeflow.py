"""moeflow: how soon will it be used again? Past uses at several time scales, and who follows whom.

score = sum_h weight_h * log2(uses, halved every half-life h)  +  recency * log2(age)
      + affinity * log2(expected uses by the next token / expected uses by any token)

The first sum is LRFU (Lee et al. 2001) at nine half-lives, in units of experts / top-k steps so that one set of weights
fits every model; a sum of logarithms needs no update for what is not used. The last term counts, while running, how
often an expert follows another at the same layer from one token to the next, and asks what the current tokens'
experts are followed by. Everything is learned causally from routed events; caches and counts start empty.
The weights come from recorded traces (docs/policies.md says which); `benchmarks/fit_moeflow.py` judges and refits them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..traces.trace import TraceMeta
from .compiled import compiled
from .eviction import Eviction
from .future import Future
from .residency import Slots
from .routed import Routed

HALF_LIVES = np.array([0.25, 0.5, 1, 2, 4, 8, 16, 32, 64])  # times experts / top_k steps
WEIGHTS = np.array([0.013, 0.014, 0.124, 0.117, 0.472, 0.061, 0.137, 0.052, 0.011])
NEVER_USED = -30.0  # log2 of the uses of an expert that has none
PRIOR = 0.05  # uses per token added to both sides of the affinity ratio
SHRINK = 8.0  # uses an expert must have had before half of what followed it is believed


class Moeflow(Eviction):
    """See the module. `recency` and `affinity` of 0 leave their terms out."""

    def __init__(self, recency: float = -0.138, affinity: float = 0.663) -> None:
        super().__init__()
        self.recency, self.affinity = float(recency), float(affinity)

    def start(self, meta: TraceMeta, slots: Slots, future: Future | None) -> None:
        super().start(meta, slots, future)
        layers, experts = self.score.shape
        self._rate = 1 / (HALF_LIVES * experts / meta.model.top_k)
        self._uses = np.full((layers, experts, len(HALF_LIVES)), NEVER_USED)
        self._linear = self._uses @ WEIGHTS
        self._last = np.full((layers, experts), -1, np.int64)
        self._steps_used = np.zeros((layers, experts))
        self._tokens = np.zeros(layers)
        self._followed = np.zeros((layers, experts, experts), np.float32)
        self._sources = np.zeros((layers, experts))
        self._place: dict[int, int] = {}  # request -> row of `_before`
        self._free: list[int] = []
        self._before = np.full((1, layers, meta.model.top_k), experts, np.int64)  # last token's experts per request
        self._places = np.zeros(0, np.int64)
        self._step = -1

    def request_begins(self, request: int) -> None:
        if not self._free:
            self._free = [len(self._place)]
            if len(self._place) == len(self._before):
                self._before = np.concatenate((self._before, np.full_like(self._before, self.score.shape[1])))
        self._place[request] = self._free.pop()
        self._before[self._place[request]] = self.score.shape[1]

    def request_ends(self, request: int) -> None:
        self._free.append(self._place.pop(request))

    def touch(self, routed: Routed) -> None:
        if routed.step != self._step:
            if routed.requests is None:
                raise ValueError("moeflow was driven without requests")
            self._step = routed.step
            self._places = np.array([self._place[request] for request in routed.requests.tolist()], np.int64)
        layer = routed.layer
        self._tokens[layer] += len(routed.ids)
        _touch(
            np.ascontiguousarray(routed.ids), routed.needed, routed.tokens, routed.step, self._places,
            self._before[:, layer], WEIGHTS, self._rate, self._uses[layer], self._linear[layer], self._last[layer],
            self._steps_used[layer], self._tokens[layer], self._followed[layer], self._sources[layer],
            self.recency, self.affinity, self.score[layer],
        )  # fmt: skip

    def prefetch_value(self, event: int, layer: int, expert: int) -> float:
        """As though it had been used now."""
        return float((WEIGHTS * np.maximum(self._uses[layer, expert], event // len(self.score) * self._rate)).sum())

    def parameters(self) -> dict[str, Any]:
        return {"recency": self.recency, "affinity": self.affinity}


@compiled
def _touch(  # type: ignore[no-untyped-def]
    ids, needed, tokens, step, places, before, weights, rate, uses, linear, last, popularity, seen, followed, sources,
    recency, affinity, score,
):  # fmt: skip
    experts, top_k = len(score), ids.shape[1]
    for i in range(len(needed)):
        expert = needed[i]
        total = 0.0
        for h in range(len(rate)):
            now = step * rate[h]
            high, low = max(uses[expert, h], now), min(uses[expert, h], now)
            uses[expert, h] = high + np.log2(1.0 + 2.0 ** (low - high))
            total += weights[h] * uses[expert, h]
        linear[expert] = total
        last[expert] = step
        popularity[expert] += tokens[i]
    expected = np.zeros(experts)
    for row in range(len(ids)):
        place = places[row]
        for i in range(top_k):
            source = before[place, i]
            if source < experts:
                sources[source] += 1
                for j in range(top_k):
                    if ids[row, j] < experts:
                        followed[source, ids[row, j]] += 1
        for i in range(top_k):
            before[place, i] = min(experts, ids[row, i])
    speakers = 0
    if affinity != 0.0:
        for row in range(len(ids)):
            if row + 1 < len(ids) and places[row + 1] == places[row]:
                continue  # a prompt: only its last token has a next one
            speakers += 1
            for i in range(top_k):
                source = ids[row, i]
                if source < experts:
                    believed = 1.0 / (sources[source] + SHRINK)
                    for expert in range(experts):
                        expected[expert] += followed[source, expert] * believed
    for expert in range(experts):
        score[expert] = linear[expert]
        if recency != 0.0:
            score[expert] += recency * np.log2(step - last[expert] + 1.0)
        if affinity != 0.0:
            usual = speakers * top_k * popularity[expert] / seen
            score[expert] += affinity * np.log2((expected[expert] + PRIOR) / (usual + PRIOR))
