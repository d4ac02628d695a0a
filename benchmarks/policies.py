"""Every bundled policy on every recorded trace: hits, traffic, exposed wait, time per token, share of the gap closed.

    python benchmarks/policies.py [--traces ../shared/traces] [--hw a100-80g] [--tokens 2000] [--out policies.md]

Capacities are 2k, 3k, 25 % and 50 % of a layer's experts, for every scope the same number of slots in all. A trace
longer than --tokens contributes its first requests up to that many rows; the table says how many. `gap` is the share
of the distance in time per token between LRU and the clairvoyant bound that a policy closes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from moeflow.policies.policy import preset_names
from moeflow.traces.bundled import BUNDLED_TRACE, PRICED_AS
from moeflow.traces.importers import import_trace
from moeflow.traces.trace import Trace

import moeflow

HEADINGS = ("policy", "hit", "late", "wasted MB", "MB/token", "wait ms", "TPOT ms", "gap %")


def recorded(folder: Path, work: Path) -> Iterator[tuple[str, Path, str | None]]:
    """(name, trace file, model that prices it) of the bundled trace and of every importable recording."""
    if BUNDLED_TRACE.is_file():
        yield "bundled", BUNDLED_TRACE, PRICED_AS
    for source in sorted(folder.glob("*.npz")):
        import_trace(source, work / f"{source.stem}.parquet")
        yield source.stem.removesuffix("_decode"), work / f"{source.stem}.parquet", None


def first_rows(trace: Trace, most: int) -> Trace:
    """The first whole requests of at most `most` rows together, at least one request."""
    ends = np.flatnonzero(np.diff(trace.request, append=-1)) + 1
    kept = int(ends[max(0, np.searchsorted(ends, most, side="right") - 1)])
    if kept >= trace.rows:
        return trace
    arrays = {name: array[:kept] for name, array in trace.columns.items()}
    requests = set(np.unique(arrays["request"]).tolist())
    meta = replace(trace.meta, requests=tuple(r for r in trace.meta.requests if r.id in requests))
    return replace(trace, meta=meta, **arrays)


def cell(job: tuple[Path, str | None, str, str, int, int]) -> dict[str, Any]:
    """One run; what `simulate` refuses comes back as the reason."""
    path, model, hardware, policy, slots_per_layer, most = job
    trace = first_rows(moeflow.load_trace(path), most)
    chosen = moeflow.Policy.load(policy)
    budget = slots_per_layer * len(trace.meta.model.moe_layers) + chosen.scratch
    try:
        result = moeflow.simulate(trace, hardware, chosen, budget, model=model)
    except moeflow.InputError as error:
        return {"policy": policy, "slots": slots_per_layer, "refused": str(error)}
    return {**result.values, "policy": policy, "slots": slots_per_layer, "needs": chosen.needs}


def capacities(trace: Trace) -> list[int]:
    model = trace.meta.model
    wanted = {2 * model.top_k, 3 * model.top_k, model.experts // 4, model.experts // 2}
    return sorted(c for c in wanted if model.top_k < c < model.experts)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines, best time first; refused policies last."""
    done = sorted((row for row in rows if "refused" not in row), key=lambda row: row["tpot_s"]["mean"])
    lru = next((row["tpot_s"]["mean"] for row in done if row["policy"] == "lru"), None)
    if lru is None:
        raise SystemExit("the gap is counted from lru: name it in --policies, on a machine that every capacity fits")
    lines = [" | ".join(("", *HEADINGS, "")).strip(), "|---" * len(HEADINGS) + "|"]
    for row in done:
        bound, mean = row["bounds"]["clairvoyant"]["tpot_s"], row["tpot_s"]["mean"]
        moved = row["bytes_per_token"]
        figures = (
            f"{row['hit']:.4f}", f"{row['late']:.4f}", f"{moved['wasted'] / 1e6:.1f}",
            f"{(moved['demand'] + moved['stream'] + moved['prefetch']) / 1e6:.1f}",
            f"{row['wait_s_per_token'] * 1e3:.2f}", f"{mean * 1e3:.2f}", f"{100 * (lru - mean) / (lru - bound):.1f}",
        )  # fmt: skip
        name = f"{row['policy']} (oracle)" if row["policy"] and "future" in row["needs"] else row["policy"]
        lines.append("| " + " | ".join((name, *figures)) + " |")
    for row in rows:
        if "refused" in row:
            missing = row["refused"].split("'")[1] if "needs the column" in row["refused"] else row["refused"]
            lines.append(f"| {row['policy']} | n/a: needs {missing} |" + " |" * (len(HEADINGS) - 2))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--hw", default="a100-80g", help="a machine that every capacity fits")
    parser.add_argument("--tokens", type=int, default=2000, help="rows of a trace at most")
    parser.add_argument("--policies", nargs="*", default=list(preset_names()))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the Markdown there too, and the figures as JSON beside it")
    options = parser.parse_args()
    lines, everything = [], {}
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(options.workers) as pool:
        for name, path, model in recorded(options.traces, Path(work)):
            trace = first_rows(moeflow.load_trace(path), options.tokens)
            for slots in capacities(trace):
                jobs = [(path, model, options.hw, policy, slots, options.tokens) for policy in options.policies]
                rows = list(pool.map(cell, jobs))
                lines += [f"\n### {name}, {slots} of {trace.meta.model.experts} slots per layer, {trace.rows} rows\n"]
                lines += table(rows)
                everything[f"{name}/{slots}"] = rows
                print(lines[-len(rows) - 3].strip(), file=sys.stderr)
    text = f"Machine: {options.hw} (see its profile), one copy engine, decode steps.\n" + "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
        options.out.with_suffix(".json").write_text(json.dumps(everything))


if __name__ == "__main__":
    main()
