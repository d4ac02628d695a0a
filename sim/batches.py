"""The steps of a trace as the engines consume them."""

from __future__ import annotations

from dataclasses import dataclass

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


def recorded_steps(trace: Trace) -> Steps:
    """The trace's own steps. A prompt chunk samples one token at its last row; every decode row samples one."""
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
    batches = [Batch(*map(int, row)) for row in zip(tokens, attended, cached, outputs, strict=True)]
    return Steps(starts, batches, decode, tokens)
