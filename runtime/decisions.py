"""What happens in a running model, told to `Residency` as the replay contract has it (DESIGN section 3).

The same events in the same order as the simulator's engines give them for a trace of the same run, so that decisions
are the same. Only live tokens are told: a pass without any is no step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.prefetch import BEFORE_FIRST_LAYER
from ..policies.residency import FetchPlan, Residency
from ..policies.routed import Routed
from ..traces.recorded_rows import ranked
from ..traces.trace import expert_dtype
from .passes import Pass

NO_PLAN: FetchPlan = np.zeros((0, 5), np.int64)


@dataclass
class Chosen:
    """What one layer's router said of all T rows of a pass, padding included."""

    ids: NDArray[np.int64]  # [T, K]
    weights: NDArray[np.float16]  # [T, K]
    lookahead: NDArray[Any] | None = None  # [n, D, K'], live rows only
    lookahead_weights: NDArray[np.float16] | None = None  # [n, D, K']
    columns: dict[str, NDArray[Any]] | None = None  # live rows only


@dataclass
class Decision:
    """A layer's live needs and what is to be copied."""

    routed: Routed | None  # None: no live token
    plan: FetchPlan


class Decisions:
    """Drives one `Residency`. `needs` are the trace columns that its policies read."""

    def __init__(self, residency: Residency, needs: frozenset[str]) -> None:
        self.residency, self.needs = residency, needs
        self._dtype = expert_dtype(residency.experts)
        self._running: list[int] = []  # requests with rows in the last step
        self._pass: Pass | None = None  # None: the pass has no live token
        self.steps = 0
        self.keep: Callable[[str, Any], None] = lambda name, value: None  # what a policy is told, for a trace of it

    def begin(self, now: Pass, chosen: Chosen | None) -> FetchPlan:
        """A pass begins; `chosen` carries what gates say of its embeddings. Returns what to copy before layer 0."""
        self._pass = now if len(now.requests) else None
        if self._pass is None:
            return NO_PLAN
        requests = now.requests
        present = np.unique(requests).tolist()
        for request in self._running:
            if request not in present:
                self.residency.request_ends(request)
        for request in present:
            if request not in self._running:
                self.residency.request_begins(request)
        self._running = present
        ahead, ahead_weights = (None, None) if chosen is None else (chosen.lookahead, chosen.lookahead_weights)
        self.residency.step_begins(self.steps, now.tokens, requests, now.phase, ahead, ahead_weights)
        self.steps += 1
        return self.residency.fetch_plan(BEFORE_FIRST_LAYER)

    def routed(self, layer: int, chosen: Chosen) -> Decision:
        """The router of `layer` has spoken. Returns what the live tokens need and what to copy for them."""
        now = self._pass
        if now is None:
            return Decision(None, NO_PLAN)
        ids, weights = chosen.ids, chosen.weights
        if not now.all_live:
            ids, weights = ids[now.live], weights[now.live]
        ids, weights = ranked(ids.astype(self._dtype), weights)
        routed = self.residency.routed(
            layer, ids, weights if "weights" in self.needs else None, now.requests,
            chosen.lookahead, chosen.columns or {}, chosen.lookahead_weights,
        )  # fmt: skip
        return Decision(routed, self.residency.fetch_plan(layer))

    def done(self, layer: int, ns: int = 0) -> None:
        """The layer's experts have been computed."""
        if self._pass is not None:
            self.residency.layer_done(layer, ns)

    def end(self) -> None:
        """Nothing more is coming: requests that still run have ended."""
        for request in self._running:
            self.residency.request_ends(request)
        self._running = []
