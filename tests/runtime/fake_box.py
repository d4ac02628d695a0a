"""A box whose every number is known, on the fake device's virtual clock: what calibration should find again.

Copies go through the runtime's own calls: each costs the host its submission, waits for its direction's engine, pays
alpha when that was idle, and shares bandwidth while the other direction runs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fake_device import FakeDevice, FakeMark
from moeflow.runtime.backend import allocate
from moeflow.runtime.calibrate_compute import EXPERT_KERNELS
from moeflow.runtime.calibrate_subject import Beside, Subject
from moeflow.runtime.calibrate_timing import KIB, MIB, Effort
from torch import Tensor

EFFORT = Effort(copy_bytes=(64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB), buffer_bytes=64 * MIB)


@dataclass(frozen=True)
class Truth:
    """Bytes/s, FLOP/s and nanoseconds."""

    pinned: float = 25.0e9
    pageable: float = 8.0e9
    back: float = 20.0e9
    duplex: float = 0.8
    alpha: int = 10_000
    submit: int = 5_000
    issue: int = 8_000
    launch: int = 4_000
    sync: int = 20_000
    op: int = 3_000
    flops: float = 70e12
    experts_flops: float = 50e12
    memory: float = 900e9
    experts_memory: float = 700e9
    host_memory: float = 60e9
    cpu_flops: float = 6e11


@dataclass(eq=False)
class Asked:
    """A copy that has been submitted."""

    mark: FakeMark
    at: int
    left: float
    rate: float


class FakeLink(FakeDevice):
    """Both directions of a link and the device's compute, on one clock."""

    def __init__(self, truth: Truth, slow: Callable[[int], float] = lambda n: 1.0) -> None:
        super().__init__(slow=slow)
        self.truth = truth
        self.queues: dict[str, list[Asked]] = {"there": [], "back": []}
        self.idle = {"there": 0, "back": 0}
        self.pinned: list[Tensor] = []

    def host_rows(self, count: int, size: int) -> Tensor:
        self.pinned.append(allocate(count, size, self.device))
        return self.pinned[-1]

    def copy(self, to: Tensor, source: Tensor, after: Sequence[FakeMark]) -> FakeMark:
        lies = [rows.data_ptr() <= source.data_ptr() < rows.data_ptr() + rows.numel() for rows in self.pinned]
        return self.ask("there", source.numel(), self.truth.pinned if any(lies) else self.truth.pageable)

    def ask(self, way: str, size: int, rate: float) -> FakeMark:
        self.now += self.truth.submit
        asked = Asked(FakeMark(0, 0), self.now, size * self.slow(self.copies), rate)
        self.copies += 1
        self.queues[way].append(asked)
        return asked.mark

    def join(self, mark: FakeMark) -> None:
        self.settle()
        super().join(mark)

    def settle(self) -> None:
        """Give every copy its end."""
        now = 0.0
        while heads := {way: queue[0] for way, queue in self.queues.items() if queue}:
            begins = {
                way: head.at + self.truth.alpha if head.at >= self.idle[way] else self.idle[way]
                for way, head in heads.items()
            }
            now = max(now, min(begins.values()))
            moving = [way for way in heads if begins[way] <= now]
            share = self.truth.duplex if len(moving) == 2 else 1.0
            ends = {way: now + heads[way].left / (heads[way].rate * share) * 1e9 for way in moving}
            until = min([*ends.values(), *(begin for begin in begins.values() if begin > now)])
            for way in moving:
                heads[way].left -= (until - now) * heads[way].rate * share / 1e9
                if ends[way] <= until:
                    heads[way].mark.end = self.idle[way] = round(until)
                    self.queues[way].pop(0)
            now = until


class Reverse:
    """The second backend of a subject: copies back to the host."""

    def __init__(self, link: FakeLink) -> None:
        self.link, self.join = link, link.join

    def copy(self, to: Tensor, source: Tensor, after: Sequence[FakeMark]) -> FakeMark:
        return self.link.ask("back", source.numel(), self.link.truth.back)


class FakeBox(Subject):
    """Kernels are virtual; what times them, and the copies, are the subject's own code."""

    def __init__(self, truth: Truth, effort: Effort = EFFORT, slow: Callable[[int], float] = lambda n: 1.0) -> None:
        self.truth, self.effort = truth, effort
        self.link: Any = FakeLink(truth, slow)
        self.backend, self._back = self.link, Reverse(self.link)
        self.device, self.asynchronous = torch.device("cpu"), True
        size = effort.buffer_bytes
        self._near = self.link.rows(1, size)[0]
        self._far = {"h2d": self.link.host_rows(1, size), "d2h": self.link.host_rows(1, size)}
        self._far["pageable"] = allocate(1, size, self.device)
        self._at, self._beside = 0, False

    def now(self) -> int:
        return self.link.now

    def issue(self, nanoseconds: float, kernels: int = 1) -> None:
        """Kernels that keep the device busy for so long together."""
        for _ in range(kernels):
            self.link.now += self.truth.issue
            begins = max(self.link.computed, self.link.now + self.truth.launch)
            self.link.computed = begins + round(nanoseconds / kernels)

    def tiny(self) -> None:
        self.issue(self.truth.op)

    def read_back(self) -> None:
        self.link.now = max(self.link.now, self.link.computed) + self.truth.sync

    def hold(self) -> None:
        self.issue(5_000_000)

    def sweep(self) -> int:
        self.issue(EFFORT.buffer_bytes / self.truth.memory * 1e9)
        return EFFORT.buffer_bytes

    def product(self) -> Callable[[], object]:
        return lambda: self.issue(2 * self.product_side**3 / self.truth.flops * 1e9)

    def experts(self, distinct: int, rows: int) -> Callable[[], object]:
        moved = distinct * self.expert_bytes / self.truth.experts_memory
        worked = distinct * rows * self.expert_operations / self.truth.experts_flops
        took = max(moved, worked) * 1e9 + EXPERT_KERNELS * self.truth.op
        return lambda: self.issue(took, EXPERT_KERNELS)

    def host_expert(self, rows: int) -> Callable[[], object]:
        def call() -> None:
            memory = self.truth.host_memory - (self.truth.pinned if self._beside else 0)
            took = max(self.expert_bytes / memory, rows * self.expert_operations / self.truth.cpu_flops)
            self.link.now += round(took * 1e9)

        return call

    @contextmanager
    def copying(self) -> Iterator[Beside]:
        beside, began, self._beside = Beside(), self.now(), True
        yield beside
        beside.seconds, self._beside = (self.now() - began) / 1e9, False
        beside.bytes = round(beside.seconds * self.truth.pinned)
