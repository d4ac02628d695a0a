"""How fast a trace is written and read: decoded MB/s of `load_trace`, of its memory-mapped copy, and of plain pyarrow.

    python benchmarks/trace_format.py [--rows 10000000] [--json]

The routing is synthetic and made to look like a recorded trace of OLMoE-1B-7B to a compressor and to a branch
predictor: 16 layers, 64 experts, top-8 in rank order; router scores are a fixed popularity plus noise that decays from
token to token, set so that next-token reuse (0.41 against 0.42) and zstd ratio (1.34 against 1.36) are those of the
recorded one. A block of 131,072 rows is generated and repeated: pages are compressed alone, so repetition saves
nothing. Every phase runs in a process of its own with the file in the page cache; the best of `--repeat` runs counts.
CPU seconds stand beside them because other work on the machine stretches the wall clock only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, EXPERTS, TOP_K = 16, 64, 8
BLOCK_ROWS = 1 << 17
POPULARITY, MEMORY = 0.8, 0.35  # spread of the fixed scores; what is left of the noise one token later


def routing(rows: int, seed: int = 0) -> np.ndarray:
    """[rows, 16, 8] uint8: the ranked choice of a router whose scores drift from token to token."""
    generator = np.random.default_rng(seed)
    popularity = generator.normal(0, POPULARITY, (LAYERS, EXPERTS)).astype(np.float32)
    state = generator.standard_normal((LAYERS, EXPERTS), dtype=np.float32)
    fresh = np.float32(np.sqrt(1 - MEMORY**2))
    chosen = np.empty((rows, LAYERS, TOP_K), np.uint8)
    for start in range(0, rows, 1024):
        scores = generator.standard_normal((min(1024, rows - start), LAYERS, EXPERTS), dtype=np.float32)
        for noise in scores:
            state = noise[:] = np.float32(MEMORY) * state + fresh * noise
        scores += popularity
        top = np.argpartition(-scores, TOP_K - 1, axis=-1)[..., :TOP_K]
        order = np.argsort(-np.take_along_axis(scores, top, -1), axis=-1)
        chosen[start : start + len(scores)] = np.take_along_axis(top, order, -1)
    return chosen


def write(path: Path, rows: int) -> dict[str, float]:
    """Streams `rows` rows into a trace. Seconds without those of generating the block, and peak memory."""
    from moeflow.traces.model_spec import Attention, ModelSpec
    from moeflow.traces.trace import TraceMeta
    from moeflow.traces.writer import TraceWriter

    attention = Attention("gqa", heads=16, kv_heads=16, head_dim=128)
    model = ModelSpec("OLMoE geometry", LAYERS, tuple(range(LAYERS)), EXPERTS, TOP_K, 2048, 1024, attention, 50304)
    block = routing(min(rows, BLOCK_ROWS))
    start, cpu = time.perf_counter(), time.process_time()
    with TraceWriter(path, TraceMeta(model, recorded={"how": "synthetic, for a benchmark"})) as writer:
        for first in range(0, rows, BLOCK_ROWS):
            step = np.arange(first, min(rows, first + BLOCK_ROWS), dtype=np.int32)
            writer.append(
                step=step,
                request=step // 512,
                position=step % 512,
                token=(step.astype(np.int64) * 2654435761 % 50304).astype(np.int32),
                phase=(step % 512 >= 128).astype(np.int8),
                experts=block[: len(step)],
            )
    return _since(start, cpu)


def read(path: Path, repeat: int) -> dict[str, float]:
    from moeflow.traces.reader import load_trace

    return _timed(lambda: load_trace(path), repeat)


def read_mapped(path: Path, repeat: int) -> dict[str, float]:
    """Finding and mapping the copy, then touching every byte of it once."""
    from moeflow.traces.reader import load_trace

    return _timed(lambda: [_touched(array) for array in load_trace(path, mmap=True).columns.values()], repeat)


def read_table(path: Path, repeat: int) -> dict[str, float]:
    import pyarrow.parquet

    return _timed(lambda: pyarrow.parquet.read_table(path), repeat)


def content_hash(path: Path, repeat: int) -> dict[str, float]:
    from moeflow.traces.reader import load_trace

    trace = load_trace(path)
    return _timed(type(trace).content_sha256.func.__get__(trace), repeat)  # around the cache


PHASES: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "write": write,
    "load_trace": read,
    "load_trace(mmap), first": read_mapped,
    "load_trace(mmap), again": read_mapped,
    "pyarrow read_table": read_table,
    "content_sha256": content_hash,
}


def _touched(array: np.ndarray) -> int:
    return int(array.reshape(-1).view(np.uint8)[::4096].sum())


def _timed(action: Callable[[], Any], repeat: int) -> dict[str, float]:
    runs = []
    for _ in range(repeat):
        start, cpu = time.perf_counter(), time.process_time()
        result = action()
        runs.append(_since(start, cpu))
        del result
    return min(runs, key=lambda run: run["seconds"])


def _since(start: float, cpu: float) -> dict[str, float]:
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,  # of all threads: what a busy machine does not stretch
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }


def measure(rows: int, repeat: int, folder: Path) -> dict[str, Any]:
    """Every phase, each in a fresh process: seconds, CPU seconds, decoded MB/s, peak memory."""
    path = folder / "benchmark.parquet"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    decoded = rows * (LAYERS * TOP_K + 4 * 4 + 1 + 2 + 1)
    results: dict[str, Any] = {"rows": rows, "decoded_bytes": decoded, "cpus": os.cpu_count(), "phases": {}}
    spawn = multiprocessing.get_context("spawn")
    for name, phase in PHASES.items():
        argument = rows if name == "write" else 1 if name.endswith("first") else repeat
        with spawn.Pool(1) as pool:
            taken = pool.apply(phase, (path, argument))
        results["phases"][name] = {**taken, "mb_per_s": decoded / taken["seconds"] / 1e6}
    results["file_bytes"] = path.stat().st_size
    return results


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=10_000_000)
    arguments.add_argument("--repeat", type=int, default=3)
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options.rows, options.repeat, Path(folder))
    if options.json:
        json.dump(results, sys.stdout, indent=2)
        return
    print(f"{results['rows']:,} rows, {results['decoded_bytes'] / 1e6:,.0f} MB decoded, ", end="")
    print(f"{results['file_bytes'] / 1e6:,.0f} MB on disk, {results['cpus']} CPUs")
    print(f"{'':26}{'seconds':>9}{'CPU s':>8}{'decoded MB/s':>14}{'peak MB':>10}")
    for name, at in results["phases"].items():
        print(f"{name:26}{at['seconds']:9.2f}{at['cpu_seconds']:8.2f}", end="")
        print(f"{at['mb_per_s']:14,.0f}{at['peak_bytes'] / 1e6:10,.0f}")


if __name__ == "__main__":
    main()
