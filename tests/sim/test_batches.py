"""What attention sees of each recorded step, by hand and against a plain count."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from cases import spec, trace_of, traces
from hypothesis import given
from moeflow.sim.batches import recorded_steps
from moeflow.sim.cost import Batch
from moeflow.traces.trace import DECODE, PREFILL


def steps_of(rows: list[tuple[int, int, int, int]]):
    """Steps of (step, request, position, phase) rows."""
    step, request, position, phase = (np.array(column) for column in zip(*rows, strict=True))
    trace = trace_of(spec(), [np.zeros((len(rows), 1, 1), int)])
    columns = {"step": step, "request": request, "position": position}
    return recorded_steps(
        replace(trace, phase=phase.astype(np.int8), **{k: v.astype(np.int32) for k, v in columns.items()})
    )


@pytest.mark.parametrize(
    "rows, batch, decode",
    [
        ([(0, 0, 9, DECODE)], Batch(1, 10, 10, 1), True),
        ([(0, 0, p, PREFILL) for p in range(4)], Batch(4, 1 + 2 + 3 + 4, 4, 1), False),
        # the second chunk of a prompt attends to the first
        ([(0, 0, p, PREFILL) for p in (4, 5)], Batch(2, 5 + 6, 6, 1), False),
        # two requests decode
        ([(0, 3, 9, DECODE), (0, 1, 2, DECODE)], Batch(2, 13, 13, 2), True),
        # a prompt and two decode rows, interleaved: one output for the prompt, two for the rows
        (
            [(0, 1, 9, DECODE), (0, 0, 0, PREFILL), (0, 2, 4, DECODE), (0, 0, 1, PREFILL)],
            Batch(4, 10 + 1 + 5 + 2, 10 + 5 + 2, 3),
            False,
        ),
        # two rows of one request in one step (a verified draft): its keys are read once
        ([(0, 0, 5, DECODE), (0, 0, 6, DECODE)], Batch(2, 6 + 7, 7, 2), True),
    ],
)
def test_one_step(rows, batch, decode):
    steps = steps_of(rows)
    assert (steps.batches, steps.decode.tolist(), steps.tokens.tolist()) == ([batch], [decode], [len(rows)])


def test_steps_are_told_apart_and_need_not_count_from_zero():
    steps = steps_of([(7, 0, 0, PREFILL), (7, 0, 1, PREFILL), (9, 0, 2, DECODE), (10, 0, 3, DECODE)])
    assert steps.batches == [Batch(2, 3, 2, 1), Batch(1, 3, 3, 1), Batch(1, 4, 4, 1)]
    assert steps.starts.tolist() == [0, 2, 3, 4]
    assert steps.decode.tolist() == [False, True, True]


def test_a_trace_without_rows_has_no_steps():
    trace = trace_of(spec(), [np.zeros((1, 1, 1), int)])
    columns = {name: array[:0] for name, array in trace.columns.items()}
    assert len(recorded_steps(replace(trace, **columns))) == 0


@given(traces())
def test_any_trace_counts_as_a_plain_loop_does(trace):
    by_step = defaultdict(list)
    for row in zip(*(a.tolist() for a in (trace.step, trace.request, trace.position, trace.phase)), strict=True):
        by_step[row[0]].append(row[1:])
    expected = []
    for rows in by_step.values():
        longest = {r: max(p + 1 for request, p, _ in rows if request == r) for r, _, _ in rows}
        prompts = {r for r, _, phase in rows if phase == PREFILL}
        outputs = sum(phase == DECODE for *_, phase in rows) + len(prompts)
        expected.append(Batch(len(rows), sum(p + 1 for _, p, _ in rows), sum(longest.values()), outputs))
    assert recorded_steps(trace).batches == expected
