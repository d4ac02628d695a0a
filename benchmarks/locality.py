"""Measure how local recorded routing is: the table behind `sim plan`'s surrogate routing.

    python benchmarks/locality.py [--traces ../shared/traces] [--rows 20000]

Writes sim/locality.json: for the bundled recording and each of the folder's, the share of a decode token's needs at
each position of its layer's list of experts, the most recently used first (`reuse` of sim/surrogate.py), over all
layers. A recording longer than --rows contributes its first whole requests. Prints the LRU hit curve that it implies.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from moeflow.sim.surrogate import TABLE, reuse
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.importers import import_trace
from moeflow.traces.trace import DECODE, Trace

import moeflow

FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.75)


def recordings(folder: Path, rows: int) -> Iterator[tuple[str, Trace]]:
    """Name and trace of the bundled recording and of each importable one of the folder."""
    yield "bundled tiny MoE", first_rows(moeflow.load_trace(BUNDLED_TRACE), rows)
    with tempfile.TemporaryDirectory() as work:
        for source in sorted(folder.glob("*.npz")):
            target = Path(work, "imported.parquet")
            import_trace(source, target)
            yield source.stem.removesuffix("_decode"), first_rows(moeflow.load_trace(target), rows)


def first_rows(trace: Trace, most: int) -> Trace:
    """The first whole requests of at most `most` rows together, at least one request."""
    requests, sizes = np.unique(trace.request, return_counts=True)
    kept = max(1, int(np.searchsorted(np.cumsum(sizes), most, side="right")))
    return trace if kept == len(requests) else trace.of_requests(requests[:kept].tolist())


def source(name: str, trace: Trace) -> dict[str, Any]:
    found, model = reuse(trace), trace.meta.model
    return {
        "name": name,
        "model": model.name,
        "experts": model.experts,
        "top_k": model.top_k,
        "layers": len(model.moe_layers),
        "requests": len(np.unique(trace.request)),
        "decode_tokens": int((trace.phase == DECODE).sum()),
        "licence": trace.meta.licence,
        "share": [round(float(value), 6) for value in found / found.sum()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--rows", type=int, default=20000)
    options = parser.parse_args()
    sources = [source(*recording) for recording in recordings(options.traces, options.rows)]
    note = "share of needs at each LRU position, most recent first; python benchmarks/locality.py writes this file"
    part = TABLE.with_suffix(".part")
    lines = ",\n  ".join(json.dumps(row) for row in sources)
    part.write_text(f'{{"note": {json.dumps(note)},\n "sources": [\n  {lines}\n]}}\n', encoding="utf-8")
    part.replace(TABLE)
    print("| recording | experts, top-k | decode tokens | " + " | ".join(f"{f:.1%}" for f in FRACTIONS) + " |")
    print("|---|---|---|" + "---|" * len(FRACTIONS))
    for row in sources:
        hits = np.concatenate(([0.0], np.cumsum(row["share"])))
        at = [float(np.interp(f * row["experts"], np.arange(row["experts"] + 1), hits)) for f in FRACTIONS]
        shape = f"{row['experts']}, {row['top_k']}"
        print(f"| {row['name']} | {shape} | {row['decode_tokens']} | " + " | ".join(f"{h:.3f}" for h in at) + " |")


if __name__ == "__main__":
    main()
