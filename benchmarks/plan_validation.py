"""How well does surrogate routing stand for a model's own? Leave one out, over the recordings of real models.

    python benchmarks/plan_validation.py [--traces ../shared/traces] [--out docs/plan.md]

For each recording: plan for its model with localities measured on the other recordings only, then again with its own
recording, on the same machine with room for a quarter and for half of the experts. Prints, per way to serve experts,
predicted tokens/s with interval and hit rate beside those of the own routing. --out replaces the table between the
marks `<!-- validation -->` in that file. Both sides are simulations: this says what made-up routing costs in accuracy,
nothing about the hardware model.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
from moeflow.hwprofiles.profile import load_hardware
from moeflow.sim.plan import CACHES, Plan, make_plan
from moeflow.sim.surrogate import localities
from moeflow.traces.importers import import_trace
from moeflow.traces.trace import Trace

import moeflow

RECORDINGS = ("gptoss20b_mmlu_val_dev", "dsv2lite_nvmoe", "olmoe_nvmoe")
MACHINES, FRACTIONS = ("rtx4090",), (0.25, 0.5)
CONTEXT = 4096
HEADING = (
    "recording", "machine", "resident", "way", "predicted", "interval", "own routing", "error", "inside",
    "hit predicted", "hit own",
)  # fmt: skip


def plans(trace: Trace, name: str, machine: str, fraction: float) -> tuple[Plan, Plan]:
    """Planned from the others' locality, and from the recording itself."""
    model = trace.meta.model
    fixed = load_hardware(machine).device.reserve_bytes + model.dense_bytes + CONTEXT * model.kv_bytes_per_token
    asked = {"vram": f"{fixed + int(fraction * model.routed_bytes)}B", "context": CONTEXT, "ram": "512GiB"}
    others = localities(without=name)
    return make_plan(model, machine, routing=others, **asked), make_plan(model, machine, trace=trace, **asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = ["| " + " | ".join(HEADING) + " |", "|" + "---|" * len(HEADING)]
    errors, inside, chosen, regret = [], [], [], []
    with tempfile.TemporaryDirectory() as work:
        for name in RECORDINGS:
            import_trace(options.traces / f"{name}_decode.npz", Path(work, "own.parquet"))
            trace = moeflow.load_trace(Path(work, "own.parquet"))
            for machine in MACHINES:
                for fraction in FRACTIONS:
                    predicted, own = plans(trace, name, machine, fraction)
                    for way in ("cpu", *CACHES):
                        said, true = predicted.row(way), own.row(way)
                        low, high = said["interval"]
                        error = said["tokens_per_s"] / true["tokens_per_s"] - 1
                        within = low * 0.999 <= true["tokens_per_s"] <= high * 1.001
                        if way in CACHES:
                            errors.append(error)
                            inside.append(within)
                        verdict = "fixed" if way not in CACHES else "yes" if within else "**no**"
                        cells = (
                            name, machine, f"{fraction:.0%}", said["title"], f"{said['tokens_per_s']:.1f}",
                            f"{low:.1f} to {high:.1f}", f"{true['tokens_per_s']:.1f}", f"{error:+.0%}",
                            verdict, f"{said['hit']:.3f}", f"{true['hit']:.3f}",
                        )  # fmt: skip
                        lines.append("| " + " | ".join(cells) + " |")
                        print(lines[-1], flush=True)
                    best = own.row(own.values["best"])["tokens_per_s"]
                    chosen.append(predicted.values["best"] == own.values["best"])
                    regret.append(1 - own.row(predicted.values["best"])["tokens_per_s"] / best)
    summary = (
        f"Of {len(errors)} predictions for caches, {sum(inside)} lie inside the interval; the middle is off by "
        f"{np.mean(np.abs(errors)):.0%} on average, {max(errors, key=abs):+.0%} at worst. The way that the plan calls "
        f"best is also best on the own routing in {sum(chosen)} of {len(chosen)} cases; following the plan costs "
        f"{np.mean(regret):.1%} of tokens/s on average, {max(regret):.1%} at worst."
    )
    print(summary)
    if options.out is not None:
        table = "<!-- validation -->\n" + "\n".join(lines) + "\n\n" + summary + "\n<!-- /validation -->"
        text = options.out.read_text(encoding="utf-8")
        done = re.sub(r"<!-- validation -->.*?<!-- /validation -->", lambda _: table, text, flags=re.DOTALL)
        part = options.out.with_suffix(".part")
        part.write_text(done, encoding="utf-8")
        part.replace(options.out)


if __name__ == "__main__":
    main()
