"""Compiled steps against the same functions in plain Python, and a whole run without numba."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cases import EVICTIONS, cases, log_of
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from moeflow.policies.compiled import COMPILED
from moeflow.policies.steps import Step
from moeflow.sim.run import simulate
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.reader import load_trace

STEPPED = sorted(name for name, cls in EVICTIONS.items() if cls.touch_step is not None)


def plain(step: Step) -> Step:
    """The same step, never compiled."""
    made = Step(step.function, step.kind)
    made.__dict__["call"] = step.function
    return made


@pytest.mark.skipif(not COMPILED, reason="numba is not installed: there is only one of them")
@pytest.mark.parametrize("evict", STEPPED)
@given(data=st.data())
@settings(max_examples=15, phases=[Phase.generate], deadline=None)
def test_plain_python_decides_as_the_compiled_step_does(evict, data):
    case, cls = data.draw(cases(evict=evict)), EVICTIONS[evict]
    compiled = case.residency()
    expected = log_of(compiled, case.trace)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("touch_step", "admit_step", "value_step", "begin_step"):
            patch.setattr(cls, name, plain(getattr(cls, name)))
        residency = case.residency()
        found = log_of(residency, case.trace)
    assert found.tolist() == expected.tolist()
    assert residency.eviction.score.tolist() == compiled.eviction.score.tolist()


RUN = """
import json, sys
if sys.argv[1] == "without":
    sys.modules["numba"] = None
from moeflow.sim.run import simulate
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.reader import load_trace
trace = load_trace(BUNDLED_TRACE)
few = trace.of_requests(sorted(set(trace.request.tolist()))[:2])
for policy, more in json.loads(sys.argv[2]):
    print(simulate(few, "rtx4090", policy, engine="compiled", **more).to_json())
"""
RUNS = [["moeflow", {}], ["lookahead", {}], ["split", {"batching": "continuous", "token_budget": 16}]]


@pytest.mark.skipif(not COMPILED, reason="numba is not installed: nothing to compare with")
def test_without_numba_the_compiled_engine_gives_the_same_results():
    command = [sys.executable, "-W", "error", "-c", RUN, "without", json.dumps(RUNS)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, answer.stderr
    trace = load_trace(BUNDLED_TRACE)
    few = trace.of_requests(sorted(set(trace.request.tolist()))[:2])
    here = [simulate(few, "rtx4090", policy, engine="compiled", **more).to_json() for policy, more in RUNS]
    assert answer.stdout == "".join(text + "\n" for text in here)
