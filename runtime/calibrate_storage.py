"""Reads from the disk as the runtime makes them: past the page cache, by block size and by how many at once."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from .calibrate_number import Number, Numbers
from .calibrate_timing import MIB, Effort, Timing, repeated
from .read_queue import THREADS, ReadQueue
from .reader import Reader

DEPTHS = tuple(depth for depth in (1, 2, 4, 8) if depth <= THREADS)  # the runtime never has more reads under way
PIECE = 16 * MIB  # bytes written at once


@dataclass(frozen=True)
class Disk:
    """`direct`: the file system made direct reads, so that no page cache can have answered."""

    numbers: Numbers
    direct: bool


def storage(folder: Path, effort: Effort) -> Disk:
    """Numbers of the disk that `folder` is on. Writes a file of random bytes there and removes it.

    Raises InputError when there is no room for it or it cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".calibrate-", ignore_cleanup_errors=True) as place:
        file = Path(place) / "reads"
        _write(file, effort.file_bytes)
        reads = _Reads(file, effort)
        try:
            alone = {block: repeated(lambda block=block: reads.alone(block), effort) for block in effort.block_bytes}  # type: ignore[misc]
            queued = {
                (block, depth): repeated(lambda b=block, d=depth: reads.queued(b, d), effort)  # type: ignore[misc]
                for depth in DEPTHS
                for block in effort.block_bytes
            }
        finally:
            reads.reader.close()
    return Disk(_numbers(alone, queued, reads), reads.reader.direct)


def request(
    latencies: Mapping[int, float], rates: Mapping[tuple[int, int], float]
) -> tuple[float, int, int]:  # fmt: skip
    """(read bandwidth, block bytes, queue depth) of a storage profile.

    From seconds of one block alone, and bytes/s by (block, depth). The least block, then the least depth, whose
    depth * block / latency reaches the best rate that was seen; if none does, the one that comes nearest.
    """
    best = max(rates.values())
    offered = {(block, depth): depth * block / latencies[block] for block, depth in rates}
    enough = [point for point, rate in offered.items() if rate >= best]
    block, depth = min(enough) if enough else max(offered, key=lambda point: offered[point])
    return best, block, depth


class _Reads:
    """Timed reads of one file, each from another place."""

    def __init__(self, file: Path, effort: Effort) -> None:
        self.reader, self._file, self._effort = Reader(), file, effort
        self._into = [torch.empty(max(effort.block_bytes), dtype=torch.uint8) for _ in range(max(DEPTHS))]
        self._random = np.random.default_rng(0)

    def alone(self, block: int) -> float:
        """Seconds of one block, nothing else under way."""
        first = self._places(block, 1)[0]
        began = time.perf_counter_ns()
        self.reader.read(self._file, first, self._into[0][:block])
        return (time.perf_counter_ns() - began) / 1e9

    def queued(self, block: int, depth: int) -> float:
        """Seconds per byte with `depth` blocks under way."""
        places = self._places(block, max(depth, self.count(block)))
        queue = ReadQueue(depth)
        try:
            began = time.perf_counter_ns()
            waiting = [
                queue.submit(
                    lambda at=at, first=first: self.reader.read(self._file, first, self._into[at % depth][:block]),  # type: ignore[misc]
                    True,
                )
                for at, first in enumerate(places)
            ]
            for one in waiting:
                one.result()
            return (time.perf_counter_ns() - began) / 1e9 / (len(places) * block)
        finally:
            queue.close()

    def count(self, block: int) -> int:
        return max(1, self._effort.read_bytes // block)

    def _places(self, block: int, count: int) -> list[int]:
        blocks = max(1, self._effort.file_bytes // block)
        return (self._random.permutation(max(blocks, count))[:count] % blocks * block).tolist()


def _numbers(alone: dict[int, Timing], queued: dict[tuple[int, int], Timing], reads: _Reads) -> Numbers:
    rates = {point: 1 / timing.seconds for point, timing in queued.items()}
    best, block, depth = request({size: timing.seconds for size, timing in alone.items()}, rates)
    at = max(rates, key=lambda point: rates[point])
    kind = "measured" if reads.reader.direct else "estimate"
    past = "direct reads" if reads.reader.direct else "reads through the page cache, which may have answered,"
    rate_how = f"{past} of {at[0] // 1024} KiB, {at[1]} under way, {queued[at]}"
    note = f"GB/s with {', '.join(map(str, DEPTHS))} reads under way: " + "; ".join(
        f"{size // 1024} KiB: " + ", ".join(f"{rates[size, d] / 1e9:.3g}" for d in DEPTHS) for size in alone
    )
    how = "least reads whose latency at this depth allows read_bandwidth"
    return {
        "storage.read_bandwidth": Number(best, rate_how, kind, note, queued[at].spread),
        "storage.latency_s": Number(
            alone[block].seconds, f"{past} of one block, {alone[block]}", kind, scatter=alone[block].spread
        ),
        "storage.block_bytes": Number(block, how, "derived"),
        "storage.queue_depth": Number(depth, f"{how}; the runtime keeps {THREADS} reads under way", "derived"),
    }


def _write(file: Path, size: int) -> None:
    """Random bytes, which no file system can compress, on the disk and not in the page cache."""
    random = np.random.default_rng(0)
    try:
        free = os.statvfs(file.parent).f_bavail * os.statvfs(file.parent).f_frsize
        if free < 2 * size:
            raise InputError(
                f"--disk {file.parent.parent}: {free / MIB:.0f} MiB are free, {2 * size / MIB:.0f} are needed to time "
                "reads: name a folder on another disk"
            )
        with file.open("wb", buffering=0) as out:
            for _ in range(-(-size // PIECE)):
                out.write(random.bytes(min(PIECE, size)))
            os.fsync(out.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise InputError(f"--disk {file.parent.parent}: cannot write there ({error.strerror}); name a folder") from None
