"""What a prefetch policy is: which experts of which later layers are worth having, in order.

A policy is one file in this folder with one subclass of `Prefetch`; the file's name is the policy's name.
It proposes; `Residency` decides what gets a slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import TraceMeta
from .routed import Routed, StepBegun
from .steps import State, Step
from .timed import Timed

if TYPE_CHECKING:
    from .future import Future

BEFORE_FIRST_LAYER = -1

Proposal = tuple[int, NDArray[np.int32]]  # target layer, experts best first


class Prefetch(Timed):
    """Proposals for one model.

    Class attributes: `needs` names the trace columns it reads, or `future`; `wants` and `timing_free` as for eviction;
    `gates` counts the router evaluations it costs per layer-step and at step start (charged by the clock).
    """

    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    gates = 0
    propose_step: Step | None = None  # `propose` and `propose_first` as one compiled step (policies/steps.py)
    state: State  # what that step keeps; made by `start`

    def start(self, meta: TraceMeta, future: Future | None) -> None:
        """Check that the trace carries what this policy is set to use; allocate state."""

    def request_begins(self, request: int) -> None:
        """Sequence `request` enters the batch."""

    def request_ends(self, request: int) -> None:
        """Sequence `request` has left the batch."""

    def propose_first(self, begun: StepBegun) -> list[Proposal]:
        """At step start, before layer 0."""
        return []

    def propose(self, routed: Routed) -> list[Proposal]:
        """After a layer is routed and its demand planned. Called for every layer: learn here too."""
        raise NotImplementedError

    def planned(self, layer: int, experts: NDArray[np.int64]) -> None:
        """These of its proposals for `layer` are being copied; the others were held, or found no slot."""

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}


def ranked(votes: NDArray[np.int64]) -> NDArray[np.int32]:
    """Experts with votes [E], most first, then lowest id."""
    order = np.argsort(-votes, kind="stable")
    return order[: np.count_nonzero(votes > 0)].astype(np.int32)
