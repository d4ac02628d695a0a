"""Bytes on their way from the device to the host: packed into one copy per forward pass, looked at when they land."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Layout = list[tuple[str, np.dtype[Any], tuple[int, ...]]]

IN_FLIGHT = 8  # copies that may be outstanding
_SMALLEST = 4096  # bytes of a pinned buffer
_NUMPY = {torch.int32: "<i4", torch.uint8: "u1", torch.int16: "<u2", torch.float16: "<f2"}  # int16: ids, -1 all ones


def pack(columns: Mapping[str, Tensor]) -> tuple[Tensor, Layout]:
    """Columns of one device as one run of bytes there, and what lies where."""
    layout = [(name, np.dtype(_NUMPY[column.dtype]), tuple(column.shape)) for name, column in columns.items()]
    return torch.cat([column.contiguous().view(-1).view(torch.uint8) for column in columns.values()]), layout


def unpack(payload: Array, layout: Layout) -> dict[str, Array]:
    """The columns of `pack`, copied out of `payload` (uint8, at least as long)."""
    columns, at = {}, 0
    for name, dtype, shape in layout:
        size = math.prod(shape) * dtype.itemsize
        columns[name] = np.frombuffer(payload[at : at + size].tobytes(), dtype).reshape(shape)
        at += size
    return columns


class HostRing:
    """Copies under way to pinned host memory, oldest first, at most `IN_FLIGHT`.

    On a host device nothing is copied: payloads come back at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_host = device.type == "cpu"
        self.waiting: deque[tuple[Any, Tensor, Any]] = deque()
        self.spare: list[Tensor] = []
        self.epoch = self.now()

    def push(self, payload: Tensor, note: Any) -> None:
        """Start copying `payload`, uint8 on the device; `ready` returns it with `note`. Never waits."""
        if self.on_host:
            self.waiting.append((note, payload, None))
            return
        buffer = self._buffer(payload.numel())
        buffer[: payload.numel()].copy_(payload, non_blocking=True)
        landed = torch.Event(self.device)
        landed.record()
        self.waiting.append((note, buffer, landed))

    def ready(self, everything: bool = False) -> Iterator[tuple[Any, Array]]:
        """(note, bytes) of copies that have landed. Waits for them while the ring is full, or for `everything`.

        The bytes are valid until the next iteration.
        """
        while self.waiting:
            note, buffer, landed = self.waiting[0]
            if landed is not None and not landed.query():
                if not everything and len(self.waiting) < IN_FLIGHT:
                    return
                landed.synchronize()
            self.waiting.popleft()
            yield note, buffer.numpy()
            if landed is not None:
                self.spare.append(buffer)

    def _buffer(self, size: int) -> Tensor:
        """Pinned memory of at least `size` bytes, used again where one fits."""
        for place, buffer in enumerate(self.spare):
            if size <= buffer.numel() <= max(_SMALLEST, 4 * size):
                return self.spare.pop(place)
        self.spare.clear()  # a prompt's buffer is not kept for the tokens after it
        return torch.empty(max(_SMALLEST, size), dtype=torch.uint8, pin_memory=True)

    def now(self) -> Any:
        """A moment on the device's own clock, for `nanoseconds` to read later."""
        if self.on_host:
            return time.perf_counter_ns()
        mark = torch.Event(self.device, enable_timing=True)
        mark.record()
        return mark

    def nanoseconds(self, mark: Any) -> int:
        """From the making of the ring to `mark`."""
        if self.on_host:
            return int(mark - self.epoch)
        mark.synchronize()
        return int(self.epoch.elapsed_time(mark) * 1e6)  # milliseconds
