"""CUDA: host memory is allocated as it is and locked once it is full.

torch's own pinned allocator rounds every block up to a power of two (33 GiB would take 64), and locking pages that have
been written takes a fraction of the time that locking empty ones does.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from ..errors import InputError
from .accelerator import AcceleratorBackend
from .backend import allocate


class CudaBackend(AcceleratorBackend):
    """NVIDIA and, under the same names in torch, AMD."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._locked: set[int] = set()  # addresses: unlocking others would leave an error behind

    def host_rows(self, count: int, size: int) -> Tensor:
        return allocate(count, size, torch.device("cpu"))

    def pin(self, rows: Tensor) -> None:
        if rows.numel():
            self._locked.add(rows.data_ptr())
            status = torch.cuda.cudart().cudaHostRegister(rows.data_ptr(), rows.numel(), 0)
            if int(status):
                self._locked.discard(rows.data_ptr())
                raise InputError(
                    f"{rows.numel() / 2**30:.2f} GiB of host memory cannot be pinned ({status}): give a smaller ram=, "
                    "or raise the limit on locked memory"
                )

            weakref.finalize(rows, self._unlock, rows.data_ptr())  # of a model that is dropped without being detached

    def unpin(self, rows: Tensor) -> None:
        self._unlock(rows.data_ptr())

    def _unlock(self, address: int) -> None:
        if address in self._locked:
            self._locked.discard(address)
            torch.cuda.cudart().cudaHostUnregister(address)
