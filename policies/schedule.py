"""What a schedule is: which tokens form which batch. It reorders work, never changes a result.

A schedule is one file in this folder with one subclass of `Schedule`; the file's name is its name under
`schedule.kind`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import Trace
from .predictor import Predictions


@dataclass(frozen=True)
class Regrouped:
    """The N rows of a trace in S other steps, and what forming these costs before each of them.

    Row i is row `order[i]` of the trace and belongs to step `step[i]`. `seconds`: host time for deciding. `moved`:
    sequences whose KV cache goes over to another batch; `moved_tokens`: cached tokens of those; `copied_tokens`: of
    these, the ones whose keys and values are read and written again.
    """

    order: NDArray[np.int64]  # [N]
    step: NDArray[np.int32]  # [N]
    seconds: NDArray[np.float64]  # [S]
    moved: NDArray[np.int64]  # [S]
    moved_tokens: NDArray[np.int64]  # [S]
    copied_tokens: NDArray[np.int64]  # [S]

    def trace(self, trace: Trace) -> Trace:
        """`trace` in these steps."""
        return trace.reordered(self.order, self.step)

    def predictions(self, predictions: Predictions | None) -> Predictions | None:
        """The same predictions for the rows in their new places."""
        if predictions is None:
            return None
        return replace(
            predictions, experts=predictions.experts[self.order], probability=predictions.probability[self.order]
        )


class Schedule:
    """Regroups the steps of a trace. `needs` names the trace columns it reads, or `predicted`."""

    needs: tuple[str, ...] = ()

    def regroup(self, trace: Trace, predictions: Predictions | None) -> Regrouped | None:
        """The same rows in other steps; None when there is nothing to regroup.

        A request's rows keep their order and, where they shared a step, share one; what is decided about a step may
        use nothing routed in it or after it.
        """
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}
