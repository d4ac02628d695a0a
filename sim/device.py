"""The compute stream and the host thread that feeds it, as two moments in time."""

from __future__ import annotations

from ..traces.timeline import Span as Span
from .cost import Block, CostModel


class HostThread:
    """`at`: when it is free. It issues for every device of a run."""

    def __init__(self) -> None:
        self.at = 0


class Device:
    """`host`: when the host thread is free. `free`: when the device has finished what was issued. Picoseconds.

    A kernel starts when the device is free and its launch has arrived, whichever is later: a host that issues
    slower than the device computes is what the run waits for.
    """

    def __init__(
        self, cost: CostModel, spans: list[Span] | None = None, thread: HostThread | None = None, name: str = ""
    ) -> None:
        self.thread = thread or HostThread()
        self.free = 0
        self.busy_ps = 0
        self.spans, self._name = spans, name
        self._issue, self._latency = cost.issue_ps, cost.launch_latency_ps

    @property
    def host(self) -> int:
        return self.thread.at

    @host.setter
    def host(self, moment: int) -> None:
        self.thread.at = moment

    def run(self, block: Block, track: str, label: str, ready: int = 0) -> int:
        """Issue a block whose inputs are complete at `ready`; returns how long the device idled for them."""
        able = max(self.free, self.host + self._issue + self._latency)
        start = max(able, ready)
        self.host, self.free = after(block, self.host, self.free, self._issue, self._latency, ready)
        self.busy_ps += block.device_ps
        if self.spans is not None:
            self.spans.append((start, self.free, track + self._name, label))
        return start - able

    def hold_up(self, moment: int) -> int:
        """The host thread does nothing until `moment`; returns how much later the device can begin its next block."""
        able = max(self.free, self.host + self._issue + self._latency)
        self.host = max(self.host, moment)
        return max(self.free, self.host + self._issue + self._latency) - able

    def sync(self, cost_ps: int) -> int:
        """The host waits until the device has drained, then reads a result; returns when it has it."""
        self.host = max(self.host, self.free) + cost_ps
        return self.host


def after(block: Block, host: int, free: int, issue_ps: int, latency_ps: int, ready: int = 0) -> tuple[int, int]:
    """(host, device) free again after `block`, whose kernels are taken as equally long.

    Either the first kernel is late and the rest follow at once, or the host issues so slowly that the last kernel
    starts only when its launch arrives; nothing in between can be later than both.
    """
    first = max(free, host + issue_ps + latency_ps, ready)
    host += block.launches * issue_ps
    last = -(-block.device_ps // block.launches)
    return host, max(first + block.device_ps, host + latency_ps + last)
