"""Calibration finds the numbers that a box was built with, and its fits those of the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from fake_box import EFFORT, FakeBox, Truth
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.runtime.calibrate_compute import EXPERT_KERNELS, compute
from moeflow.runtime.calibrate_fit import line, roofline
from moeflow.runtime.calibrate_host import host
from moeflow.runtime.calibrate_link import link
from moeflow.runtime.calibrate_number import Numbers
from moeflow.runtime.calibrate_profile import doubtful
from moeflow.runtime.calibrate_storage import request
from moeflow.runtime.calibrate_timing import KIB, Effort, repeated
from moeflow.sim.cost import KERNELS

SIZES = EFFORT.copy_bytes
OTHER = Truth(
    pinned=350e9, pageable=60e9, back=170e9, duplex=1.0, alpha=8_000, submit=20_000, issue=30_000, launch=0, sync=6_000,
    op=9_000, flops=600e12, experts_flops=600e12, memory=3000e9, experts_memory=3000e9, host_memory=480e9,
    cpu_flops=3e12,
)  # fmt: skip


def expected(truth: Truth) -> dict[str, float]:
    """SI units."""
    return {
        "link.h2d.alpha_s": truth.alpha / 1e9,
        "link.h2d.bandwidth": truth.pinned,
        "link.h2d.pageable_bandwidth": truth.pageable,
        "link.d2h.alpha_s": truth.alpha / 1e9,
        "link.d2h.bandwidth": truth.back,
        "link.duplex": truth.duplex,
        "link.submit_s": truth.submit / 1e9,
        "link.submit_batched_s": truth.submit / 1e9,
        "host.issue_s": truth.issue / 1e9,
        "host.graph_issue_s": truth.issue / 1e9,
        "host.launch_latency_s": truth.launch / 1e9,
        "host.sync_s": truth.sync / 1e9,
        "host.memory_bandwidth": truth.host_memory,
        "host.cpu_flops": truth.cpu_flops,
        "device.op_latency_s": truth.op / 1e9,
    }


def found(box: FakeBox) -> Numbers:
    return link(box) | compute(box) | host(box)


@pytest.mark.parametrize("truth", [Truth(), OTHER])
def test_every_number_of_a_known_box_is_found_again(truth: Truth) -> None:
    numbers = found(FakeBox(truth))
    values = {path: number.value for path, number in numbers.items()}
    for path, value in expected(truth).items():
        assert values[path] == pytest.approx(value, rel=0.03, abs=1e-9), path
    assert values["device.flops"] * values["device.flops_achieved"] == pytest.approx(truth.experts_flops, rel=0.03)
    reached = values["device.memory_bandwidth"] * values["device.memory_achieved"]
    assert reached == pytest.approx(truth.experts_memory, rel=0.03)
    assert values["device.flops"] == pytest.approx(truth.flops, rel=0.03)
    assert values["device.memory_bandwidth"] == pytest.approx(truth.memory, rel=0.03)
    assert not doubtful(numbers)


def test_copies_that_now_and_then_take_thrice_as_long_change_nothing() -> None:
    numbers = link(FakeBox(Truth(), slow=lambda n: 3.0 if n % 7 == 0 else 1.0))
    assert numbers["link.h2d.bandwidth"].value == pytest.approx(25e9, rel=0.03)
    assert numbers["link.h2d.alpha_s"].value == pytest.approx(10e-6, rel=0.05)


def test_a_box_that_scatters_is_doubted() -> None:
    random = np.random.default_rng(0)
    numbers = link(FakeBox(Truth(), slow=lambda n: random.uniform(1, 4)))
    assert "link.h2d.bandwidth" in doubtful(numbers)


def test_the_simulator_charges_the_experts_as_many_kernels_as_their_latency_is_divided_by() -> None:
    assert KERNELS["experts"] == EXPERT_KERNELS


@settings(max_examples=60)
@given(alpha=st.floats(0, 50e-6), rate=st.floats(1e9, 500e9), outlier=st.integers(0, len(SIZES) - 1))
def test_a_line_is_found_despite_one_point_far_off(alpha: float, rate: float, outlier: int) -> None:
    seconds = [alpha + size / rate for size in SIZES]
    fit = line(SIZES, seconds)
    assert fit.rate == pytest.approx(rate, rel=0.01)
    assert fit.alpha == pytest.approx(alpha, rel=0.01, abs=0.01 * min(seconds))
    seconds[outlier] *= 2
    assert line(SIZES, seconds).rate == pytest.approx(rate, rel=0.6)


def test_a_line_of_equal_times_has_a_finite_rate() -> None:
    fit = line(SIZES, [1e-3] * len(SIZES))
    assert 0 < fit.rate < 1e15
    assert fit.fixed > 0.9 > fit.off


@settings(max_examples=40)
@given(
    bandwidth=st.floats(1e11, 4e12), per_byte=st.floats(20, 200), latency=st.floats(1e-6, 60e-6), seed=st.integers(0, 9)
)
def test_a_roofline_is_found(bandwidth: float, per_byte: float, latency: float, seed: int) -> None:
    size, work = 9.4e6, 9.4e6
    points = [
        (distinct * size, distinct * rows * work) for distinct in (1, 4, 16) for rows in (1, 4, 16, 64, 256, 1024)
    ]
    noise = np.random.default_rng(seed).uniform(0.99, 1.01, len(points))
    rate = bandwidth * per_byte
    seconds = [(max(b / bandwidth, o / rate) + latency) * n for (b, o), n in zip(points, noise, strict=True)]
    fit = roofline([b for b, _ in points], [o for _, o in points], seconds)
    assert fit.bandwidth == pytest.approx(bandwidth, rel=0.05)
    assert fit.rate == pytest.approx(rate, rel=0.05)
    assert fit.latency == pytest.approx(latency, rel=0.2, abs=1e-6)
    assert fit.off < 0.02


def test_repetitions_leave_out_the_warm_up_and_end_early_when_they_take_long() -> None:
    times = iter([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    timing = repeated(lambda: next(times), Effort(fewest=3))
    assert (timing.seconds, timing.spread, timing.repetitions) == (2.0, 0.5, 3)
    assert str(timing) == "median of 3 repetitions, spread 50.0%"
    assert repeated(lambda: 0.0, Effort()).spread == 0


def test_the_request_is_the_least_whose_latency_allows_the_rate() -> None:
    latencies = {128 * KIB: 200e-6, 1024 * KIB: 600e-6}
    rates = {(128 * KIB, 1): 0.6e9, (128 * KIB, 4): 2.0e9, (1024 * KIB, 1): 1.7e9, (1024 * KIB, 4): 2.5e9}
    assert request(latencies, rates) == (2.5e9, 128 * KIB, 4)  # 4 * 128 KiB / 200 us = 2.6 GB/s
    rates[1024 * KIB, 4] = 5e9
    assert request(latencies, rates) == (5e9, 1024 * KIB, 4)
    rates[1024 * KIB, 4] = 50e9  # nothing allows it: the nearest
    assert request(latencies, rates) == (50e9, 1024 * KIB, 4)
