"""The steps of a trace as the engines consume them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..traces.trace import DECODE, Trace
from .cost import Batch


@dataclass(frozen=True)
class Steps:
    """S steps over N rows: rows `starts[s]:starts[s+1]` form step s."""

    starts: NDArray[np.int64]  # [S+1]
    batches: list[Batch]
    decode: NDArray[np.bool_]  # [S]: every row of the step is a decode row
    tokens: NDArray[np.int64]  # [S]: rows

    def __len__(self) -> int:
        return len(self.batches)

    @cached_property
    def figures(self) -> NDArray[np.int64]:
        """[S, 4]: `batches` as an array: tokens, attended, cached, outputs."""
        rows = [(batch.tokens, batch.attended, batch.cached, batch.outputs) for batch in self.batches]
        return np.array(rows, np.int64).reshape(-1, 4)


def recorded_steps(trace: Trace) -> Steps:
    """The trace's own steps, found once per trace.

    A prompt chunk samples one token at its last row; every decode row samples one.
    """
    if "recorded steps" not in trace.derived:
        trace.derived["recorded steps"] = _recorded_steps(trace)
    found: Steps = trace.derived["recorded steps"]
    return found


def _recorded_steps(trace: Trace) -> Steps:
    starts = trace.step_starts
    tokens = np.diff(starts)
    if not len(tokens):
        return Steps(starts, [], np.zeros(0, np.bool_), tokens)
    keys = trace.position.astype(np.int64) + 1
    attended = np.add.reduceat(keys, starts[:-1])
    step = np.repeat(np.arange(len(tokens)), tokens)
    order = np.lexsort((trace.request, step))
    last = np.flatnonzero(np.diff(step[order] * 2**32 + trace.request[order], append=-1))
    groups = np.concatenate(([0], last[:-1] + 1))
    cached = np.bincount(step[order][groups], np.maximum.reduceat(keys[order], groups), len(tokens))
    decode = np.logical_and.reduceat(trace.phase == DECODE, starts[:-1])
    decode_rows = np.add.reduceat((trace.phase == DECODE).astype(np.int64), starts[:-1])
    prompts = np.bincount(step[order][groups], trace.phase[order][groups] != DECODE, len(tokens))
    outputs = decode_rows + prompts.astype(np.int64)
    figures = np.stack((tokens, attended, cached.astype(np.int64), outputs), axis=1).astype(np.int64)
    return Steps(starts, [Batch(*row) for row in figures.tolist()], decode, tokens)
