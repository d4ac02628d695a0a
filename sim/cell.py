"""One cell of a sweep, computed in a worker: its figures as flat columns."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..traces.bundled import BUNDLED_TRACE
from ..traces.reader import load_trace
from ..traces.trace import Trace
from .grid import Cell
from .run import simulate

Figures = dict[str, Any]

# column of the sweep's file -> Arrow type and where a result keeps it
COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tpot_s": ("double", ("tpot_s", "mean")),
    "tpot_p50_s": ("double", ("tpot_s", "p50")),
    "tpot_p90_s": ("double", ("tpot_s", "p90")),
    "tpot_p99_s": ("double", ("tpot_s", "p99")),
    "ttft_p50_s": ("double", ("ttft_s", "p50")),
    "ttft_p90_s": ("double", ("ttft_s", "p90")),
    "ttft_p99_s": ("double", ("ttft_s", "p99")),
    "tokens_per_s": ("double", ("tokens_per_s",)),
    "wait_s_per_token": ("double", ("wait_s_per_token",)),
    "hit": ("double", ("hit",)),
    "late": ("double", ("late",)),
    "miss": ("double", ("miss",)),
    "on_host": ("double", ("on_host",)),
    "skipped": ("double", ("skipped",)),
    "demand_bytes_per_token": ("double", ("bytes_per_token", "demand")),
    "stream_bytes_per_token": ("double", ("bytes_per_token", "stream")),
    "prefetch_bytes_per_token": ("double", ("bytes_per_token", "prefetch")),
    "wasted_bytes_per_token": ("double", ("bytes_per_token", "wasted")),
    "low_bit_bytes_per_token": ("double", ("bytes_per_token", "low_bit")),
    "link_utilisation": ("double", ("link_utilisation",)),
    "compute_utilisation": ("double", ("compute_utilisation",)),
    "budget_bytes": ("int64", ("budget_bytes",)),
    "peak_bytes": ("int64", ("peak_bytes",)),
    "resident_bound_tpot_s": ("double", ("bounds", "resident", "tpot_s")),
    "clairvoyant_bound_tpot_s": ("double", ("bounds", "clairvoyant", "tpot_s")),
    "exactness": ("string", ("exactness",)),
    "oracle": ("bool", ("policy", "oracle")),
    "calibrated": ("bool", ("calibrated",)),
    "tokens": ("int64", ("tokens",)),
    "requests": ("int64", ("requests",)),
    "decision_log_sha256": ("string", ("decision_log_sha256",)),
    "error": ("string", ("error",)),
}


@dataclass(frozen=True)
class TraceFile:
    """Where workers find the trace (None: the bundled one, in each worker's own moeflow), and what it must hold."""

    path: str | None
    content_sha256: str
    moeflow: str = version("moeflow")

    @classmethod
    def of(cls, path: Path | None) -> tuple[TraceFile, Trace]:
        """Make the memory-mapped copy once, before any worker asks for it. Raises InputError."""
        trace = load_trace(path or BUNDLED_TRACE, mmap=True)
        return cls(None if path is None else str(path.absolute()), trace.content_sha256), trace


def run_cell(cell: Cell, trace: TraceFile, options: dict[str, Any]) -> Figures:
    """The figures of one cell, or `error` where it cannot be. Raises InputError where no cell could be computed."""
    loaded = _loaded(trace)
    assert cell.policy is not None, "a policy that cannot be is never sent to a worker"
    try:
        result = simulate(loaded, cell.hardware, cell.policy, cell.budget, **options)
    except InputError as error:
        return {"error": str(error)}
    return {column: _at(result.values, path) for column, (_, path) in COLUMNS.items()}


@lru_cache(maxsize=1)
def _loaded(trace: TraceFile) -> Trace:
    """One object per worker, so that what is derived from a trace is derived once."""
    here = f"worker on {socket.gethostname()}"
    if trace.moeflow != version("moeflow"):
        raise InputError(
            f"{here}: has moeflow {version('moeflow')}, and the sweep {trace.moeflow}; install the same there"
        )
    try:
        loaded = load_trace(trace.path or BUNDLED_TRACE, mmap=True)
    except InputError as error:
        raise InputError(f"{here}: {error}; workers read the trace under the path that the sweep was given") from None
    if loaded.content_sha256 != trace.content_sha256:
        raise InputError(
            f"{here}: {trace.path or BUNDLED_TRACE} holds another trace (content {loaded.content_sha256[:12]}, "
            f"wanted {trace.content_sha256[:12]}); put the same file under the same path on every machine"
        )
    return loaded


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        values = None if values is None else values.get(key)
    return values
