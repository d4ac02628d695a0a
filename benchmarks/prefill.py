"""Time to first token with experts selected, whole layers streamed, or by expectation: the table of docs/model.md.

    python benchmarks/prefill.py

The bundled recording (208 requests, 20 tokens of prompt and 33 of answer each) priced as OLMoE-1B-7B, LRU, a quarter
of the experts in slots. N requests in lockstep make steps of 20 N prompt tokens; the last rows batch continuously.
"""

from __future__ import annotations

from typing import Any

import moeflow

MACHINES = ("rtx4090", "h20", "gh200")
PREFILLS = ("select", "stream", "auto")
LOCKSTEP = (8, 32, 104, 208)
RATES = {"rtx4090": 2, "gh200": 10}  # requests per second


def main() -> None:
    print("| machine | prompt tokens a step | select ms | stream ms | auto ms | steps streamed by auto |")
    print("|---|---|---|---|---|---|")
    for machine in MACHINES:
        for batch in LOCKSTEP:
            row(machine, str(20 * batch), {"batch": batch})
    for machine, rate in RATES.items():
        options = {"batching": "continuous", "arrivals": f"poisson:{rate}", "token_budget": 64}
        row(machine, f"up to 64, {rate} requests/s", options)


def row(machine: str, tokens: str, options: dict[str, Any]) -> None:
    """One machine and way to form steps."""
    results = {
        prefill: moeflow.simulate(None, machine, {"miss": {"prefill": prefill}}, 0.25, **options)
        for prefill in PREFILLS
    }
    times = " | ".join(f"{1e3 * results[prefill]['ttft_s']['p50']:.1f}" for prefill in PREFILLS)
    (streamed,) = (note.split()[2] for note in results["auto"]["notes"] if note.startswith("miss.prefill auto"))
    print(f"| {machine} | {tokens} | {times} | {streamed} |", flush=True)


if __name__ == "__main__":
    main()
