"""The set-up of ExpertFlow A (2510.26730): 20 GB on three machines, DeepSeek-V2-Lite, batch 1; ours beside theirs.

    python benchmarks/expertflow_a.py [--traces ../shared/traces] [--out docs/expertflow-a.md]

The paper's baseline offloads as transformers does: every needed expert is copied from pageable memory when its layer
runs, nothing is kept. Its traces are not public, so the V2-Lite recording of others is replayed; it has no pre-gate
column, so the base that the hybrid predictor corrects is the cross-layer transition table there. The bundled recording
has the pre-gate, and is used for the predictor's figures. Predictors are fitted on every second request and judged on
the others. Profiles are uncalibrated: read ratios.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from moeflow.policies.fitted import load_fitted
from moeflow.policies.hybrid import Hybrid
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.importers import import_trace
from moeflow.traces.trace import Trace

import moeflow

TRACE = "dsv2lite_nvmoe_decode"
MACHINES = ("a6000", "h20", "ascend910b")
CAP = "20GB"
ON_DEMAND = {"cache": {"evict": "lru"}, "miss": {"waves": "each"}}
PREDICTED = {"predict": {"kind": "hybrid"}, "cache": {"evict": "lru"}}
POLICIES: dict[str, Any] = {
    "LRU": "lru",
    "fixed step 1": PREDICTED | {"prefetch": {"kind": "predicted", "distance": 1}},
    "fixed step 2": PREDICTED | {"prefetch": {"kind": "predicted", "distance": 2}},
    "fixed step 4": PREDICTED | {"prefetch": {"kind": "predicted", "distance": 4}},
    "ExpertFlow A": "expertflow-a",
    "moeflow": "moeflow",
    "perfect prediction, 4 layers (oracle)": {
        "cache": {"evict": "belady"},
        "prefetch": {"kind": "oracle", "distance": 4},
    },
}
PAPER = """
| figure | paper | here |
|---|---|---|
| waiting time against the offloading baseline | below 0.1 % | {stall} |
| waiting and miss latency, mean over machines | -98.5 % | {saved} |
| predictor over its base, recall at top-k, mean over distances | +21.79 points over the pre-gate | {points} |
"""


def halves(trace: Trace) -> tuple[Trace, Trace]:
    requests = np.unique(trace.request).tolist()
    return trace.of_requests(requests[::2]), trace.of_requests(requests[1::2])


def fit(trace: Trace, file: Path) -> dict[str, Any]:
    """Fit on one half; the metrics of the other."""
    Hybrid.train(*halves(trace)).save(file)
    return load_fitted(file, "hybrid").metrics


def machine_rows(trace: Trace, hardware: str, fitted: str) -> list[dict[str, Any]]:
    """The on-demand baseline first."""
    layers = len(trace.meta.model.moe_layers)
    baseline = moeflow.simulate(trace, hardware, ON_DEMAND, budget=layers + 2, host_memory="pageable")
    rows = [{**baseline.values, "policy": "on demand, nothing kept"}]
    for name, policy in POLICIES.items():
        loaded = moeflow.Policy.from_document(policy, name) if isinstance(policy, dict) else moeflow.Policy.load(policy)
        result = moeflow.simulate(
            trace, hardware, loaded, vram=CAP, fitted=fitted if loaded.predictor() is not None else None
        )
        rows.append({**result.values, "policy": name})
    return rows


def table(hardware: str, rows: list[dict[str, Any]]) -> list[str]:
    baseline = rows[0]
    names = (
        "policy",
        "slots/layer",
        "hit",
        "late",
        "wasted MB",
        "wait ms",
        "of baseline %",
        "TPOT ms",
        "speed-up over LRU",
    )
    lru = next(row["tpot_s"]["mean"] for row in rows if row["policy"] == "LRU")
    lines = [f"\n### {hardware}\n", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        layers = len(row["layers"]["hit"])
        figures = (
            row["policy"], f"{row['slots']['held'] / layers:.1f}", f"{row['hit']:.3f}", f"{row['late']:.3f}",
            f"{row['bytes_per_token']['wasted'] / 1e6:.0f}", f"{row['wait_s_per_token'] * 1e3:.2f}",
            f"{100 * row['wait_s_per_token'] / baseline['wait_s_per_token']:.2f}", f"{row['tpot_s']['mean'] * 1e3:.2f}",
            f"{lru / row['tpot_s']['mean']:.2f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(figures) + " |")
    bounds = rows[1]["bounds"]
    resident, clairvoyant = (bounds[name]["tpot_s"] * 1e3 for name in ("resident", "clairvoyant"))
    return [*lines, f"\nBounds: clairvoyant {clairvoyant:.2f} ms, everything resident {resident:.2f} ms."]


def predictor_lines(name: str, metrics: dict[str, Any]) -> list[str]:
    """Recall at top-k by distance: the base and the hybrid."""
    base, hybrid = metrics["base"], metrics["hybrid"]
    lines = [
        f"\n### Predictor on {name}\n",
        "| layers ahead | base recall@k | hybrid recall@k | points |",
        "|---|---|---|---|",
    ]
    for distance in hybrid["by_distance"]:
        before, after = (of["by_distance"][distance]["recall@k"] for of in (base, hybrid))
        lines.append(f"| {distance} | {before:.3f} | {after:.3f} | {100 * (after - before):+.2f} |")
    return lines


def points(metrics: dict[str, Any]) -> float:
    """Mean over distances of recall at top-k gained over the base, in points."""
    tables = metrics["base"]["by_distance"], metrics["hybrid"]["by_distance"]
    return 100 * float(np.mean([tables[1][d]["recall@k"] - tables[0][d]["recall@k"] for d in tables[1]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--out", type=Path, help="write the Markdown there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        import_trace(options.traces / f"{TRACE}.npz", work / "trace.parquet")
        trace = moeflow.load_trace(work / "trace.parquet")
        of_trace = fit(trace, work / "hybrid.safetensors")
        of_bundled = fit(moeflow.load_trace(BUNDLED_TRACE), work / "bundled.safetensors")
        judged = halves(trace)[1]
        results = {hardware: machine_rows(judged, hardware, str(work / "hybrid.safetensors")) for hardware in MACHINES}
    ours = [
        next(row for row in rows if row["policy"] == "ExpertFlow A")["wait_s_per_token"] / rows[0]["wait_s_per_token"]
        for rows in results.values()
    ]
    theirs = PAPER.format(
        stall=", ".join(f"{hardware} {100 * share:.1f} %" for hardware, share in zip(results, ours, strict=True)),
        saved=f"{-100 * (1 - np.mean(ours)):.1f} %",
        points=f"{points(of_bundled):+.2f} over the pre-gate (bundled), {points(of_trace):+.2f} over transitions",
    )
    lines = [f"# ExpertFlow A, its set-up\n\nMade by `python benchmarks/expertflow_a.py`.{explained()}", theirs, WHY]
    for hardware, rows in results.items():
        lines += table(hardware, rows)
    lines += predictor_lines("the bundled trace, base: pre-gate", of_bundled)
    lines += predictor_lines("V2-Lite, base: transitions", of_trace)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


def explained() -> str:
    return " " + " ".join((__doc__ or "").split("\n\n", 2)[2].split())


WHY = """
Why ours differ. At 20 GB about half of V2-Lite's experts are resident, and what must be moved for a token takes the
link longer than the token takes to compute: even *perfect* prediction four layers ahead leaves the share of stall
shown in its row, so no predictor can reach 0.1 % on an A6000 at batch 1. The paper's batch sizes are not known to us;
larger batches give more compute to hide copies behind. Its A6000 has 64 GB/s, the rate of both directions of the link
together; profiles here have what pinned copies reach. The predictors differ in what they may read: the paper's forest
corrects a pre-gate whose accuracy falls to about 26 % many layers ahead, the recording here has 67 % over one to
four, so less is left to correct; V2-Lite's recording has no pre-gate and two requests to learn from. Where the
machine has time to spare (the Ascend's host takes most of each layer) ExpertFlow A does have the least stall.
Prefetching costs hits on the slow link: experts that are fetched early push out others that are still in use."""

if __name__ == "__main__":
    main()
