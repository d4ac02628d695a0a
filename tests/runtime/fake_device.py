"""A device whose copies take virtual time, on which the real runtime code runs: bytes land when their copy has ended.

Until then the slot holds NaN patterns, so whoever reads it too early computes something else. Copies into a row that an
earlier computation still reads are refused.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from moeflow.runtime.backend import allocate
from torch import Tensor

LAUNCH = 1_000  # ns of virtual time that every look at the device takes the host
COMPUTE = 20_000  # ns of a launch


@dataclass(eq=False)
class FakeMark:
    began: int
    end: int


@dataclass
class FakeDevice:
    """`ns_per_byte` of the link; `slow(n)` stretches copy n; `reorder` gives copies an order of their own."""

    ns_per_byte: float = 0.5
    slow: Any = lambda n: 1.0
    reorder: int | None = None  # a seed
    most_rows: int | None = None  # allocation failure beyond
    asynchronous = True
    device: Any = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self.now = self.computed = self.link = self.copies = 0
        self.base = (0, 1)  # address and size of rows
        self.reads: dict[int, FakeMark] = {}  # row -> the computation that reads it
        self.pending: list[tuple[FakeMark, Tensor, Tensor]] = []
        self.random = random.Random(self.reorder)

    def rows(self, count: int, size: int) -> Tensor:
        if self.most_rows is not None and count > self.most_rows:
            return allocate(1 << 45, 1 << 15, self.device)
        rows = allocate(count, size, self.device).fill_(255)
        self.base = rows.data_ptr(), size
        return rows

    def host_rows(self, count: int, size: int) -> Tensor:
        return allocate(count, size, self.device)

    def pin(self, rows: Tensor) -> None:
        pass

    def unpin(self, rows: Tensor) -> None:
        pass

    def copy(self, to: Tensor, source: Tensor, after: Sequence[FakeMark]) -> FakeMark:
        row = (to.data_ptr() - self.base[0]) // self.base[1]
        reader = self.reads.get(row)
        assert reader is None or any(mark is reader for mark in after) or reader.end <= self.now, "a row is still read"
        for mark, other, _ in self.pending:
            if other.data_ptr() < to.data_ptr() + to.numel() and to.data_ptr() < other.data_ptr() + other.numel():
                assert any(mark is earlier for earlier in after), "two copies into the same bytes"
        start = max([self.now, *(mark.end for mark in after)])
        took = int(to.numel() * self.ns_per_byte * self.slow(self.copies))
        if self.reorder is None:
            start = max(start, self.link)
        else:
            start += self.random.randrange(200_000)
        mark = FakeMark(start, start + took)
        self.link = max(self.link, mark.end)
        self.copies += 1
        to.fill_(255)
        self.pending.append((mark, to, source))
        return mark

    def passed(self, mark: FakeMark) -> bool:
        self._pass_time(self.now + LAUNCH)
        return mark.end <= self.now

    def wait(self, mark: FakeMark) -> None:
        self.computed = max(self.computed, mark.end)
        self._pass_time(mark.end)

    def mark(self) -> FakeMark:
        self.computed = max(self.computed, self.now)
        return FakeMark(self.computed, self.computed)

    def join(self, mark: FakeMark) -> None:
        self._pass_time(mark.end)

    def nanoseconds(self, mark: FakeMark) -> int:
        return mark.end - mark.began

    def between(self, first: FakeMark, second: FakeMark) -> int:
        return second.end - first.end

    def free_bytes(self) -> int:
        return 1 << 30

    def watch(self, transfers: Any) -> None:
        """Learn which rows computations read."""
        told = transfers.used

        def used(slots: list[int]) -> None:
            self.computed = max(self.computed, self.now) + COMPUTE
            told(slots)
            mark = transfers._used[slots[0]] if slots else None
            self.reads.update(dict.fromkeys(slots, mark))

        transfers.used = used

    def _pass_time(self, until: int) -> None:
        self.now = max(self.now, until)
        landing = sorted((copy for copy in self.pending if copy[0].end <= self.now), key=lambda copy: copy[0].end)
        for copy in landing:
            copy[1].copy_(copy[2])
            self.pending.remove(copy)
