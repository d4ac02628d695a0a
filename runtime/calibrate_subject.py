"""The device and host that calibration times: what it asks of them, done by the code that offloaded models run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.integrations import moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from ..errors import UnsupportedHardwareError
from .backend import Mark, allocate, available_ram
from .calibrate_timing import MIB, Effort
from .devices import backend_for
from .host_experts import HostExperts
from .implementations import Lent, bits_depend_on_place, by_steps
from .layout import row_layout
from .serving import Serving

DTYPE = torch.bfloat16  # what most checkpoints are in
HOLD_S = 4e-3  # of device time, ahead of kernels whose issuing is to be hidden. Chosen here
ROUTED = 64  # numbers that a read-back brings: 8 choices of 8 tokens. Chosen here
BESIDE = 8 << 20  # bytes of each copy that runs beside the host's experts. Chosen here


@dataclass
class Beside:
    """Copies that ran beside something else."""

    bytes: int = 0
    seconds: float = 0.0


class Row:
    """A row of weights that lies in host memory, as `HostExperts` asks for it."""

    def __init__(self, row: Tensor) -> None:
        self._row = row

    def row(self) -> Tensor:
        return self._row

    def sent(self, mark: Mark) -> None:
        pass


class Subject:
    """Seconds are the host's clock unless said otherwise. Directions: h2d (pinned), pageable (h2d), d2h (pinned)."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.effort = effort
        self.backend, self._back = backend_for(device), backend_for(device)
        self.device, self.asynchronous = self.backend.device, self.backend.asynchronous
        self.free_before = available_ram()
        size = effort.buffer_bytes
        self._near = self.backend.rows(1, size)[0]
        pinned = {name: self.backend.host_rows(1, size) for name in ("h2d", "d2h")}
        self._far = {**pinned, "pageable": allocate(1, size, torch.device("cpu"))}
        noise = torch.randint(256, (MIB,), dtype=torch.uint8)  # never zeros, which some hardware moves faster
        for rows in (self._near, *self._far.values()):
            rows.view(-1, MIB).copy_(noise)
        self._pinned = tuple(pinned.values())
        for rows in self._pinned:
            self.backend.pin(rows)
        self._at = 0
        self._small = torch.ones(1, device=self.device)
        self._ids = torch.zeros(ROUTED, dtype=torch.int64, device=self.device)
        self._build_experts()
        self._hold = 1
        if self.asynchronous:
            self._hold = max(1, round(HOLD_S / min(self.seconds(self.sweep) for _ in range(3))))

    # --- time

    def now(self) -> int:
        """Nanoseconds."""
        return time.perf_counter_ns()

    def drain(self) -> None:
        """Wait for everything that has been issued."""
        self.backend.join(self.backend.mark())

    def seconds(self, work: Callable[[], object]) -> float:
        """From an idle device to what `work` has issued being done."""
        self.drain()
        began = self.now()
        work()
        self.drain()
        return (self.now() - began) / 1e9

    def host_seconds(self, work: Callable[[], object]) -> float:
        """Until `work` returns, from an idle device."""
        self.drain()
        began = self.now()
        work()
        return (self.now() - began) / 1e9

    def device_seconds(self, work: Callable[[], object]) -> float:
        """Of the device, for the kernels that `work` issues; their issuing is hidden behind other kernels."""
        if not self.asynchronous:
            return self.host_seconds(work)
        self.drain()
        self.hold()
        first = self.backend.mark()
        work()
        last = self.backend.mark()
        self.backend.join(last)
        return self.backend.between(first, last) / 1e9

    # --- copies

    def copy(self, way: str, size: int) -> Mark:
        """Begin one copy of so many bytes, from and to another place each time."""
        first = self._at if self._at + size <= self._near.numel() else 0
        self._at = first + size
        near, far = self._near[first : first + size], self._far[way][0, first : first + size]
        if way == "d2h":
            return self._back.copy(far, near, ())
        return self.backend.copy(near, far, ())

    def join(self, way: str, mark: Mark) -> None:
        (self._back if way == "d2h" else self.backend).join(mark)

    @contextmanager
    def copying(self) -> Iterator[Beside]:
        """Pinned copies to the device, one after another, from a thread of their own."""
        beside, stop, going = Beside(), threading.Event(), threading.Event()

        def work() -> None:
            began = self.now()
            while not stop.is_set():
                marks = [self.copy("h2d", BESIDE) for _ in range(2)]
                for mark in marks:
                    self.join("h2d", mark)
                beside.bytes += 2 * BESIDE
                beside.seconds = (self.now() - began) / 1e9
                going.set()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        going.wait()
        try:
            yield beside
        finally:
            stop.set()
            thread.join()

    # --- kernels

    def tiny(self) -> None:
        """Issue one kernel that has next to nothing to do."""
        self._small.add_(1)

    def read_back(self) -> None:
        """Bring a layer's routing to the host."""
        self._ids.cpu()

    def hold(self) -> None:
        """Keep the device busy while more is issued."""
        for _ in range(self._hold):
            self.sweep()

    def sweep(self) -> int:
        """Copy half of the buffer onto its other half; returns the bytes that are read and written."""
        half = self._near.numel() // 2
        self._near[:half].copy_(self._near[half : 2 * half])
        return 2 * half

    def product(self) -> Callable[[], object]:
        """One large matrix product, to be called again and again; see `product_operations`."""
        side = self.product_side
        one, other = (torch.randn(side, side, device=self.device).to(DTYPE) for _ in range(2))
        into = torch.empty_like(one)
        return lambda: torch.mm(one, other, out=into)

    @property
    def product_side(self) -> int:
        return self.effort.product * (4 if self.asynchronous else 1)

    def experts(self, distinct: int, rows: int) -> Callable[[], object]:
        """The grouped experts of one layer, so many with so many rows each, other ones at every call."""
        pairs = distinct * rows
        hidden = torch.randn(pairs, self.effort.hidden, device=self.device).to(DTYPE)
        weights = torch.ones(pairs, 1, device=self.device, dtype=DTYPE)
        ids = torch.arange(distinct).repeat_interleave(rows)[:, None]
        there, at = ids.to(self.device), 0

        def call() -> None:
            nonlocal at
            first = at if at + distinct <= self.effort.pool else 0
            at = first + distinct
            window = {name: one[first : first + distinct] for name, one in self._weights.items()}
            if bits_depend_on_place(self.device):
                by_steps(self._module, self._serving(window, ids), hidden, there, weights)
            else:
                lent: Any = Lent(self._module, {**window, "num_experts": distinct})
                moe.grouped_mm_experts_forward(lent, hidden, there, weights)

        return call

    def host_expert(self, rows: int) -> Callable[[], object]:
        """One expert of pinned host memory computed by the host's cores, another one at every call."""
        inputs = torch.randn(rows, self.effort.hidden).to(DTYPE)
        into, at = torch.empty_like(inputs), 0

        def call() -> None:
            nonlocal at
            row, at = self._host_rows[at], (at + 1) % len(self._host_rows)
            HostExperts(self.layout, {0: Row(row)}).compute(self._module, inputs, {0: slice(0, rows)}, into)  # type: ignore[dict-item]

        return call

    @property
    def expert_bytes(self) -> int:
        return 3 * self.effort.hidden * self.effort.intermediate * DTYPE.itemsize

    @property
    def expert_operations(self) -> int:
        """Of one row."""
        return 2 * 3 * self.effort.hidden * self.effort.intermediate

    def _build_experts(self) -> None:
        effort = self.effort
        config: Any = Qwen3MoeConfig(
            hidden_size=effort.hidden, moe_intermediate_size=effort.intermediate, num_experts=effort.pool
        )
        with torch.device("meta"):
            self._module: Any = Qwen3MoeExperts(config).to(DTYPE)
        meta = dict(self._module.named_parameters())
        drawn = {name: (torch.randn(one.shape[1:]) * effort.hidden**-0.5).to(DTYPE) for name, one in meta.items()}
        self._weights = {name: one.to(self.device).repeat(effort.pool, 1, 1) for name, one in drawn.items()}
        self.layout = row_layout(meta, "qwen3_moe")
        count = max(1, min(effort.pool, self._far["h2d"].numel() // self.layout.size))
        self._host_rows = self._far["h2d"][0, : count * self.layout.size].view(count, self.layout.size)
        for name, one in drawn.items():
            self.layout.view(self._host_rows, name).copy_(one)

    def _serving(self, weights: dict[str, Tensor], ids: Tensor) -> Serving:
        """All experts in their slots, nothing to wait for."""
        experts = list(range(len(weights["down_proj"])))
        return Serving(
            0, self.layout, weights, None, ids.numpy(), np.asarray(experts), experts, [], [], {}, range(1), False,  # type: ignore[arg-type]
            waited=set(experts),
        )  # fmt: skip

    # --- memory and names

    def memory(self) -> tuple[int, int]:
        """Bytes of the device, and what of them other programs, the runtime's context and workspaces take."""
        if not self.asynchronous:
            total = total_ram()
            return total, total - self.free_before
        free, total = torch.accelerator.get_memory_info(self.device)
        return int(total), int(total - free)

    def unified(self) -> bool:
        """Host and device have one memory."""
        if not self.asynchronous:
            return False
        properties = torch.get_device_module(self.device).get_device_properties(self.device)
        return bool(getattr(properties, "is_integrated", False))

    def release(self) -> None:
        """Let go of all buffers."""
        self.drain()
        for rows in self._pinned:
            self.backend.unpin(rows)
        self._near = self._small = self._ids = torch.empty(0)
        self._far, self._weights, self._pinned = {}, {}, ()
        self._host_rows = torch.empty(0)
        if self.asynchronous:
            torch.accelerator.empty_cache()


def total_ram() -> int:
    """Bytes of host memory. Raises UnsupportedHardwareError where the system does not say."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            known = dict(line.split(":") for line in lines)
        return int(known["MemTotal"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        raise UnsupportedHardwareError("this system does not say how much memory it has; calibrate on Linux") from None
