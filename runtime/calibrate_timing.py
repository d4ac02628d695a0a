"""How often calibration repeats what it times, and what it takes from the repetitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Effort:
    """What is measured, and how often. Bytes, seconds and counts; all chosen here, for a few minutes in all."""

    repetitions: int = 15
    fewest: int = 5  # repetitions of what takes long
    warmups: int = 2  # first repetitions, not counted
    limit_s: float = 2.0  # for the repetitions of one thing, beyond the fewest
    copy_bytes: tuple[int, ...] = (64 * KIB, 256 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB)
    buffer_bytes: int = 256 * MIB  # that copies walk through, so that no cache holds what they read
    issued: int = 64  # kernels or copies in a row
    hidden: int = 2048  # an expert as Qwen3-30B-A3B has it: 9.4 MB in bfloat16
    intermediate: int = 768
    pool: int = 64  # experts to choose from: more bytes than a cache holds
    distinct: tuple[int, ...] = (1, 4, 16, 64)
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)  # of each distinct expert
    host_rows: tuple[int, ...] = (1, 2, 4, 16, 64, 256)
    product: int = 2048  # rows and columns of the large matrix product, on accelerators four times as many
    file_bytes: int = 1024 * MIB
    read_bytes: int = 64 * MIB  # of one timing of the queue
    block_bytes: tuple[int, ...] = (128 * KIB, 256 * KIB, 512 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB)
    tokens: int = 32  # generated, to time sampling


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing: the median of its repetitions, and their interquartile range as a share of it."""

    seconds: float
    spread: float
    repetitions: int

    def __str__(self) -> str:
        return f"median of {self.repetitions} repetitions, spread {self.spread:.1%}"


def repeated(once: Callable[[], float], effort: Effort) -> Timing:
    """`once` measures and returns seconds."""
    for _ in range(effort.warmups):
        once()
    found: list[float] = []
    while len(found) < effort.repetitions and (len(found) < effort.fewest or sum(found) < effort.limit_s):
        found.append(once())
    low, median, high = np.percentile(found, (25, 50, 75))
    return Timing(float(median), float((high - low) / median) if median > 0 else 0.0, len(found))
