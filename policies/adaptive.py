"""How many layers ahead to prefetch, from measured bandwidth, compute time and stalls (ExpertFlow, 2510.26730).

    S = clamp(ceil(N_e * E_s / (C_s * T_l)) + feedback, 1, furthest distance predicted)

N_e experts of E_s bytes over a link of C_s bytes per second, against T_l seconds of compute per layer: S layers of
compute hide the copies of one layer. A layer's stalls raise the feedback, fetched experts that were not needed lower
it. Read from notes on the paper, which publishes no code. Chosen here, because the notes do not say: all default
values (of four pairs of thresholds tried on the bundled recording, one that does well on a slow and on a fast link);
the quotient is taken anew in every forward pass, from moving averages, kept apart for prefill and decode since their
layers differ so much in time; N_e is the smallest number of experts that holds the share `tau` of the mass that is
predicted for the batch at the nearest distance; before anything was measured S is 1.

Diversity: Dist = sum over pairs of the batch's tokens of the squared distance of their embeddings (the paper's). How
it enters S is not known; here N_e is multiplied by the mean over pairs divided by the moving average of that mean, so
that a batch more diverse than usual looks further ahead. A trace without the column `embedding`, or a batch of one
token, leaves N_e as it is: a batch's different experts are in its predicted mass anyway.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .future import Future
from .predicted import expected
from .predictor import Predicted as Said
from .prefetch import BEFORE_FIRST_LAYER, Prefetch, Proposal
from .routed import Routed, StepBegun


class Adaptive(Prefetch):
    """Of every target up to S layers ahead, nearest first, the likeliest experts that hold `tau` of the mass.

    `stall_threshold` stalled layers raise S by one, `overfetch_threshold` experts that were copied ahead and not
    needed by the layer they were for lower it; `average` is the weight of the newest value in moving averages.
    `step_sizes` is the history of S: (event from which it held, S).
    """

    needs = ("predicted",)
    wants = ("embedding",)
    timing_free = False

    def __init__(
        self, tau: float = 0.9, stall_threshold: int = 64, overfetch_threshold: int = 32, average: float = 0.1
    ) -> None:
        if not 0 < tau <= 1 or not 0 < average <= 1:
            raise ValueError(f"tau and average must lie in (0, 1], got {tau} and {average}")
        if min(stall_threshold, overfetch_threshold) < 1:
            raise ValueError(f"thresholds must be at least 1, got {stall_threshold} and {overfetch_threshold}")
        self.tau, self.average = float(tau), float(average)
        self.stall_threshold, self.overfetch_threshold = stall_threshold, overfetch_threshold
        self.step_sizes: list[tuple[int, int]] = []

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        self._layers, self._experts = len(meta.model.moe_layers), meta.model.experts
        self.size = 1
        self.step_sizes = []
        self._furthest = 1
        self._needed_time = 1  # the quotient of the formula, in whole layers
        self._feedback = self._stalls = self._overfetched = 0
        self._bandwidth = Average(self.average)  # bytes per nanosecond
        self._compute = (Average(self.average), Average(self.average))  # ns per layer of prefill, of decode
        self._spread = Average(self.average)
        self._expert_bytes = 0
        self._phase = 0
        self._diversity = 1.0  # of this batch, relative to the usual
        self._waited = 0
        self._ahead: list[set[int]] = [set() for _ in range(self._layers)]  # copied for a layer not yet routed

    def copied(self, layer: int, expert: int, size: int, ns: int) -> None:
        if ns > 0:
            self._expert_bytes = size
            self._bandwidth.add(size / ns)

    def stalled(self, layer: int, ns: int) -> None:
        self._waited = ns
        self._stalls += ns > 0
        if self._stalls >= self.stall_threshold:
            self._stalls = 0
            self._feedback += self.size < self._furthest

    def layer_took(self, layer: int, ns: int) -> None:
        """The first layer's time has the LM head of the step before in it, and the wait for the next request."""
        if layer > 0 or self._layers == 1:
            self._compute[self._phase].add(ns - self._waited)

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        self._phase = begun.phase
        self._diversity = self._relative_diversity(begun.columns.get("embedding"))
        self._look(begun.predicted)
        self._resize(begun.event)
        return self._proposals(BEFORE_FIRST_LAYER, begun.predicted)

    def propose(self, routed: Routed) -> list[Proposal]:
        unneeded = self._ahead[routed.layer].difference(routed.needed.tolist())
        self._ahead[routed.layer] = set()
        self._overfetched += len(unneeded)
        if self._overfetched >= self.overfetch_threshold:
            self._overfetched = 0
            self._feedback -= self.size > 1
        if routed.layer == 0:
            self._look(routed.predicted)  # a predictor may say nothing before the first layer
        self._resize(routed.event)
        return self._proposals(routed.layer, routed.predicted)

    def planned(self, layer: int, experts: NDArray[np.int64]) -> None:
        self._ahead[layer].update(experts.tolist())

    def _relative_diversity(self, embedding: NDArray[np.float16] | None) -> float:
        if embedding is None or len(embedding) < 2:
            return 1.0
        mean = spread(embedding) / (len(embedding) * (len(embedding) - 1) / 2)
        self._spread.add(mean)
        return mean / self._spread.value if self._spread.value else 1.0

    def _look(self, said: Said | None) -> None:
        """Take the formula's quotient anew."""
        compute = self._compute[self._phase].value
        if said is None or not compute or not self._bandwidth.value or compute <= 0:
            return
        self._furthest = max(said.distances)
        nearest = int(np.argmin(said.distances))
        demand = len(self._demanded(said, nearest))
        if demand:
            most = min(self._experts, said.experts.shape[0] * said.experts.shape[2])
            demanded = min(most, demand * self._diversity)
            moves = demanded * self._expert_bytes / self._bandwidth.value
            self._needed_time = min(self._furthest, max(1, ceil(moves / compute)))

    def _resize(self, event: int) -> None:
        """Feedback never outgrows the range of S, or it would take as long to come back."""
        size = min(self._furthest, max(1, self._needed_time + self._feedback))
        self._feedback = size - self._needed_time
        if size != self.size or not self.step_sizes:
            self.size = size
            self.step_sizes.append((event, size))

    def _demanded(self, said: Said, column: int) -> NDArray[np.int32]:
        """The experts of one target, likeliest first, that together hold `tau` of what is predicted."""
        mass = expected(said.experts[:, column], said.probability[:, column], self._experts)
        order = np.argsort(-mass, kind="stable")
        order = order[mass[order] > 0]
        reached = np.cumsum(mass[order])
        if not len(order):
            return order.astype(np.int32)
        return order[: int(np.searchsorted(reached, self.tau * reached[-1])) + 1].astype(np.int32)

    def _proposals(self, layer: int, said: Said | None) -> list[Proposal]:
        if said is None:
            return []
        near = sorted((distance, i) for i, distance in enumerate(said.distances) if distance <= self.size)
        found = [((layer + distance) % self._layers, self._demanded(said, i)) for distance, i in near]
        return [proposal for proposal in found if len(proposal[1])]

    def parameters(self) -> dict[str, Any]:
        return {
            "tau": self.tau, "stall_threshold": self.stall_threshold,
            "overfetch_threshold": self.overfetch_threshold, "average": self.average,
        }  # fmt: skip


class Average:
    """Exponential moving average; the first value counts in full."""

    def __init__(self, newest: float) -> None:
        self._newest = newest
        self.value = 0.0
        self._empty = True

    def add(self, value: float) -> None:
        self.value = value if self._empty else self.value + self._newest * (value - self.value)
        self._empty = False


def spread(vectors: NDArray[np.float16]) -> float:
    """Sum over pairs of rows of [T, s] of the squared distance: T * sum |v|^2 - |sum v|^2."""
    values = vectors.astype(np.float64)
    total = values.sum(axis=0)
    return max(0.0, float(len(values) * (values * values).sum() - (total * total).sum()))
