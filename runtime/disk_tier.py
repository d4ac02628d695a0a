"""Experts on disk, with as many of them in host memory as fit: the most recently used.

A row of host memory is busy from the moment its read is asked for until the device has copied it; busy rows are never
given away. One row more is kept back: through it an expert always finds its way, however few rows there are.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .backend import DeviceBackend, Mark
from .read_queue import ReadQueue


class Saved(Protocol):
    """Experts on disk."""

    def read(self, key: int, row: Tensor) -> None:
        """Fill `row` [size] uint8 with expert `key`. Raises OSError. Called from several threads."""

    def statistics(self) -> dict[str, Any]:
        """What has been read, and how."""

    def close(self) -> None:
        """Nothing more will be read."""


@dataclass(eq=False)
class Row:
    """A row of host memory and what is in it, or coming."""

    at: int
    key: int
    read: Future[None]
    users: int = 0  # fetches that have not been sent
    mark: Mark = None  # end of the last copy out of it


class FromDisk:
    """One expert on its way (see `Fetch` in transfers.py)."""

    def __init__(self, tier: DiskTier, key: int, urgent: bool) -> None:
        self.tier, self.key, self.urgent = tier, key, urgent
        self.held: Row | None = None
        self._spare = False

    @property
    def landed(self) -> bool:
        return (self.held is not None or self.tier.start(self)) and self.held is not None and self.held.read.done()

    def row(self) -> Tensor:
        if self._spare:
            return self.tier.rows[-1]
        if self.held is None and not self.tier.start(self):
            row = self.tier.through_spare(self.key)
            self._spare = True
            return row
        assert self.held is not None
        try:
            self.held.read.result()
        except BaseException:
            self.tier.lost(self.held)
            raise
        return self.tier.rows[self.held.at]

    def sent(self, mark: Mark) -> None:
        if self._spare:
            self.tier.spare_mark = mark
        elif self.held is not None:
            self.held.users -= 1
            self.held.mark = mark

    def hurry(self) -> None:
        self.urgent = True
        if self.held is not None:
            self.tier.queue.hurry(self.held.read)

    def drop(self) -> None:
        if self.held is not None:
            self.held.users -= 1
            self.held = None


class DiskTier:
    """`rows` [n + 1, size] of host memory before `saved` experts on disk. Used by one thread; others only read."""

    def __init__(self, backend: DeviceBackend, saved: Saved, rows: Tensor) -> None:
        self.backend, self.saved, self.rows = backend, saved, rows
        self.queue = ReadQueue()
        weakref.finalize(self, self.queue.close)  # of a model that is dropped without being detached
        self.reads = self.found = 0
        self.spare_mark: Mark = None
        self._held: OrderedDict[int, Row] = OrderedDict()  # by key, least recently used first
        self._free = list(range(len(rows) - 1))

    def fetch(self, key: int, urgent: bool) -> FromDisk:
        """Begin to bring an expert into host memory, if it is not there and a row is to be had."""
        fetch = FromDisk(self, key, urgent)
        self.start(fetch)
        return fetch

    def start(self, fetch: FromDisk) -> bool:
        """Give a fetch its row, and its read if that is needed; False as long as every row is busy."""
        row = self._held.get(fetch.key)
        if row is None:
            at = self._idle_row()
            if at is None:
                return False
            self.reads += 1
            read = self.queue.submit(lambda: self.saved.read(fetch.key, self.rows[at]), fetch.urgent)
            row = self._held[fetch.key] = Row(at, fetch.key, read)
        else:
            self.found += 1
            self._held.move_to_end(fetch.key)
            if fetch.urgent:
                self.queue.hurry(row.read)
        row.users += 1
        fetch.held = row
        return True

    def through_spare(self, key: int) -> Tensor:
        """Read an expert now, into the row that is kept back."""
        if self.spare_mark is not None:
            self.backend.join(self.spare_mark)
        self.reads += 1
        self.saved.read(key, self.rows[-1])
        return self.rows[-1]

    def lost(self, row: Row) -> None:
        """A read has failed: whoever wants the expert again reads again."""
        if self._held.get(row.key) is row:
            del self._held[row.key]
            self._free.append(row.at)

    def statistics(self) -> dict[str, Any]:
        """Experts wanted from here: how many were in memory, how many were read, and how."""
        return {
            "rows_in_ram": len(self.rows) - 1,
            "found_in_ram": self.found,
            "experts_read": self.reads,
            **self.saved.statistics(),
        }

    def close(self) -> None:
        self.queue.close()
        self.saved.close()
        self.backend.unpin(self.rows)
        self.rows = torch.empty(0, self.rows.shape[1], dtype=torch.uint8)

    def _idle_row(self) -> int | None:
        if self._free:
            return self._free.pop()
        for key, row in self._held.items():
            if not row.users and row.read.done() and (row.mark is None or self.backend.passed(row.mark)):
                del self._held[key]
                return row.at
        return None
