"""Copies of experts into device slots: demand ahead of prefetch, in chunks, cancelled until they are submitted.

What is held is `Residency`'s business; here is only whether a slot's bytes have landed. A copy that failed or was
cancelled leaves its slot without bytes, and whoever needs them asks again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from .backend import DeviceBackend, Mark
from .layout import Field

CHUNK = 4 << 20  # bytes; 160 us at 25 GB/s: how long a demand may stand behind a prefetch that has begun. Chosen here
AHEAD = 2 * CHUNK  # prefetched bytes under way at most, so that the link is never idle between two looks. Chosen here


class Fetch(Protocol):
    """An expert's row on its way into host memory, or there already."""

    @property
    def landed(self) -> bool:
        """`row` would not block."""

    def row(self) -> Tensor:
        """The bytes [size] uint8. Blocks; raises what kept them from being read."""

    def sent(self, mark: Mark) -> None:
        """The device has been told to copy them; they must stay until `mark`."""

    def hurry(self) -> None:
        """The device waits for them."""

    def drop(self) -> None:
        """They are not wanted any more; nothing has been or will be sent."""


class Source(Protocol):
    """Where experts come from."""

    def fetch(self, key: int, urgent: bool) -> Fetch:
        """Begin to bring expert `key` = layer * experts + expert into host memory."""


@dataclass(eq=False)
class Copy:
    """What a slot holds or is about to hold."""

    key: int
    slot: int
    kind: str
    fetch: Fetch
    sent: int = 0  # bytes submitted
    marks: list[Mark] = field(default_factory=list)


@dataclass
class Traffic:
    """Bytes submitted, by why. Wasted ones are counted in `prefetch` too; `padding` serves tokens nobody reads."""

    demand: int = 0
    stream: int = 0
    prefetch: int = 0
    wasted: int = 0
    padding: int = 0
    copies: int = 0


class Transfers:
    """One device's slots `rows` [slots, size]. Not safe for threads: only the thread that runs the model calls it."""

    def __init__(self, backend: DeviceBackend, source: Source, rows: Tensor) -> None:
        self.backend, self.source, self.rows, self.size = backend, source, rows, rows.shape[1]
        self.traffic = Traffic()
        self.landed: list[tuple[int, int]] = []  # (key, nanoseconds) of copies whose end has been seen
        self.report = False  # keep `landed`
        self.stalls: list[tuple[int, int]] = []  # (layer, nanoseconds) that the device waited for experts of it
        self.lost_prefetches = 0  # their bytes could not be read
        self.complete = np.full(len(rows), -1, np.int64)  # the key whose bytes are known to have landed in each slot
        self._copy: list[Copy | None] = [None] * len(rows)
        self._used: list[Mark] = [None] * len(rows)  # end of the computation that read each slot last
        self._written: list[list[Mark]] = [[] for _ in rows]  # ends of copies into each slot that may be under way
        self._ahead: deque[Copy] = deque()  # prefetches with unsent bytes
        self._reading: list[Copy] = []  # demand whose bytes are still being read
        self._unseen: list[Copy] = []
        self._under_way: deque[tuple[Mark, int]] = deque()  # (mark, bytes) of prefetched chunks
        self._waits: deque[tuple[int, Mark, Mark]] = deque()  # layer, begin and end of a wait
        self._blocked_ns = 0  # the host waited for a read, or copied by itself
        self._expected: dict[int, Copy] = {}  # prefetches by key until their layer is routed

    def demand(self, key: int, slot: int, kind: str = "demand") -> None:
        """`key` is needed in `slot` now: what is missing of it goes ahead of every prefetch."""
        copy = self._copy[slot]
        if copy is None or copy.key != key or kind != "demand":  # what is streamed is dropped after use, always
            copy = self._begin(key, slot, kind)
        elif copy.sent == self.size or copy in self._reading:
            return
        else:
            self._leave_queue(copy)
            copy.kind = kind
            copy.fetch.hurry()
        if copy.fetch.landed:
            self._send_rest(copy)
        else:
            self._reading.append(copy)

    def prefetch(self, key: int, slot: int, expected: bool = True) -> None:
        """`key` shall come to `slot` when the link is idle. `expected`: for a layer that is yet to be routed."""
        copy = self._begin(key, slot, "prefetch")
        self._ahead.append(copy)
        if expected:
            self._expected[key] = copy

    @property
    def expects(self) -> bool:
        """There are prefetches whose layer is yet to be routed."""
        return bool(self._expected)

    def settle(self, keys: range, needed: set[int]) -> None:
        """The layer with these keys is routed: prefetches that it does not need are wasted, unsent ones cancelled."""
        if not self._expected:
            return
        for key in [key for key in self._expected if key in keys]:
            copy = self._expected.pop(key)
            if key not in needed:
                self.traffic.wasted += copy.sent
                self._abandon(copy)

    def has(self, key: int, slot: int) -> bool:
        """All bytes of `key` have landed in `slot`."""
        if self.complete[slot] == key:
            return True
        copy = self._copy[slot]
        if copy is None or copy.key != key or copy.sent < self.size:
            return False
        if all(self.backend.passed(mark) for mark in copy.marks):
            self.complete[slot] = key
        return bool(self.complete[slot] == key)

    def wait(self, slots: list[int], layer: int) -> None:
        """What is computed from now on finds these slots' bytes. Raises when they cannot be read."""
        marks = []
        for slot in slots:
            copy = self._copy[slot]
            if copy is not None and self.complete[slot] == copy.key:
                continue
            if copy is None:
                raise RuntimeError(f"nothing was asked to come to slot {slot}")
            if copy.sent < self.size:
                self._leave_queue(copy)
                if copy in self._reading:
                    self._reading.remove(copy)
                self._send_rest(copy)
            marks += [mark for mark in copy.marks if not self.backend.passed(mark)]
        self._hold(marks, layer)

    def _hold(self, marks: list[Mark], layer: int) -> None:
        """Let the device wait, and note from when to when."""
        if marks:
            began = self.backend.mark()
            for mark in marks:
                self.backend.wait(mark)
            self._waits.append((layer, began, self.backend.mark()))
        if self._blocked_ns:
            self.stalls.append((layer, self._blocked_ns))
            self._blocked_ns = 0

    def part(self, key: int, slot: int, wanted: Field, kind: str, layer: int) -> None:
        """One field of an expert into a scratch slot, readable by what is computed from now on."""
        fetch = self.source.fetch(key, True)
        row = self._row(fetch, slot)
        after, place = self._before(slot, ()), slice(wanted.first, wanted.end)
        mark = self.backend.copy(self.rows[slot, place], row[place], after)
        fetch.sent(mark)
        self._written[slot].append(mark)
        self._copy[slot], self.complete[slot] = None, -1
        self._count(kind, wanted.size)
        self._block(mark)
        self._hold([mark] if self.backend.asynchronous else [], layer)

    def used(self, slots: list[int]) -> None:
        """What has been computed so far reads these slots."""
        if not self.backend.asynchronous:
            return
        mark = self.backend.mark()
        for slot in slots:
            self._used[slot] = mark

    def pump(self) -> None:
        """Submit what has been read, then prefetches as far as the link is idle. Cheap when there is nothing to do."""
        if self._reading:
            for copy in [copy for copy in self._reading if copy.fetch.landed]:
                self._reading.remove(copy)
                self._send_rest(copy)
        if not (self._ahead or self._under_way or self._waits or self.report):
            return
        while self._under_way and self.backend.passed(self._under_way[0][0]):
            self._under_way.popleft()
        room = AHEAD - sum(size for _, size in self._under_way)
        while self._ahead and room > 0 and not self._reading and self._ahead[0].fetch.landed:
            copy = self._ahead[0]
            try:
                size = self._send_chunk(copy)
            except OSError:  # nobody needs it yet: whoever does reads again, and is told
                self._abandon(copy)
                self.lost_prefetches += 1
                continue
            self._under_way.append((copy.marks[-1], size))
            room -= size
            if copy.sent == self.size:
                self._ahead.popleft()
        while self._waits and self.backend.passed(self._waits[0][2]):
            layer, began, ended = self._waits.popleft()
            self.stalls.append((layer, self.backend.between(began, ended)))
        if self.report:
            self._see()

    def forget(self) -> None:
        """Let go of every slot's bytes, once nothing reads or writes them any more."""
        for mark in [*self._used, *(mark for marks in self._written for mark in marks)]:
            if mark is not None:
                self.backend.join(mark)
        for copy in self._copy:
            if copy is not None:
                self._abandon(copy)
        self._copy, self.complete[:] = [None] * len(self.rows), -1
        self._expected.clear()

    def _begin(self, key: int, slot: int, kind: str) -> Copy:
        old = self._copy[slot]
        if old is not None:
            self._abandon(old)
            if self._expected.get(old.key) is old:
                del self._expected[old.key]
        self._copy[slot], self.complete[slot] = None, -1  # should the source refuse
        copy = Copy(key, slot, kind, self.source.fetch(key, kind != "prefetch"))
        self._copy[slot] = copy
        return copy

    def _before(self, slot: int, own: Sequence[Mark]) -> list[Mark]:
        """What has to pass before the slot's bytes may be written; `own` marks are of the same copy."""
        self._written[slot] = [mark for mark in self._written[slot] if not self.backend.passed(mark)]
        used = self._used[slot]
        if used is not None and self.backend.passed(used):
            self._used[slot] = used = None
        others = [mark for mark in self._written[slot] if mark not in own]
        return others if used is None else [used, *others]

    def _abandon(self, copy: Copy) -> None:
        """What is not sent yet stays unsent, and the slot has no expert; what has been sent whole stays."""
        self._leave_queue(copy)
        if copy in self._reading:
            self._reading.remove(copy)
        if copy.sent < self.size:
            copy.fetch.drop()
            if self._copy[copy.slot] is copy:
                self._copy[copy.slot] = None

    def _leave_queue(self, copy: Copy) -> None:
        if copy in self._ahead:
            self._ahead.remove(copy)

    def _row(self, fetch: Fetch, slot: int) -> Tensor:
        began = time.perf_counter_ns()
        try:
            ready = fetch.landed
            row = fetch.row()
            self._blocked_ns += 0 if ready else time.perf_counter_ns() - began
            return row
        except Exception:
            copy = self._copy[slot]
            if copy is not None and copy.fetch is fetch:
                self._leave_queue(copy)
                self._copy[slot] = None
            raise

    def _send_rest(self, copy: Copy) -> None:
        while copy.sent < self.size:
            self._send_chunk(copy)

    def _send_chunk(self, copy: Copy) -> int:
        row = self._row(copy.fetch, copy.slot)
        first, last = copy.sent, min(copy.sent + CHUNK, self.size)
        after = self._before(copy.slot, copy.marks)
        copy.marks.append(self.backend.copy(self.rows[copy.slot, first:last], row[first:last], after))
        self._written[copy.slot].append(copy.marks[-1])
        self._block(copy.marks[-1])
        copy.sent = last
        self._count(copy.kind, last - first)
        if last == self.size:
            copy.fetch.sent(copy.marks[-1])
            if self.report:
                self._unseen.append(copy)
        return last - first

    def _block(self, mark: Mark) -> None:
        """Where copies do not go on while the device computes, each holds it up."""
        if not self.backend.asynchronous:
            self._blocked_ns += self.backend.nanoseconds(mark)

    def _count(self, kind: str, size: int) -> None:
        setattr(self.traffic, kind, getattr(self.traffic, kind) + size)
        self.traffic.copies += 1

    def _see(self) -> None:
        done = [copy for copy in self._unseen if all(self.backend.passed(mark) for mark in copy.marks)]
        for copy in done:
            self._unseen.remove(copy)
            self.landed.append((copy.key, sum(self.backend.nanoseconds(mark) for mark in copy.marks)))
