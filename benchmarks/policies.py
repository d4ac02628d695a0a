"""Every bundled policy on every recorded trace, and pooled over the traces: the table of docs/policy-table.md.

    python benchmarks/policies.py --out docs/policy-table.md [--traces ../shared/traces] [--hw a100-80g] [--rows 2000]

Predictors are fitted on every second request, half-lives of LRFU chosen there; all figures are of the other requests,
decode steps only. Capacities are 2k, 3k, 25 % and 50 % of a layer's experts; a global pool has as many slots in all.
A trace longer than --rows contributes its first requests up to that many rows.

`gap` is the share of the distance in time per token between LRU and the clairvoyant bound that a policy closes, the
bound held fixed; intervals are 95 %, bootstrap over requests, or over blocks of 50 tokens where a trace has fewer
than twenty. The bound is of runs that only use the link: what computes on the host can close more than all of it.
Pooled figures are means over traces, each trace resampled by itself. `decision` is the measured time of all that the
policy and `Residency` do for one layer, in Python, beside another process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from moeflow.policies.policy import find_class, preset_names
from moeflow.policies.predictor import Predictor
from moeflow.policies.prefetch import BEFORE_FIRST_LAYER
from moeflow.policies.residency import Residency
from moeflow.sim.budget import slots_for_budget
from moeflow.traces.bundled import BUNDLED_TRACE, PRICED_AS
from moeflow.traces.importers import import_trace
from moeflow.traces.trace import Trace
from moeflow.traces.writer import write_trace

import moeflow

HALF_LIVES = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)  # times experts / top-k steps
TUNED = "lrfu, tuned"
LABELS = ("2k", "3k", "25 %", "50 %")
DRAWS = 2000
LEAST_GROUPS = 5  # requests or blocks below which no interval is given
HEADINGS = (
    "policy", "hit", "late", "wasted MB", "MB/token", "wait ms", "TPOT ms", "decision us", "gap closed %",
)  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """One trace in halves: `judged` is what every figure is about."""

    name: str
    fitting: Path
    judged: Path
    model: str | None  # prices it; None: the recorded one


@dataclass(frozen=True)
class Job:
    recording: Recording
    hardware: str
    policy: str
    label: str  # of the capacity
    slots: int  # per layer
    fitted: str | None  # the predictor's file, or why there is none


def recordings(folder: Path, work: Path, rows: int) -> Iterator[Recording]:
    """The bundled trace and every importable recording of the folder, halved."""
    sources: list[tuple[str, Path, str | None]] = []
    if BUNDLED_TRACE.is_file():
        sources.append(("bundled tiny MoE", BUNDLED_TRACE, PRICED_AS))
    for source in sorted(folder.glob("*.npz")):
        import_trace(source, work / f"{source.stem}.parquet")
        sources.append((source.stem.removesuffix("_decode"), work / f"{source.stem}.parquet", None))
    for name, path, model in sources:
        trace = moeflow.load_trace(path)
        requests = np.unique(trace.request)
        halves = []
        for which, kept in (("fitting", requests[::2]), ("judged", requests[1::2])):
            half = work / f"{path.stem}.{which}.parquet"
            write_trace(half, first_rows(trace.of_requests(kept.tolist()), rows))
            halves.append(half)
        yield Recording(name, *halves, model)


def first_rows(trace: Trace, most: int) -> Trace:
    """The first whole requests of at most `most` rows together, at least one request."""
    requests, sizes = np.unique(trace.request, return_counts=True)
    kept = max(1, int(np.searchsorted(np.cumsum(sizes), most, side="right")))
    return trace if kept == len(requests) else trace.of_requests(requests[:kept].tolist())


def capacities(trace: Trace) -> dict[int, str]:
    """Slots per layer, and what they are called."""
    k, experts = trace.meta.model.top_k, trace.meta.model.experts
    named: dict[int, str] = {}
    for slots, name in zip((2 * k, 3 * k, experts // 4, experts // 2), LABELS, strict=True):
        if k < slots < experts:
            named[slots] = f"{named[slots]} = {name}" if slots in named else name
    return dict(sorted(named.items()))


def train(recording: Recording, kind: str, folder: Path) -> str:
    """The fitted file, or why the predictor cannot be fitted to this trace."""
    path = folder / f"{recording.fitting.stem}.{kind}.safetensors"
    try:
        cls = find_class(Predictor, kind, "benchmark")
        cls.train(moeflow.load_trace(recording.fitting), moeflow.load_trace(recording.judged)).save(path)
    except moeflow.InputError as error:
        return f"n/a: {error}"
    return str(path)


def cell(job: Job) -> dict[str, Any]:
    """One run; what is refused comes back as the reason."""
    trace = moeflow.load_trace(job.recording.judged)
    facts = {"trace": job.recording.name, "capacity": job.label, "policy": job.policy, "slots": job.slots}
    if job.fitted is not None and job.fitted.startswith("n/a"):
        return {**facts, "refused": job.fitted.removeprefix("n/a: ")}
    try:
        chosen = tuned_lrfu(job) if job.policy == TUNED else moeflow.Policy.load(job.policy)
        chosen = chosen if job.fitted is None else chosen.with_fitted(job.fitted)
        budget = job.slots * len(trace.meta.model.moe_layers) + chosen.scratch
        result = moeflow.simulate(trace, job.hardware, chosen, budget, model=job.recording.model)
        microseconds = decision_microseconds(trace, chosen, budget)
    except moeflow.InputError as error:
        return {**facts, "refused": str(error)}
    kept = ("hit", "late", "bytes_per_token", "wait_s_per_token", "bounds", "exactness")
    return {
        **facts, **{name: result.values[name] for name in kept}, "tpot_s": result["tpot_s"]["mean"],
        "oracle": result["policy"]["oracle"], "decision_us": microseconds, "groups": groups(trace, result),
    }  # fmt: skip


def tuned_lrfu(job: Job) -> moeflow.Policy:
    """LRFU with the half-life that hits most on the fitting half, for this trace and capacity."""
    trace = moeflow.load_trace(job.recording.fitting)
    model = trace.meta.model
    slots = slots_for_budget(job.slots * len(model.moe_layers) + 2, model, "layer", 2)
    best = (-1.0, moeflow.Policy.load("lrfu"))
    for half_life in HALF_LIVES:
        document = {"cache": {"evict": "lrfu", "half_life": half_life * model.experts / model.top_k}}
        policy = moeflow.Policy.from_document(document, TUNED)
        hits = sum(int(routed.held.sum()) for routed in replay(policy.residency(trace, slots), trace, policy))
        best = max(best, (hits, policy), key=lambda found: found[0])
    return best[1]


def replay(residency: Residency, trace: Trace, policy: moeflow.Policy, steps: int | None = None) -> Iterator[Any]:
    """Every layer-step's `Routed`, without time."""
    said, ahead, chances = policy.predictions(trace), trace.lookahead, trace.lookahead_weights
    named = ("probs", "candidates", "candidate_logits")
    columns = {name: getattr(trace, name) for name in named if getattr(trace, name) is not None}
    alive: set[int] = set()
    step_of = np.searchsorted(trace.step_starts, np.arange(trace.rows), side="right") - 1
    last_step = dict(zip(trace.request.tolist(), step_of.tolist(), strict=True))
    for step, (first, last) in enumerate(pairwise(trace.step_starts[: None if steps is None else steps + 1])):
        rows = slice(first, last)
        for request in sorted(set(trace.request[rows].tolist()) - alive):
            residency.request_begins(request)
            alive.add(request)
        residency.step_begins(
            step, trace.token[rows], trace.request[rows], int(trace.phase[rows].min()),
            None if ahead is None else ahead[rows, 0], None if chances is None else chances[rows, 0],
            None if said is None else said.at(BEFORE_FIRST_LAYER, rows),
        )  # fmt: skip
        residency.fetch_plan(BEFORE_FIRST_LAYER)
        for layer in range(residency.layers):
            began = time.perf_counter()
            routed = residency.routed(
                layer, trace.experts[rows, layer], None if trace.weights is None else trace.weights[rows, layer],
                trace.request[rows], None if ahead is None else ahead[rows, layer + 1],
                {name: values[rows, layer] for name, values in columns.items()},
                None if chances is None else chances[rows, layer + 1], None if said is None else said.at(layer, rows),
            )  # fmt: skip
            residency.fetch_plan(layer)
            residency.layer_done(layer)
            DECIDED.append(time.perf_counter() - began)
            yield routed
        for request in {int(r) for r in trace.request[rows] if last_step[int(r)] == step}:
            residency.request_ends(request)
            alive.discard(request)


DECIDED: list[float] = []  # seconds of each layer's decisions, as `replay` goes


def decision_microseconds(trace: Trace, policy: moeflow.Policy, budget: int) -> float:
    """Median over up to 300 steps, after as many layer-steps of warming up as there are layers."""
    slots = slots_for_budget(budget, trace.meta.model, policy.scope, policy.scratch)
    DECIDED.clear()
    for _ in replay(policy.residency(trace, slots), trace, policy, 300):
        pass
    return float(np.median(DECIDED[trace.experts.shape[1] :]) * 1e6)


def groups(trace: Trace, result: moeflow.Result) -> dict[str, list[float]]:
    """Sums per request (or block of 50 tokens) over decode steps: tokens, time, wait, hits and needs."""
    steps, measured = result.steps, result.measurements.steps
    decode = steps.decode
    request = np.unique(trace.request[steps.starts[:-1]], return_inverse=True)[1][decode]
    group = request if request.max(initial=0) >= 19 else np.arange(decode.sum()) // 50
    tokens = steps.tokens[decode]
    duration = (measured["end_ps"] - measured["start_ps"])[decode] * tokens / 1e12
    sums = {"tokens": tokens, "time": duration, "wait": measured["wait_ps"][decode] * tokens / 1e12}
    sums |= {"hit": measured["hit"][decode], "needed": measured["needed"][decode]}
    return {name: np.bincount(group, values).tolist() for name, values in sums.items()}


def gap(row: dict[str, Any], lru: dict[str, Any], draws: np.ndarray | None = None) -> np.ndarray:
    """Share of the gap closed: [1], or one per resampling in `draws` [D, groups]."""
    take = np.arange(len(row["groups"]["tokens"]))[None] if draws is None else draws
    per_token = [
        np.array(of["groups"]["time"])[take].sum(1) / np.array(of["groups"]["tokens"])[take].sum(1) for of in (lru, row)
    ]
    bound = lru["bounds"]["clairvoyant"]["tpot_s"]
    return (per_token[0] - per_token[1]) / (per_token[0] - bound)


def resampled(row: dict[str, Any], seed: int) -> np.ndarray:
    count = len(row["groups"]["tokens"])
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))


def line(row: dict[str, Any], lru: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| {row['policy']} | {why(row['refused'])} |" + " |" * (len(HEADINGS) - 2)
    moved = row["bytes_per_token"]
    low, high = np.percentile(gap(row, lru, resampled(row, 0)), [2.5, 97.5]) * 100
    interval = f"[{low:.1f}, {high:.1f}]" if len(row["groups"]["tokens"]) >= LEAST_GROUPS else "[too short]"
    total = sum(moved[name] for name in ("demand", "stream", "prefetch", "low_bit"))
    figures = (
        named(row), f"{row['hit']:.4f}", f"{row['late']:.4f}", f"{moved['wasted'] / 1e6:.1f}", f"{total / 1e6:.1f}",
        f"{row['wait_s_per_token'] * 1e3:.2f}", f"{row['tpot_s'] * 1e3:.2f}", f"{row['decision_us']:.0f}",
        f"{100 * gap(row, lru)[0]:.1f} {interval}",
    )  # fmt: skip
    return "| " + " | ".join(figures) + " |"


def named(row: dict[str, Any]) -> str:
    marks = [row["exactness"]] * (row["exactness"] != "bit") + ["oracle"] * bool(row["oracle"])
    return f"{row['policy']} ({', '.join(marks)})" if marks else str(row["policy"])


def why(refused: str) -> str:
    return (
        f"n/a: needs {refused.split(chr(39))[1]}"
        if "the column" in refused
        else f"n/a: {refused.split(':')[-1].strip()}"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: the quickest first, refused policies last."""
    lru = next(row for row in rows if row["policy"] == "lru")
    done = sorted((row for row in rows if "refused" not in row), key=lambda row: row["tpot_s"])
    ordered = done + [row for row in rows if "refused" in row]
    return [heading(HEADINGS), *(line(row, lru) for row in ordered)]


def heading(names: tuple[str, ...]) -> str:
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def pooled(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Per policy and capacity, the mean over traces of the gap closed, with its interval, and how many traces."""
    lines = [heading(("policy", *LABELS, "mean wait saved %", "traces"))]
    lru = {(row["trace"], row["slots"]): row for row in rows if row["policy"] == "lru"}
    found: list[tuple[float, str]] = []
    for name in names:
        own = [row for row in rows if row["policy"] == name and "refused" not in row]
        if not own:
            continue
        pairs = [(row, lru[row["trace"], row["slots"]]) for row in own]
        cells, means = zip(*(pooled_cell(pairs, label) for label in LABELS), strict=True)
        saved = np.mean([1 - row["wait_s_per_token"] / other["wait_s_per_token"] for row, other in pairs])
        traces = len({row["trace"] for row in own})
        found.append(
            (float(-np.mean(means)), f"| {named(own[0])} | {' | '.join(cells)} | {100 * saved:.1f} | {traces} |")
        )
    return lines + [text for _, text in sorted(found)]


def pooled_cell(pairs: list[tuple[dict[str, Any], dict[str, Any]]], label: str) -> tuple[str, float]:
    """The mean gap closed at one capacity with its interval, as text and as a number."""
    of_label = [(row, lru) for row, lru in pairs if label in row["capacity"].split(" = ")]
    mean = 100 * np.mean([gap(row, lru)[0] for row, lru in of_label])
    draws = [gap(row, lru, resampled(row, seed)) for seed, (row, lru) in enumerate(of_label)]
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5]) * 100
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]", float(mean)


def trained_predictors(names: list[str]) -> dict[str, str]:
    """The kind of predictor of each policy that has one which is trained."""
    policies = {name: moeflow.Policy.load(name) for name in names if name != TUNED}
    found = {name: policy.predictor() for name, policy in policies.items()}
    return {
        name: str(policies[name].document["predict"]["kind"])
        for name, p in found.items()
        if p is not None and p.trained
    }


def duels(rows: list[dict[str, Any]]) -> list[str]:
    """moeflow against tuned LRFU and against the best other policy that is exact, causal and untrained on the trace."""
    lines = [
        heading(("trace", "capacity", "rival", "wait ms, rival", "moeflow", "saved % [95 %]", "TPOT saved % [95 %]"))
    ]
    cells = list(dict.fromkeys((row["trace"], row["capacity"]) for row in rows))
    for trace, capacity in cells:
        own = [row for row in rows if (row["trace"], row["capacity"]) == (trace, capacity) and "refused" not in row]
        exact = [row for row in own if row["exactness"] == "bit" and not row["oracle"]]
        mine = next((row for row in exact if row["policy"] == "moeflow"), None)
        others = [row for row in exact if row["policy"] != "moeflow"]
        rivals = [row for row in others if row["policy"] == TUNED] + sorted(others, key=lambda row: row["tpot_s"])[:1]
        for rival in dict.fromkeys(map(id, rivals)) if mine else ():
            row = next(row for row in rivals if id(row) == rival)
            waits, times = (saved(row, mine, name) for name in ("wait", "time"))
            figures = (trace, capacity, row["policy"], f"{row['wait_s_per_token'] * 1e3:.2f}",
                       f"{mine['wait_s_per_token'] * 1e3:.2f}", waits, times)  # fmt: skip
            lines.append("| " + " | ".join(figures) + " |")
    return lines


def saved(rival: dict[str, Any], mine: dict[str, Any], name: str) -> str:
    """Percent of the rival's sum of `name` that moeflow saves, with a paired bootstrap interval."""
    theirs, ours = (np.array(row["groups"][name]) for row in (rival, mine))
    draws = resampled(mine, 0)
    low, high = np.percentile(100 * (1 - ours[draws].sum(1) / theirs[draws].sum(1)), [2.5, 97.5])
    interval = f"[{low:+.1f}, {high:+.1f}]" if len(ours) >= LEAST_GROUPS else "[too short]"
    return f"{100 * (1 - ours.sum() / theirs.sum()):+.1f} {interval}"


def render(rows: list[dict[str, Any]], hardware: str) -> str:
    """The whole page from the figures of every cell."""
    names = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [f"# Policies compared\n\nMade by `python benchmarks/policies.py`; machine {hardware}. {EXPLAINED}"]
    lines += ["\n## moeflow against the best of the others\n", *duels(rows)]
    lines += ["\n## Pooled: gap between LRU and the clairvoyant bound closed, %\n", *pooled(rows, names)]
    for trace in dict.fromkeys(row["trace"] for row in rows):
        own = [row for row in rows if row["trace"] == trace]
        tokens = next(sum(row["groups"]["tokens"]) for row in own if "groups" in row)
        lines.append(f"\n## {trace}: {tokens:.0f} decode tokens judged")
        for capacity in dict.fromkeys(row["capacity"] for row in own):
            cells = [row for row in own if row["capacity"] == capacity]
            lines += [f"\n### {capacity}: {cells[0]['slots']} slots per layer\n", *table(cells)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--hw", default="a100-80g", help="a machine that every capacity fits")
    parser.add_argument("--rows", type=int, default=2000, help="rows of each half of a trace at most")
    parser.add_argument("--policies", nargs="*", default=[*preset_names(), TUNED])
    parser.add_argument("--only", default="", help="traces whose name contains this")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the Markdown there too")
    parser.add_argument("--figures", type=Path, help="keep every cell's figures there as JSON")
    options = parser.parse_args()
    names = list(dict.fromkeys(["lru", *options.policies]))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.workers) as pool:
        work = Path(folder)
        for recording in recordings(options.traces, work, options.rows):
            if options.only not in recording.name:
                continue
            trace = moeflow.load_trace(recording.judged)
            kinds = trained_predictors(names)
            wanted = sorted(set(kinds.values()))
            made = pool.map(train, *zip(*((recording, kind, work) for kind in wanted), strict=True)) if wanted else ()
            files = dict(zip(wanted, made, strict=True))
            for slots, label in capacities(trace).items():
                jobs = [Job(recording, options.hw, n, label, slots, files.get(kinds.get(n, ""))) for n in names]
                rows += pool.map(cell, jobs)
                print(f"{recording.name}, {label}: {len(names)} policies", file=sys.stderr, flush=True)
    if options.figures:
        options.figures.write_text(json.dumps(rows))
    text = render(rows, options.hw)
    print(text)
    if options.out:
        options.out.write_text(text)


EXPLAINED = " ".join((__doc__ or "").split("\n\n", 2)[2].split())

if __name__ == "__main__":
    main()
