"""What happens in a running model, told to `Residency` as the replay contract has it (DESIGN section 3).

The same events in the same order as the simulator's engines give them for a trace of the same run, so that decisions
are the same. Only live tokens are told: a pass without any is no step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policies.predictor import Predicted
from ..policies.prefetch import BEFORE_FIRST_LAYER
from ..policies.residency import FetchPlan, Residency
from ..policies.routed import Routed
from ..traces.recorded_rows import ranked
from ..traces.trace import TraceMeta, expert_dtype
from .passes import Pass
from .told import Told

NO_PLAN: FetchPlan = np.zeros((0, 5), np.int64)


@dataclass
class Said:
    """What gates and routers say of all T rows of a pass, padding included; ids of absent choices are negative."""

    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))  # [T, K]
    weights: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 0), np.float16))  # [T, K]
    ahead: NDArray[np.int64] | None = None  # [T, D, K]
    ahead_weights: NDArray[np.float16] | None = None  # [T, D, K]
    probs: NDArray[np.float16] | None = None  # [T, E]


@dataclass
class Decision:
    """A layer's live needs and what is to be copied."""

    routed: Routed | None  # None: no live token
    plan: FetchPlan


class Decisions:
    """Drives one `Residency`. `needs` are the trace columns that its policies read; `predicts`: next gates' choices."""

    def __init__(self, residency: Residency, meta: TraceMeta, needs: frozenset[str], predicts: bool) -> None:
        self.residency, self.needs, self.predicts = residency, needs, predicts
        self.told: Told | None = None  # set to keep a trace of what the policies are told
        self.meta, self._dtype = meta, expert_dtype(residency.experts)
        self._running: list[int] = []  # requests with rows in the last step
        self._pass: Pass | None = None  # None: the pass has no live token
        self.steps = 0

    def begin(self, now: Pass, said: Said) -> FetchPlan:
        """A pass begins; `said` of its embeddings. Returns what to copy before layer 0."""
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
        ahead = self._ahead(now, said)
        if self.told is not None:
            self.told.begin(now, ahead)
        shown = ahead if "lookahead" in self.needs else {}
        self.residency.step_begins(
            self.steps, now.tokens, requests, now.phase, shown.get("lookahead"), shown.get("lookahead_weights"),
            self._predicted(ahead),
        )  # fmt: skip
        self.steps += 1
        return self.residency.fetch_plan(BEFORE_FIRST_LAYER)

    def routed(self, layer: int, said: Said) -> Decision:
        """The router of `layer` has spoken. Returns what the live tokens need and what to copy for them."""
        now = self._pass
        if now is None:
            return Decision(None, NO_PLAN)
        ids, weights = said.ids, said.weights
        if not now.all_live:
            ids, weights = ids[now.live], weights[now.live]
        ids, weights = ranked(ids.astype(self._dtype), weights)  # -1 becomes the largest number, as in a trace
        ahead = self._ahead(now, said)
        columns = {} if said.probs is None else {"probs": said.probs[now.live]}
        if self.told is not None:
            self.told.routed(layer, ids, weights, ahead, columns)
        shown = ahead if "lookahead" in self.needs else {}
        routed = self.residency.routed(
            layer, ids, weights if "weights" in self.needs else None, now.requests, shown.get("lookahead"), columns,
            shown.get("lookahead_weights"), self._predicted(ahead),
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

    def _ahead(self, now: Pass, said: Said) -> dict[str, NDArray[Any]]:
        """The lookahead columns of live rows, by name; none where no gate was asked."""
        if said.ahead is None or said.ahead_weights is None:
            return {}
        ids, weights = ranked(said.ahead[now.live].astype(self._dtype), said.ahead_weights[now.live])
        return {"lookahead": ids, "lookahead_weights": weights}

    def _predicted(self, ahead: dict[str, NDArray[Any]]) -> Predicted | None:
        """What the predictor next-gate makes of them (policies/next_gate.py)."""
        if not self.predicts or not ahead:
            return None
        present = ahead["lookahead"] < self.residency.experts
        probability = np.where(present, ahead["lookahead_weights"], np.float16(0))
        return Predicted(self.meta.lookahead_distances, ahead["lookahead"], probability)
