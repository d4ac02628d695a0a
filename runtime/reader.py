"""Reads ranges of files into memory, past the page cache where the file system allows it.

Through the page cache a model larger than memory would push everything else out of it, and an SSD would look like RAM.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # bytes: what direct reads are aligned to


class Reader:
    """Files are opened once. Safe for threads. `direct` is False once a file system has refused direct reads."""

    def __init__(self) -> None:
        self.direct = hasattr(os, "O_DIRECT")
        self.bytes_read = 0
        self._files: dict[Path, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self._own = threading.local()

    def read(self, file: Path, first: int, into: Tensor) -> None:
        """Fill `into` [n] uint8 in host memory from byte `first` of `file` on. Raises OSError naming the file."""
        descriptor, direct = self._open(file)
        view = into.numpy().data
        if direct:
            self._read_blocks(file, descriptor, first, into)
        else:
            self._read_into(file, descriptor, first, view)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, first, len(view), os.POSIX_FADV_DONTNEED)
        with self._lock:
            self.bytes_read += len(view)

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _open(self, file: Path) -> tuple[int, bool]:
        with self._lock:
            if file not in self._files:
                self._files[file] = self._opened(file)
            return self._files[file]

    def _opened(self, file: Path) -> tuple[int, bool]:
        if self.direct:
            try:
                return os.open(file, os.O_RDONLY | os.O_DIRECT), True
            except OSError:
                if not file.is_file():
                    raise
                self.direct = False
                warnings.warn(
                    f"moeflow: the file system of {file.parent} refuses direct reads, so experts pass through the page "
                    "cache: keep the checkpoint on another disk",
                    stacklevel=2,
                )
        return os.open(file, os.O_RDONLY), False

    def _read_blocks(self, file: Path, descriptor: int, first: int, into: Tensor) -> None:
        """Whole blocks into a buffer of this thread, the wanted bytes from there."""
        start = first // BLOCK * BLOCK
        wanted = first - start + into.numel()
        buffer = self._buffer(-(-wanted // BLOCK) * BLOCK)
        got = 0
        while got < wanted:
            read = os.preadv(descriptor, [memoryview(buffer)[got // BLOCK * BLOCK :]], start + got // BLOCK * BLOCK)
            if got // BLOCK * BLOCK + read <= got:
                raise OSError(f"{file}: ends at byte {start + got}, in the middle of an expert")
            got = got // BLOCK * BLOCK + read
        into.copy_(torch.from_numpy(np.frombuffer(buffer, np.uint8, into.numel(), first - start)))

    def _buffer(self, size: int) -> mmap.mmap:
        held: mmap.mmap | None = getattr(self._own, "buffer", None)
        if held is None or len(held) < size:
            held = self._own.buffer = mmap.mmap(-1, size)
        return held

    @staticmethod
    def _read_into(file: Path, descriptor: int, first: int, view: memoryview) -> None:
        got = 0
        while got < len(view):
            read = os.preadv(descriptor, [view[got:]], first + got)
            if not read:
                raise OSError(f"{file}: ends at byte {first + got}, in the middle of an expert")
            got += read
