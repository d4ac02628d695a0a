"""Any accelerator that torch.accelerator speaks for: copies on a stream of their own, events to keep order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from .backend import Mark, allocate


class CopyMark:
    """Begin and end of a copy, as events."""

    def __init__(self, began: torch.Event, ended: torch.Event) -> None:
        self.began, self.ended = began, ended


class AcceleratorBackend:
    """Events are made with timing, which policies that read time and the statistics use."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        index = device.index if device.index is not None else torch.accelerator.current_device_index()
        self.device = torch.device(device.type, index)
        self._copies = torch.Stream(device=self.device)

    def rows(self, count: int, size: int) -> Tensor:
        rows = allocate(count, size, self.device)
        self.join(self.mark())  # the allocator may hand out memory that earlier work still reads
        return rows

    def host_rows(self, count: int, size: int) -> Tensor:
        try:
            with torch.inference_mode(False):
                return torch.empty(count, size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise InputError(
                f"{count * size / 2**30:.2f} GiB of host memory cannot be pinned ({str(error).splitlines()[0]}): "
                "give a smaller ram=, or raise the limit on locked memory"
            ) from error

    def pin(self, rows: Tensor) -> None:
        pass  # it was allocated so

    def unpin(self, rows: Tensor) -> None:
        pass

    def copy(self, to: Tensor, source: Tensor, after: Sequence[Mark]) -> CopyMark:
        for mark in after:
            self._copies.wait_event(_end(mark))
        began, ended = self._event(), self._event()
        with self._copies:
            began.record(self._copies)
            to.copy_(source, non_blocking=True)
            ended.record(self._copies)
        return CopyMark(began, ended)

    def passed(self, mark: Mark) -> bool:
        return bool(_end(mark).query())

    def wait(self, mark: Mark) -> None:
        torch.accelerator.current_stream(self.device).wait_event(_end(mark))

    def mark(self) -> torch.Event:
        event = self._event()
        event.record(torch.accelerator.current_stream(self.device))
        return event

    def join(self, mark: Mark) -> None:
        _end(mark).synchronize()

    def nanoseconds(self, mark: CopyMark) -> int:
        return round(mark.began.elapsed_time(mark.ended) * 1e6)

    def between(self, first: Mark, second: Mark) -> int:
        return round(_end(first).elapsed_time(_end(second)) * 1e6)

    def free_bytes(self) -> int:
        free, _ = torch.get_device_module(self.device).mem_get_info(self.device)
        return int(free)

    def _event(self) -> torch.Event:
        return torch.Event(device=self.device, enable_timing=True)


def _end(mark: Mark) -> torch.Event:
    return mark.ended if isinstance(mark, CopyMark) else mark
