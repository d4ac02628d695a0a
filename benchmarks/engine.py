"""How fast replays and engines are, as ratios against others' code on the same accesses.

    python benchmarks/engine.py [--traces ../shared/traces] [--repetitions 5] [--only replay] [--json]
    python benchmarks/engine.py --only sweep        # minutes: 200 cells over the gpt-oss-20b recording

Both sides of a pair run in turn, --repetitions times after one call that compiles and warms up; the table has the
median of the ratios and, in brackets, the lowest and the highest. Times are CPU time of this process (every side uses
one thread), so that other work on the machine disturbs them less.

Replay. An access is one expert that a layer-step needs: (layer, expert), ids ascending within a layer-step. libCacheSim
reads exactly that sequence, one request each, from an oracleGeneral file by its fastest path (TraceReader and
process_trace, sizes ignored, a small hash table), with as many objects of capacity as moeflow has slots. It has no
notion of a set and replays one by one, so its misses differ; where sets have one expert they are equal
(tests/sim/test_replay.py). moeflow's side starts from `Needs`, the trace flattened into arrays, as libCacheSim's starts
from a written file; one row includes the flattening. moe-policylang's side starts from its own arrays (`simulate_flat`
and `simulate_per_layer`: its replay without the conversion from its trace objects), on the first --short steps.

Curves. All capacities by `miss_ratio_curve` against one capacity by `replay`, from a `Trace` (flattening, and the
future where the policy needs it, included on both sides), and again from what is prepared.

Engines. The events engine against benchmarks/naive_simpy.py, a process per missing expert: the same policy object, one
wave per layer, one request; both must end at the same picosecond. The compiled engine against the events engine, after
its machine code is there.

Sweep. `sim sweep` over ten eviction policies, five budgets, and oracle prefetch over no, one, two and four layers, on
--jobs processes; CPU seconds are those of all of them, start and compilation included. Its own part, because it takes
minutes.

Surrogate routing (sim/surrogate.py) is made up, and says so; where the folder of recordings exists, gpt-oss-20b's is
used too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from moeflow.hwprofiles.profile import load_hardware
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots
from moeflow.sim.compiled import CompiledEngine
from moeflow.sim.events import EventsEngine, Setup
from moeflow.sim.miss_ratio import curve_of, miss_ratio_curve, stack_scoring
from moeflow.sim.needs import needs_of
from moeflow.sim.replay import replay, replay_scoring
from moeflow.sim.scoring import scoring_of
from moeflow.sim.surrogate import localities, surrogate
from moeflow.traces.importers import import_trace
from moeflow.traces.models import load_model_spec
from moeflow.traces.reader import load_trace
from moeflow.traces.trace import Trace
from naive_simpy import NaiveEngine

GEOMETRY = "qwen3-30b-a3b"  # 48 layers of 128 experts, top-8
RECORDING = "gptoss20b_mmlu_val_dev_decode"
RESIDENT = 0.25
PEERS = {"fifo": "FIFO", "lfu": "LFU", "belady-forced": "Belady"}  # the same policy in libCacheSim
SCORE_TABLES = ("lfu", "lrfu", "lcp", "fifo", "lfu-aged", "least-stale", "belady-forced")


@dataclass(frozen=True)
class Pair:
    """Two ways to do the same; `ours` and `theirs` do one run each and return its CPU seconds."""

    part: str  # replay, curves, engines
    on: str
    name: str
    goal: float
    ours: Callable[[], float]
    theirs: Callable[[], float]
    work: int  # accesses or tokens of one run
    unit: str
    cost: bool = False  # the ratio is ours / theirs and should be at most `goal`; else theirs / ours, and at least


def measure(pair: Pair, repetitions: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repetition in range(repetitions + 1):
        for side in ("ours", "theirs"):
            took = getattr(pair, side)()
            if repetition:
                seconds[side].append(took)
    ratios = [a / b if pair.cost else b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    found = statistics.median(ratios)
    return {
        "part": pair.part,
        "on": pair.on,
        "name": pair.name,
        "unit": pair.unit,
        "ours_per_s": pair.work / statistics.median(seconds["ours"]),
        "theirs_per_s": pair.work / statistics.median(seconds["theirs"]),
        "ratio": found,
        "ratio_range": [min(ratios), max(ratios)],
        "goal": f"{'at most' if pair.cost else 'at least'} {pair.goal:g}",
        "met": found <= pair.goal if pair.cost else found >= pair.goal,
    }


def timed(run: Callable[[], Any], prepare: Callable[[], Any] | None = None) -> Callable[[], float]:
    """CPU seconds of `run`, given what `prepare` made just before, which is not counted."""

    def once() -> float:
        prepared = () if prepare is None else (prepare(),)
        begun = time.process_time()
        run(*prepared)
        return time.process_time() - begun

    return once


def fresh(trace: Trace) -> Trace:
    """The same trace without anything derived from it."""
    return replace(trace)


def slots_for(trace: Trace, scope: str) -> Slots:
    layers, each = len(trace.meta.model.moe_layers), int(trace.meta.model.experts * RESIDENT)
    return Slots((layers * each,) if scope == "global" else (each,) * layers)


# --- replay


def oracle_general(path: Path, keys: np.ndarray) -> Path:
    """libCacheSim's binary format: time, object, size, index of the object's next request or -1."""
    records = np.zeros(len(keys), [("time", "<u4"), ("id", "<u8"), ("size", "<u4"), ("next", "<i8")])
    records["time"], records["id"], records["size"], records["next"] = np.arange(len(keys)), keys, 1, -1
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    records["next"][order[:-1][same]] = order[1:][same]
    records.tofile(path)
    return path


def libcachesim(files: list[Path], name: str, slots: int) -> Callable[[], float]:
    """CPU seconds of process_trace over each file with a fresh cache of `slots` objects."""
    import libcachesim as library

    def once() -> float:
        took = 0.0
        for file in files:
            kind = library.TraceType.ORACLE_GENERAL_TRACE
            reader = library.TraceReader(str(file), kind, library.ReaderInitParam(ignore_obj_size=True))
            cache = getattr(library, name)(slots, hashpower=12)
            begun = time.process_time()
            cache.process_trace(reader)
            took += time.process_time() - begun
        return took

    return once


def replay_pairs(on: str, trace: Trace, work: Path, short: int) -> Iterator[Pair]:
    needs = needs_of(trace)
    keys, accesses = needs.keys(), len(needs.expert)
    whole = [oracle_general(work / f"{on}.bin", keys)]
    layer_of = keys // needs.experts
    by_layer = [oracle_general(work / f"{on}-{i}.bin", keys[layer_of == i]) for i in range(needs.layers)]

    def ours(policy: str, scope: str) -> Callable[[], float]:
        slots = slots_for(trace, scope)
        scoring = scoring_of(Policy.load(policy), trace, needs, slots)
        return timed(lambda: replay_scoring(needs, scoring, slots))

    def pair(policy: str, scope: str, peer: str, goal: float) -> Pair:
        files, slots = (whole, slots_for(trace, "global")) if scope == "global" else (by_layer, slots_for(trace, scope))
        theirs = libcachesim(files, peer, slots.per_scope[0])
        name = f"{policy}, {'one pool' if scope == 'global' else 'per layer'}, against libCacheSim's {peer}"
        return Pair("replay", on, name, goal, ours(policy, scope), theirs, accesses, "M accesses/s")

    yield pair("lru", "global", "LRU", 3)
    yield pair("lru", "layer", "LRU", 3)
    for policy in SCORE_TABLES:
        yield pair(policy, "global", "LRU", 1)
        yield pair(policy, "layer", "LRU", 1)
    for policy, peer in PEERS.items():
        yield pair(policy, "global", peer, 1)
    flattening = timed(needs_of, lambda: fresh(trace))
    lru = libcachesim(whole, "LRU", slots_for(trace, "global").per_scope[0])
    replaying = ours("lru", "global")
    yield Pair(
        "replay", on, "lru, one pool, flattening included, against libCacheSim's LRU", 1,
        lambda: flattening() + replaying(), lru, accesses, "M accesses/s",
    )  # fmt: skip
    yield from policylang_pairs(on, first_steps(trace, short))


def first_steps(trace: Trace, steps: int) -> Trace:
    rows = int(trace.step_starts[min(steps, len(trace.step_starts) - 1)])
    columns = {name: array[:rows] for name, array in trace.columns.items()}
    return replace(trace, **columns)


def policylang_pairs(on: str, trace: Trace) -> Iterator[Pair]:
    """One row of probabilities per layer-step, of which the top-k are the experts that it needs."""
    from moe_policylang.benchmark.replay import simulate_flat, simulate_per_layer

    model, needs = trace.meta.model, needs_of(trace)
    if (np.diff(trace.step_starts) != 1).any() or len(needs.expert) != trace.experts.size:
        return  # it has no batches and no absent entries
    rows, layers = trace.rows, len(model.moe_layers)
    probabilities = np.zeros((rows * layers, model.experts), np.float32)
    np.put_along_axis(probabilities, trace.experts.reshape(rows * layers, -1).astype(np.int64), 1.0, axis=1)
    of_layer = np.tile(np.arange(layers, dtype=np.int32), rows)
    of_token = np.repeat(np.arange(rows, dtype=np.int32), layers)
    arrays = (probabilities, of_layer, np.zeros(rows * layers, np.int32), of_token)
    total = slots_for(trace, "global").held
    for scope, theirs in (
        ("global", lambda: simulate_flat(*arrays, model.top_k, total)),
        ("layer", lambda: simulate_per_layer(*arrays, model.top_k, total, layers)),
    ):
        slots = slots_for(trace, scope)
        scoring = scoring_of(Policy.load("lru"), trace, needs, slots)
        name = f"lru, {'one pool' if scope == 'global' else 'per layer'}, against moe-policylang"
        ours = timed(lambda slots=slots, scoring=scoring: replay_scoring(needs, scoring, slots))
        yield Pair("replay", on, name, 20, ours, timed(theirs), len(needs.expert), "M accesses/s")


# --- curves


def curve_pairs(on: str, trace: Trace) -> Iterator[Pair]:
    needs, anew = needs_of(trace), lambda: fresh(trace)
    for policy in ("lru", "lfu", "belady"):
        for scope in ("layer", "global"):
            slots = slots_for(trace, scope)
            scoring = scoring_of(Policy.load(policy), trace, needs, slots)
            on_stack = stack_scoring(Policy.load(policy), trace, needs)
            where = f"{policy}, {'per layer' if scope == 'layer' else 'one pool'}"
            yield Pair(
                "curves", on, f"{where}, all capacities against one, from a trace", 3,
                timed(lambda fresh, policy=policy, scope=scope: miss_ratio_curve(fresh, policy, scope), anew),
                timed(lambda fresh, policy=policy, slots=slots: replay(fresh, policy, slots), anew),
                len(needs.expert), "M accesses/s", cost=True,
            )  # fmt: skip
            yield Pair(
                "curves", on, f"{where}, all capacities against one, prepared", 3,
                timed(lambda on_stack=on_stack, scope=scope: curve_of(needs, on_stack, scope)),
                timed(lambda scoring=scoring, slots=slots: replay_scoring(needs, scoring, slots)),
                len(needs.expert), "M accesses/s", cost=True,
            )  # fmt: skip


# --- engines


def setup_of(trace: Trace, hardware: str = "rtx4090") -> Setup:
    slots = slots_for(trace, "layer")
    return Setup(
        trace, trace.meta.model, load_hardware(hardware), Policy.load("lru").residency(trace, slots), waves="1"
    )


def engine_pairs(on: str, trace: Trace) -> Iterator[Pair]:
    end = int(EventsEngine(setup_of(trace)).run().steps["end_ps"][-1])
    if end != NaiveEngine(setup_of(trace)).run():
        raise RuntimeError("the two engines disagree about when the run ends")
    make = lambda engine: lambda: engine(setup_of(trace))  # noqa: E731
    yield Pair(
        "engines", on, "events against a SimPy process per missing expert", 10,
        timed(lambda engine: engine.run(), make(EventsEngine)), timed(lambda engine: engine.run(), make(NaiveEngine)),
        trace.rows, "tokens/s",
    )  # fmt: skip


def compiled_pair(on: str, trace: Trace) -> Pair:
    make = lambda engine: lambda: engine(setup_of(trace))  # noqa: E731
    return Pair(
        "engines", on, "compiled against events", 40,
        timed(lambda engine: engine.run(), make(CompiledEngine)),
        timed(lambda engine: engine.run(), make(EventsEngine)), trace.rows, "tokens/s",
    )  # fmt: skip


# --- a sweep, as users run one

SWEPT = ("lru", "lfu", "lfu-aged", "lrfu", "lcp", "fifo", "least-stale", "window-swap", "belady", "moeflow")
BUDGETS, AHEAD = "0.1,0.2,0.25,0.4,0.5", (None, 1, 2, 4)  # layers that oracle prefetch looks ahead
SWEEP_GOAL_S = 180


def sweep(trace: Path, work: Path, jobs: int) -> dict[str, Any]:
    """Seconds of `sim sweep` over 200 cells."""
    documents = []
    for name in SWEPT:
        for distance in AHEAD:
            prefetch = "{kind: none}" if distance is None else f"{{kind: oracle, distance: {distance}}}"
            documents.append(work / f"{name}-{distance or 'alone'}.yaml")
            documents[-1].write_text(f"cache: {{evict: {name}}}\nprefetch: {prefetch}\n")
    words = ["--trace", trace, "--hw", "rtx4090", "--policy", ",".join(map(str, documents)), "--budget", BUDGETS]
    words += ["--jobs", jobs, "--out", work / "swept.parquet"]
    command = [sys.executable, "-m", "moeflow", "sim", "sweep", *map(str, words)]
    begun, cpu_begun = time.monotonic(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    took, cpu = time.monotonic() - begun, os.times()
    spent = cpu.children_user + cpu.children_system - cpu_begun.children_user - cpu_begun.children_system
    return {
        "part": "sweep", "on": "gpt-oss-20b", "cells": len(documents) * len(BUDGETS.split(",")), "jobs": jobs,
        "seconds": took, "cpu_seconds": spent, "goal_seconds": SWEEP_GOAL_S, "met": took <= SWEEP_GOAL_S,
    }  # fmt: skip


# --- all of it


def traces(options: argparse.Namespace, work: Path) -> dict[str, Trace]:
    model = load_model_spec(GEOMETRY)
    found = {f"surrogate {GEOMETRY}": surrogate(model, localities()[1], 1, options.tokens - 1)}
    source = options.traces / f"{RECORDING}.npz"
    if source.is_file():
        import_trace(source, work / "recorded.parquet")
        found["gpt-oss-20b"] = load_trace(work / "recorded.parquet")
    return found


def pairs(options: argparse.Namespace, work: Path) -> Iterator[Pair]:
    for on, trace in traces(options, work).items():
        if options.only in (None, "replay"):
            yield from replay_pairs(on, trace, work, options.short)
        if options.only in (None, "curves"):
            yield from curve_pairs(on, trace)
        if options.only in (None, "engines") and on.startswith("surrogate"):
            yield from engine_pairs(on, first_steps(trace, options.engine_tokens))
            yield compiled_pair(on, first_steps(trace, options.engine_tokens))


def print_sweep(options: argparse.Namespace) -> None:
    source = options.traces / f"{RECORDING}.npz"
    if not source.is_file():
        sys.exit(f"{source}: no such recording; --traces names the folder that holds it")
    with tempfile.TemporaryDirectory() as work:
        trace = Path(work) / "recorded.parquet"
        import_trace(source, trace)
        row = sweep(trace, Path(work), options.jobs)
    if options.json:
        print(json.dumps(row, indent=2))
        return
    print(
        f"{row['cells']} cells in {row['seconds']:.0f} s on {row['jobs']} processes ({row['cpu_seconds']:.0f} s of "
        f"CPU time, {row['cpu_seconds'] / row['cells']:.2f} s a cell); goal: under {SWEEP_GOAL_S} s"
        + ("" if row["met"] else ": missed")
    )


def print_row(row: dict[str, Any]) -> None:
    scale = 1e6 if row["unit"].startswith("M ") else 1
    low, high = row["ratio_range"]
    verdict = row["goal"] + ("" if row["met"] else ": missed")
    print(
        f"| {row['on']} | {row['name']} | {row['ours_per_s'] / scale:.1f} | {row['theirs_per_s'] / scale:.1f} "
        f"| {row['unit']} | {row['ratio']:.2f} [{low:.2f}, {high:.2f}] | {verdict} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path("../shared/traces"), help="folder of recordings")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2000, help="of the surrogate trace")
    parser.add_argument("--short", type=int, default=100, help="steps for moe-policylang")
    parser.add_argument("--engine-tokens", type=int, default=400, help="for the engines with a clock")
    parser.add_argument("--only", choices=("replay", "curves", "engines", "sweep"))
    parser.add_argument("--jobs", type=int, default=2, help="processes of the sweep")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args()
    if options.only == "sweep":
        return print_sweep(options)
    if not options.json:
        print("| routing | pair | ours | theirs | unit | ratio | goal |\n|---|---|---|---|---|---|---|")
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for pair in pairs(options, Path(work)):
            rows.append(measure(pair, options.repetitions))
            if not options.json:
                print_row(rows[-1])
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
