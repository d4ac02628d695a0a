"""What a schedule is: which tokens form which batch. It reorders work, never changes a result.

A schedule is one file in this folder with one subclass of `Schedule`; the file's name is its name under
`schedule.kind`.
"""

from __future__ import annotations

from typing import Any

from ..traces.trace import Trace
from .predictor import Predictions


class Schedule:
    """Regroups the steps of a trace. `needs` names the trace columns it reads."""

    needs: tuple[str, ...] = ()

    def regroup(self, trace: Trace, predictions: Predictions | None) -> Trace:
        """The same rows, in other steps."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {}
