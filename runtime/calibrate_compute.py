"""What the device computes, and what its kernels cost the host: launches, read-backs, the grouped experts."""

from __future__ import annotations

from ..errors import UnsupportedHardwareError
from .calibrate_fit import Roofline, roofline
from .calibrate_number import Number, Numbers, fitted, timed
from .calibrate_subject import Subject
from .calibrate_timing import Timing, repeated

# The simulator charges a layer's grouped experts as this many kernels of `op_latency_s` each (sim/cost.py).
EXPERT_KERNELS = 7
PREDICTOR_KERNELS = 4  # of one call of a learned predictor, which a read-back follows. Chosen here
SLOW_S = 1.0  # larger products than one that takes this long say nothing new. Chosen here


def compute(subject: Subject) -> Numbers:
    """Rates, latencies and launch costs of the device."""
    fit, timings = experts(subject)
    return {**_rates(subject, fit, timings), **launches(subject)}


def experts(subject: Subject) -> tuple[Roofline, list[Timing]]:
    """The grouped experts by (distinct experts, rows of each). Raises UnsupportedHardwareError where there are none."""
    points = []
    for distinct in subject.effort.distinct:
        for rows in subject.effort.rows:
            try:
                call = subject.experts(distinct, rows)
                timing = repeated(lambda call=call: subject.device_seconds(call), subject.effort)  # type: ignore[misc]
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UnsupportedHardwareError(
                    f"{subject.device}: cannot compute grouped experts in bfloat16 ({reason}); choose another --device"
                ) from error
            operations = distinct * rows * subject.expert_operations
            points.append((distinct * subject.expert_bytes, operations, timing))
            if timing.seconds > SLOW_S:
                break
    timings = [timing for _, _, timing in points]
    moved, worked = [size for size, _, _ in points], [work for _, work, _ in points]
    return roofline(moved, worked, [timing.seconds for timing in timings]), timings


def _rates(subject: Subject, fit: Roofline, timings: list[Timing]) -> Numbers:
    """Peaks are what a large product and a large copy reach, or the experts where those do better."""
    multiply = subject.product()
    product = repeated(lambda: subject.device_seconds(multiply), subject.effort)
    sweep = repeated(lambda: subject.device_seconds(subject.sweep), subject.effort)
    flops = 2 * subject.product_side**3 / product.seconds
    bandwidth = subject.sweep() / sweep.seconds
    best_flops, best_bandwidth = max(flops, fit.rate), max(bandwidth, fit.bandwidth)
    side, what = subject.product_side, "grouped experts in bfloat16"
    return {
        "device.flops": Number(
            best_flops, f"bfloat16 product of {side} x {side} matrices of random numbers, {product}",
            note=f"what is reached, not the maker's peak; the product reached {flops / 1e12:.4g} TFLOP/s",
            scatter=product.spread,
        ),
        "device.flops_achieved": fitted(
            fit.rate / best_flops, fit, timings, what, note=f"{fit.rate / 1e12:.4g} TFLOP/s of `flops`"
        ),
        "device.memory_bandwidth": Number(
            best_bandwidth, f"copy within the device's memory, read and written bytes, {sweep}",
            note=f"what is reached, not the maker's peak; the copy reached {bandwidth / 1e9:.4g} GB/s",
            scatter=sweep.spread,
        ),
        "device.memory_achieved": fitted(
            fit.bandwidth / best_bandwidth, fit, timings, what, note=f"{fit.bandwidth / 1e9:.4g} GB/s"
        ),
        "device.op_latency_s": fitted(
            fit.latency / EXPERT_KERNELS, fit, timings, what,
            note=f"a {EXPERT_KERNELS}th of the {fit.latency * 1e6:.3g} us that the experts' kernels add to their work",
        ),
    }  # fmt: skip


def launches(subject: Subject) -> Numbers:
    """What the host spends per kernel and per read-back, and how long a launch is on its way."""
    sync = timed(repeated(lambda: subject.host_seconds(subject.read_back), subject.effort), "read-back of 64 choices")
    if not subject.asynchronous:
        alone = "the thread that issues a kernel computes it: its time is in op_latency_s"
        issue = latency = Number(0.0, alone, "derived")
        kernel = 0.0
    else:
        issue, kernel, latency = _launch(subject, sync.value)
    graph = Number(issue.value, "same as issue_s; not charged, since dispatch is eager", "derived")
    called = PREDICTOR_KERNELS * (issue.value + kernel) + latency.value + sync.value
    how = f"{PREDICTOR_KERNELS} small kernels issued eagerly and one read-back, from the numbers measured here"
    return {
        "host.issue_s": issue, "host.graph_issue_s": graph, "host.launch_latency_s": latency, "host.sync_s": sync,
        "host.predictor_s": Number(called, how, "derived"),
    }  # fmt: skip


def _launch(subject: Subject, sync_s: float) -> tuple[Number, float, Number]:
    """Of an asynchronous device: issue_s, seconds of a kernel that has nothing to do, launch_latency_s."""
    count, effort = subject.effort.issued, subject.effort

    def chain() -> None:
        for _ in range(count):
            subject.tiny()

    def first_and_read() -> None:
        subject.tiny()
        subject.read_back()

    issued = repeated(lambda: subject.host_seconds(chain), effort)
    kernel = repeated(lambda: subject.device_seconds(chain), effort).seconds / count
    seen = repeated(lambda: subject.host_seconds(first_and_read), effort)
    issue = timed(
        issued, f"{count} small kernels issued in a row", count, f"each takes the device {kernel * 1e6:.3g} us"
    )
    what = f"one small kernel on an idle device and a read-back, less issue_s, the kernel and sync_s, {seen}"
    seconds = max(0.0, seen.seconds - issue.value - kernel - sync_s)
    return issue, kernel, Number(seconds, what, scatter=seen.spread)
