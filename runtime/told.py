"""What the policies of a live run were told, as a trace: replaying it must give the same decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import Trace, TraceMeta, expert_dtype
from .passes import Pass


class Told:
    """Rows of every step, column by column, as they are told."""

    def __init__(self, meta: TraceMeta) -> None:
        self.meta = meta
        self._steps: list[dict[str, NDArray[Any]]] = []

    def begin(self, now: Pass, embedding: dict[str, NDArray[Any]]) -> None:
        """A step begins, with columns that are known then."""
        model, rows = self.meta.model, len(now.tokens)
        layers, step = len(model.moe_layers), len(self._steps)
        absent = np.iinfo(expert_dtype(model.experts)).max
        self._steps.append(
            {
                "step": np.full(rows, step, np.int32),
                "request": now.requests,
                "position": now.positions,
                "token": now.tokens,
                "phase": np.full(rows, now.phase, np.int8),
                "attempt": np.zeros(rows, np.int16),
                "flags": np.zeros(rows, np.uint8),
                "experts": np.full((rows, layers, model.top_k), absent, expert_dtype(model.experts)),
                "weights": np.zeros((rows, layers, model.top_k), np.float16),
            }
        )
        for name, values in embedding.items():
            self._whole(name, layers + 1, values)[:, 0] = values

    def routed(
        self,
        layer: int,
        ids: NDArray[Any],
        weights: NDArray[np.float16],
        ahead: dict[str, NDArray[Any]],
        columns: dict[str, NDArray[Any]],
    ) -> None:
        """One layer of the step that runs."""
        now, layers = self._steps[-1], len(self.meta.model.moe_layers)
        now["experts"][:, layer], now["weights"][:, layer] = ids, weights
        for name, values in ahead.items():
            self._whole(name, layers + 1, values)[:, layer + 1] = values
        for name, values in columns.items():
            self._whole(name, layers, values)[:, layer] = values

    def trace(self) -> Trace:
        """All steps so far."""
        names = self._steps[0] if self._steps else {}
        columns: dict[str, Any] = {name: np.concatenate([step[name] for step in self._steps]) for name in names}
        return Trace(meta=self.meta, **columns)

    def _whole(self, name: str, length: int, values: NDArray[Any]) -> NDArray[Any]:
        """[n, length, ...] of a column, absent or zero where nothing was told."""
        fill = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 0
        now = self._steps[-1]
        return now.setdefault(name, np.full((len(values), length, *values.shape[1:]), fill, values.dtype))
