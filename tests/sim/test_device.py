"""The device and its host thread by hand: issue 10, launch latency 5 unless said otherwise."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moeflow.sim.cost import Block
from moeflow.sim.device import Device, after


@pytest.mark.parametrize(
    "block, host, free, ready, expected",
    [
        (Block(1, 100), 0, 0, 0, (10, 115)),  # issue, latency, run
        (Block(1, 100), 0, 500, 0, (10, 600)),  # the device is still busy
        (Block(1, 100), 0, 0, 400, (10, 500)),  # an input arrives later
        (Block(4, 100), 0, 0, 0, (40, 115)),  # kernels of 25: launches at 10, 20, 30 and 40 keep ahead
        (Block(4, 20), 0, 0, 0, (40, 50)),  # kernels of 5: the last is launched at 40, arrives at 45
        (Block(4, 20), 0, 0, 46, (40, 66)),  # all launched before the input arrives
        (Block(4, 20), 0, 0, 27, (40, 50)),  # the input is late for the first, the launch for the last
        (Block(3, 10), 0, 0, 0, (30, 39)),  # a third of 10, rounded up
        (Block(2, 0), 7, 0, 0, (27, 32)),
    ],
)
def test_a_block_ends_when_its_slowest_constraint_says(block, host, free, ready, expected):
    assert after(block, host, free, issue_ps=10, latency_ps=5, ready=ready) == expected


times = st.integers(0, 200)


@given(st.integers(1, 6), times, times, times, times, st.integers(0, 30), st.integers(0, 30))
def test_a_block_is_its_kernels_one_after_another(launches, device_ps, host, free, ready, issue, latency):
    at = Fraction(max(free, ready))
    for i in range(launches):
        at = max(at, host + (i + 1) * issue + latency) + Fraction(device_ps, launches)
    assert after(Block(launches, device_ps), host, free, issue, latency, ready) == (host + launches * issue, ceil(at))


def device(spans=None) -> Device:
    return Device(SimpleNamespace(issue_ps=10, launch_latency_ps=5), spans)


def test_only_the_time_that_inputs_cost_is_exposed_wait():
    one = device()
    assert one.run(Block(1, 100), "dense", "a") == 0  # 15-115: launching is not waiting for copies
    assert one.run(Block(1, 100), "experts", "b", ready=100) == 0  # hidden behind a
    assert one.run(Block(1, 100), "experts", "c", ready=300) == 85  # able at 215
    assert one.run(Block(1, 100), "experts", "d", ready=400) == 0
    assert (one.host, one.free, one.busy_ps) == (40, 500, 400)


def test_a_sync_drains_the_device_and_exposes_what_the_host_does_next():
    one = device()
    one.run(Block(1, 100), "dense", "a")
    assert one.sync(7) == 122
    one.run(Block(1, 100), "dense", "b")
    assert one.free == 122 + 15 + 100


def test_a_sync_waits_for_the_host_too():
    one = device()
    one.host = 1000
    assert one.sync(7) == 1007


def test_spans_cover_what_the_device_did():
    spans = []
    one = device(spans)
    one.run(Block(1, 100), "dense", "a")
    one.run(Block(1, 50), "experts", "b", ready=200)
    assert spans == [(15, 115, "dense", "a"), (200, 250, "experts", "b")]
