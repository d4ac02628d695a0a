"""When requests arrive: recorded, drawn, from a file; and one sentence for every mistake."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from cases import RTX4090, decode_trace
from moeflow.sim.arrivals import with_arrivals
from moeflow.sim.run import simulate
from moeflow.traces.trace import Request, Trace

from moeflow.errors import InputError


@pytest.fixture
def trace() -> Trace:
    """Requests 7, 3 and 5, two rows each, in this order."""
    alone = decode_trace(4, [[[n % 4]] for n in range(6)])
    return replace(alone, request=np.repeat([7, 3, 5], 2).astype(np.int32))


def times(trace: Trace) -> dict[int, float | None]:
    return {record.id: record.arrival_s for record in trace.meta.requests}


def recorded(trace: Trace, *arrivals: tuple[int, float | None]) -> Trace:
    records = tuple(Request(request, 2, arrival_s=at) for request, at in arrivals)
    return replace(trace, meta=replace(trace.meta, requests=records))


def test_poisson_arrivals_follow_the_order_of_the_trace_and_the_seed(trace):
    drawn = times(with_arrivals(trace, "poisson:2", 1))
    assert list(drawn) == [7, 3, 5] and 0 < drawn[7] < drawn[3] < drawn[5]
    assert drawn == times(with_arrivals(trace, "poisson:2", 1))
    assert drawn != times(with_arrivals(trace, "poisson:2", 2))
    assert times(with_arrivals(trace, "poisson:2")) == times(with_arrivals(trace, "poisson:2", 0))
    slower = times(with_arrivals(trace, "poisson:1", 1))
    assert slower[5] == pytest.approx(2 * drawn[5])


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential():
    many = decode_trace(4, [[[0]]] * 4000)
    many = replace(many, request=np.arange(4000, dtype=np.int32))
    gaps = np.diff([0.0, *times(with_arrivals(many, "poisson:5", 0)).values()])
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() == pytest.approx(0.2, rel=0.05)


def test_recorded_arrivals_and_what_else_is_known_of_a_request_stay(trace):
    known = recorded(trace, (3, 0.5), (7, 0.25), (5, 1.0))
    assert with_arrivals(known, "trace").meta.requests == known.meta.requests
    partly = with_arrivals(recorded(trace, (3, 0.5)), None)
    assert times(partly) == {3: 0.5, 7: 0.0, 5: 0.0}
    assert partly.meta.requests[0].prompt_tokens == 2


def test_a_file_gives_every_request_its_time(trace, tmp_path):
    file = tmp_path / "arrivals.jsonl"
    lines = [
        {"request": 5, "arrival_s": 0},
        {"request": 7, "arrival_s": 1.5, "user": "x"},
        {"request": 3, "arrival_s": 2},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert times(with_arrivals(trace, file)) == {7: 1.5, 3: 2.0, 5: 0.0}


def test_recorded_steps_wait_for_arrivals_too(trace, tmp_path):
    file = tmp_path / "arrivals.jsonl"
    file.write_text("".join(f'{{"request": {r}, "arrival_s": {at}}}\n' for r, at in ((7, 0), (3, 4), (5, 4))))
    result = simulate(trace, RTX4090, budget=0.5, arrivals=file)
    start = result.measurements.steps["start_ps"]
    assert start[2] == 4 * 10**12 and start[4] > start[2]
    assert result["batching"]["arrivals"] == "arrivals.jsonl"
    assert result["trace"]["sha256"] == simulate(trace, RTX4090, budget=0.5)["trace"]["sha256"]


@pytest.mark.parametrize("rate", ["", "fast", "0", "-1", "nan", "inf", "1e-320"])
def test_a_rate_must_be_above_0(trace, rate):
    with pytest.raises(InputError, match=r"expected requests per second above 0, such as poisson:2.5"):
        with_arrivals(trace, f"poisson:{rate}")


def test_times_that_the_clock_cannot_count_are_refused(trace):
    with pytest.raises(InputError, match=r"request 7 arrives at .* expected seconds from 0 to 1e\+06"):
        with_arrivals(trace, "poisson:1e-9")
    for at in (1.7e9, -1.0, math.nan):
        with pytest.raises(InputError, match="request 3 arrives at"):
            with_arrivals(recorded(trace, (3, at), (7, 0.0), (5, 0.0)), "trace")


def test_recorded_arrivals_must_be_complete(trace):
    with pytest.raises(InputError, match=r"--arrivals trace: no arrival time for 2 of 3 requests .request 7 first"):
        with_arrivals(recorded(trace, (3, 0.5), (5, None)), "trace")


def test_a_seed_without_chance_is_refused(trace):
    for arrivals in (None, "trace"):
        with pytest.raises(InputError, match="--seed 1: only --arrivals poisson:RATE draws anything"):
            simulate(trace, RTX4090, budget=0.5, arrivals=arrivals, seed=1)


GOOD = '{"request": 7, "arrival_s": 1}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD + "7 1.0", "line 2: expected a JSON object such as"),
        (GOOD + "[7, 1.0]", "line 2: expected a JSON object such as"),
        ('{"arrival_s": 1}', "line 1: request: expected the whole number of a request, found None"),
        ('{"request": "7", "arrival_s": 1}', "line 1: request: expected the whole number of a request, found '7'"),
        ('{"request": true, "arrival_s": 1}', "line 1: request: expected the whole number"),
        ('{"request": 7}', "line 1: arrival_s: expected seconds from 0 to 1e\\+06, found None"),
        ('{"request": 7, "arrival_s": -1}', "line 1: arrival_s: expected seconds from 0 to 1e\\+06, found -1"),
        ('{"request": 7, "arrival_s": NaN}', "line 1: arrival_s: .* found nan"),
        ('{"request": 7, "arrival_s": 1e300}', "line 1: arrival_s: .* found 1e\\+300"),
        (GOOD + "\n" + GOOD, "line 3: request 7 arrives a second time; keep one line"),
        ('{"request": 4, "arrival_s": 1}', "line 1: the trace has no request 4; remove the line"),
        (GOOD, "no arrival time for 2 of 3 requests .request 3 first.; give each a line"),
        ("", "no arrival time for 3 of 3 requests"),
    ],
)
def test_a_bad_file_gets_one_sentence_with_the_line(trace, tmp_path, content, says):
    file = tmp_path / "arrivals.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=says) as raised:
        with_arrivals(trace, file)
    assert "\n" not in str(raised.value) and "arrivals.jsonl" in str(raised.value)


def test_a_file_that_cannot_be_read_is_refused(trace, tmp_path):
    with pytest.raises(InputError, match=r"cannot be read .No such file or directory.; give trace, poisson:RATE or a"):
        with_arrivals(trace, "poison:3")
    with pytest.raises(InputError, match="cannot be read"):
        with_arrivals(trace, tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"cannot be read .not a text file."):
        with_arrivals(trace, tmp_path / "binary")
