"""What a predictor is: from what has been routed so far, which experts later layers will need, with what probability.

A predictor is one file in this folder with one subclass of `Predictor`; the file's name is its name under
`predict.kind`. It sees routing only, never the cache. Offline it runs once over a trace; what it said is kept in the
user's cache folder under the contents of trace and fitted file, and engines read arrays.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..traces.reader import cache_folder
from ..traces.trace import Trace
from .fitted import Fitted, load_arrays, load_fitted, save_arrays

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Predicted:
    """What is said of T tokens at one moment: for each of D targets the M likeliest experts, likeliest first.

    A target lies `distances[i]` layer-steps after the moment's event (a step has L of them; a target past the step's
    last layer belongs to the next step). Ids >= experts are absent entries.
    """

    distances: tuple[int, ...]
    experts: NDArray[np.unsignedinteger[Any]]  # [T, D, M]
    probability: NDArray[np.float16]  # [T, D, M]


@dataclass(frozen=True)
class Predictions:
    """Everything a predictor says about a trace of N rows: A moments in a step, D targets for each."""

    moments: tuple[int, ...]  # -1: the step begins; l: MoE layer l has been routed
    distances: tuple[int, ...]
    experts: NDArray[np.unsignedinteger[Any]]  # [N, A, D, M]
    probability: NDArray[np.float16]  # [N, A, D, M]

    def at(self, moment: int, rows: slice | NDArray[np.int64]) -> Predicted | None:
        """What is known at `moment` of the tokens in `rows`; None where the predictor says nothing."""
        if moment not in self.moments:
            return None
        column = self.moments.index(moment)
        return Predicted(self.distances, self.experts[rows, column], self.probability[rows, column])


class Predictor:
    """Subclasses implement `predict`; one that is fitted reads `self.fitted()`.

    Class attributes: `needs` names the trace columns it reads; `gates` counts the router evaluations it costs per
    moment; `trained` says that it needs a file made by `moeflow policies train`.
    """

    needs: tuple[str, ...] = ()
    gates = 0
    trained = True

    def __init__(self, fitted: str | None = None) -> None:
        self.file = fitted

    @classmethod
    def train(cls, trace: Trace, judged: Trace) -> Fitted:
        """Fit on `trace`; metrics are of `judged`, requests that were not fitted on (may have no rows)."""
        raise NotImplementedError

    def predict(self, trace: Trace) -> Predictions:
        """Predictions for every row of `trace`; each depends on nothing routed after its moment."""
        raise NotImplementedError

    def fitted(self) -> Fitted:
        """The contents of the fitted file. Raises InputError when none is named or it is another predictor's."""
        kind = type(self).__module__.rpartition(".")[2].replace("_", "-")
        if self.file is None:
            raise InputError(
                f"predict.kind {kind}: it has to be trained; run `moeflow policies train {kind} --trace TRACE` "
                "and name the file as predict.fitted or with --fitted"
            )
        return load_fitted(self.file, kind)

    def seconds_per_call(self) -> float | None:
        """Measured when it was trained; None leaves it to the hardware profile (`host.predictor_s`)."""
        return self.fitted().seconds_per_call if self.trained else 0.0

    def parameters(self) -> dict[str, Any]:
        """The resolved parameters, for `--print-config` and results."""
        return {"fitted": self.file}


def predictions_for(predictor: Predictor, trace: Trace) -> Predictions:
    """`predictor.predict(trace)`, kept in the user's cache folder for a predictor that reads a fitted file."""
    for column in predictor.needs:
        if getattr(trace, column, trace.extra.get(column)) is None:
            raise InputError(f"predict: the trace lacks the column {column!r}: record with --{column.split('_')[0]}")
    if not predictor.trained:
        return predictor.predict(trace)
    said = repr((FORMAT, sorted(predictor.parameters().items(), key=str), predictor.fitted().sha256))
    key = hashlib.sha256(said.encode()).hexdigest()[:32]
    path = cache_folder() / "predictions" / f"{trace.content_sha256}.{key}.safetensors"
    if path.is_file():
        arrays, text = load_arrays(path)
        moments, distances = text["moments"], text["distances"]
        return Predictions(tuple(moments), tuple(distances), arrays["experts"], arrays["probability"])
    made = predictor.predict(trace)
    arrays = {"experts": made.experts, "probability": made.probability}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_arrays(part, arrays, {"moments": made.moments, "distances": made.distances})
    Path(part).replace(path)
    return made
