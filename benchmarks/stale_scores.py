"""What it costs to choose victims by scores that are some steps old: the table of docs/policies.md.

    python benchmarks/stale_scores.py [--traces ../shared/traces] [--rows 2000]

Share of needed experts that are held, decode steps, a quarter of all experts in slots, cold start. A trace longer than
--rows contributes its first requests up to that many rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from moeflow.traces.importers import import_trace

import moeflow
from policies import first_rows

POLICIES = {
    "lru": {"evict": "lru"},
    "lru, one pool": {"evict": "lru", "scope": "global"},
    "moeflow per layer": {"evict": "moeflow"},
    "moeflow": {"evict": "moeflow", "scope": "global"},
}
STALE = (0, 1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--rows", type=int, default=2000)
    arguments = parser.parse_args()
    print("| trace | policy | " + " | ".join(f"{steps} steps old" for steps in STALE) + " |")
    print("|---" * (2 + len(STALE)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(arguments.traces.glob("*.npz")):
            imported = Path(folder) / f"{source.stem}.parquet"
            import_trace(source, imported)
            trace = first_rows(moeflow.load_trace(imported), arguments.rows)
            for name, cache in POLICIES.items():
                runs = (moeflow.simulate(trace, "h200", {"cache": {**cache, "stale": steps}}, 0.25) for steps in STALE)
                rates = " | ".join(f"{run['hit']:.4f}" for run in runs)
                print(f"| {source.stem.removesuffix('_decode')} | {name} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
