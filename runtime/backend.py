"""What the runtime asks of a device, and the host's own memory as one.

Marks are points in a device's work: of a copy (`copy` returns it) or of everything computed so far (`mark`). A slot may
be written once the computation that reads it has passed, and read once its copy has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError

Mark = Any  # None: nothing to wait for


class DeviceBackend(Protocol):
    """`asynchronous` says that copies go on while the device computes."""

    device: torch.device
    asynchronous: bool

    def rows(self, count: int, size: int) -> Tensor:
        """Device memory [count, size] uint8. Raises InputError when there is not so much."""

    def host_rows(self, count: int, size: int) -> Tensor:
        """Host memory [count, size] uint8 that copies will read from."""

    def pin(self, rows: Tensor) -> None:
        """Host memory has been filled: lock its pages, so that copies from it run on their own."""

    def unpin(self, rows: Tensor) -> None:
        """Undo `pin`, before the memory goes."""

    def copy(self, to: Tensor, source: Tensor, after: Sequence[Mark]) -> Mark:
        """Copy bytes from the host once `after` have passed; returns the mark of its end."""

    def passed(self, mark: Mark) -> bool:
        """Whether the mark has been reached."""

    def wait(self, mark: Mark) -> None:
        """What is computed from now on comes after the mark."""

    def mark(self) -> Mark:
        """The end of everything computed so far."""

    def join(self, mark: Mark) -> None:
        """Hold the host until the mark has been reached."""

    def nanoseconds(self, mark: Mark) -> int:
        """How long the copy took that ended with the mark."""

    def between(self, first: Mark, second: Mark) -> int:
        """Nanoseconds from one mark to another, both passed."""

    def free_bytes(self) -> int:
        """Device memory that slots may take."""


class HostBackend:
    """Slots in the host's own memory: a copy is done when the call returns."""

    asynchronous = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def rows(self, count: int, size: int) -> Tensor:
        return allocate(count, size, self.device)

    def host_rows(self, count: int, size: int) -> Tensor:
        return allocate(count, size, self.device)

    def pin(self, rows: Tensor) -> None:
        pass

    def unpin(self, rows: Tensor) -> None:
        pass

    def copy(self, to: Tensor, source: Tensor, after: Sequence[Mark]) -> Mark:
        began = time.perf_counter_ns()
        to.copy_(source)
        return time.perf_counter_ns() - began

    def passed(self, mark: Mark) -> bool:
        return True

    def wait(self, mark: Mark) -> None:
        pass

    def mark(self) -> Mark:
        return None

    def join(self, mark: Mark) -> None:
        pass

    def nanoseconds(self, mark: Mark) -> int:
        return int(mark)

    def between(self, first: Mark, second: Mark) -> int:
        return 0

    def free_bytes(self) -> int:
        return available_ram()


def available_ram() -> int:
    """Bytes that the host could give to a program now."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            known = dict(line.split(":") for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        raise InputError("this system does not say how much memory is free: give budget= as slots or bytes") from None


def allocate(count: int, size: int, device: torch.device) -> Tensor:
    """[count, size] uint8. Raises InputError with the figures when the memory is not there."""
    try:
        with torch.inference_mode(False):  # written again later, outside of inference mode too
            return torch.empty(count, size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if "memory" not in str(error).lower() and "alloc" not in str(error).lower():
            raise
        raise InputError(
            f"{count * size / 2**30:.2f} GiB for {count} experts do not fit the memory of {device}: "
            "give a smaller budget= or ram="
        ) from error
