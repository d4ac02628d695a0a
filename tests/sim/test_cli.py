"""`sim run` as a user meets it: the files it writes, and one sentence for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from moeflow.hwprofiles.profile import load_hardware
from moeflow.traces.models import load_model_spec
from moeflow.traces.trace import Request, Trace, TraceMeta, expert_dtype
from moeflow.traces.writer import write_trace

import moeflow


def random_trace(model: str = "olmoe-1b-7b", steps: int = 6, seed: int = 0) -> Trace:
    """Uniform routing of one request: an 8-token prompt, then decode. For plumbing, never for figures."""
    spec = load_model_spec(model)
    rows, layers = 8 + steps, len(spec.moe_layers)
    rng = np.random.default_rng(seed)
    order = rng.random((rows, layers, spec.experts)).argsort(axis=2)[:, :, : spec.top_k]
    step = np.concatenate((np.zeros(8), np.arange(1, steps + 1)))
    return Trace(
        TraceMeta(spec, (Request(0, 8, steps),), {"device": "none: random numbers for a test"}, "CC0-1.0"),
        step.astype(np.int32),
        np.zeros(rows, np.int32),
        np.arange(rows, dtype=np.int32),
        np.full(rows, -1, np.int32),
        (step > 0).astype(np.int8),
        np.zeros(rows, np.int16),
        np.zeros(rows, np.uint8),
        order.astype(expert_dtype(spec.experts)),
    )


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "random.parquet"
    write_trace(path, random_trace())
    return path


def sim(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from moeflow.sim.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_a_run_writes_result_timeline_and_plot(trace_file: Path, tmp_path: Path) -> None:
    done = sim("run", "--hw", "ascend910b.yaml", "--trace", trace_file, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "tokens per second" in done.stdout and "uncalibrated" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["result.json", "summary.png", "timeline.json"]
    assert (tmp_path / "out" / "summary.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["hardware"]["name"] == "ascend910b" and result["tokens"] == 6
    spans = [e for e in json.loads((tmp_path / "out" / "timeline.json").read_text())["traceEvents"] if e["ph"] == "X"]
    assert {"dense", "experts"} <= {span["cat"] for span in spans}
    assert max(span["ts"] + span["dur"] for span in spans) == pytest.approx(result["duration_s"] * 1e6, rel=0.05)


def test_two_runs_write_identical_bytes(trace_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = sim("run", "--hw", "rtx4090", "--trace", trace_file, "--out", tmp_path / name, "--json")
        assert done.stdout == (tmp_path / name / "result.json").read_text()
    for file in ("result.json", "timeline.json", "summary.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_simulate_from_python_is_what_the_command_does(trace_file: Path, tmp_path: Path) -> None:
    done = sim(
        "run", "--hw", "rtx4090", "--link", "pcie3x16", "--trace", trace_file, "--policy", "belady",
        "--budget", "0.5", "--out", tmp_path, "--json",
    )  # fmt: skip
    result = moeflow.simulate(moeflow.load_trace(trace_file), "rtx4090", "belady", 0.5, link="pcie3x16")
    ours, theirs = result.values, json.loads(done.stdout)
    assert {**ours, "trace": None} == {**theirs, "trace": None}


def test_print_config_shows_the_whole_resolved_policy(trace_file: Path) -> None:
    done = sim("run", "--hw", "rtx4090", "--policy", "lookahead", "--print-config")
    assert "distance: 2" in done.stdout and "evict: lru" in done.stdout and "scratch: 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--trace", "missing.parquet"), "missing.parquet"),
        (("--hw", "rtx409"), "rtx4090"),
        (("--policy", "lruu"), "did you mean 'lru'"),
        (("--policy", "lookahead"), "lookahead"),
        (("--budget", "10 slots", "--policy", "lru"), "the least is 18 slots"),
        (("--budget", "100MB", "--policy", "lru"), "the least is 18 slots"),
        (("--budget", "1.5"), "between 0 and 1"),
        (("--budget", "plenty"), "20GiB"),
        (("--budget", "0.5", "--vram", "24GiB"), "twice"),
        (("--vram", "1GiB"), "dense weights"),
        (("--ram", "1MB"), "not even one expert"),
        (("--host-memory", "swapped"), "pinned or pageable"),
        (("--policy", "near-memory"), "add --near-memory NAME"),
        (("--near-memory", "hbm-pam"), "did you mean hbm-pim"),
        (("--host-memory", "pageable", "--pinned", "1GiB"), "give one of them"),
        (("--pinned", "much"), "expected a size"),
        (("--pinned", "2GiB", "--ram", "1GiB"), "more than the 1.00 GiB"),
        (("--model", "mixtral-8x7b"), "16 x 64, top-8"),
        (("--model", "olmo"), "olmoe-1b-7b"),
        (("--link", "pcie9"), "pcie9"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(
    trace_file: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    chosen = {"--hw": "rtx4090", "--trace": str(trace_file), **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    done = sim("run", "--out", "out", *(word for pair in chosen.items() for word in pair), cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_for_the_device_is_refused_with_numbers(trace_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "small.yaml"
    profile.write_text(
        "kind: machine\nextends: rtx4090\ncalibrated: false\ndevice:\n  memory_bytes: "
        "{value: 6000000000, unit: B, kind: estimate, source: a test}\n"
    )
    done = sim("run", "--hw", profile, "--trace", trace_file, "--budget", "0.9", "--out", tmp_path / "out")
    assert done.returncode == 2 and "do not fit the 5.59 GiB of small" in done.stderr


def test_a_truncated_trace_is_refused_and_nothing_is_written(trace_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(trace_file.read_bytes()[:-100])
    done = sim("run", "--hw", "rtx4090", "--trace", cut, "--out", tmp_path / "out")
    assert done.returncode == 2 and "cut.parquet" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_profile_key_is_named_by_its_path(trace_file: Path, tmp_path: Path) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("kind: machine\nextends: rtx4090\ncalibrated: false\ndevice: {flopz: 3}\n")
    done = sim("run", "--hw", profile, "--trace", trace_file, "--out", tmp_path / "out")
    assert done.returncode == 2 and "device.flopz" in done.stderr and "mine.yaml" in done.stderr


def test_an_unwritable_folder_is_refused_before_simulating(trace_file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    done = sim("run", "--hw", "rtx4090", "--trace", trace_file, "--out", tmp_path / "taken")
    assert done.returncode == 2 and "it is a file" in done.stderr and "simulated" not in done.stderr


def test_memory_options_change_what_they_say(trace_file: Path) -> None:
    trace = moeflow.load_trace(trace_file)
    pinned = moeflow.simulate(trace, "rtx4090")
    pageable = moeflow.simulate(trace, "rtx4090", host_memory="pageable")
    from_ssd = moeflow.simulate(trace, "rtx4090", ram="2GiB")
    assert pinned["tpot_s"]["mean"] < pageable["tpot_s"]["mean"]
    assert pinned["ssd_bytes"] == 0 < from_ssd["ssd_bytes"]
    assert pinned["tpot_s"]["mean"] < from_ssd["tpot_s"]["mean"]
    whole = moeflow.simulate(trace, "rtx4090", vram="auto")
    assert whole["slots"]["held"] == 16 * 64 and whole["miss"] > 0  # all fits, but a cache starts cold
    assert whole["peak_bytes"] <= 24 * 2**30


def test_tiers_lie_between_their_extremes(trace_file: Path) -> None:
    trace = moeflow.load_trace(trace_file)
    all_pinned = moeflow.simulate(trace, "rtx4090")
    everything = moeflow.simulate(trace, "rtx4090", pinned="64GiB")
    assert everything.to_json() == all_pinned.to_json()
    some = moeflow.simulate(trace, "rtx4090", pinned="3GiB")
    none = moeflow.simulate(trace, "rtx4090", host_memory="pageable")
    assert none["tiers"].keys() == {"pageable"} and some["tiers"].keys() == {"pinned", "pageable"}
    assert some["tiers"]["pinned"]["experts"] == 3 * 2**30 // some["model"]["bytes_per_expert"]
    assert all_pinned["tpot_s"]["mean"] < some["tpot_s"]["mean"] < none["tpot_s"]["mean"]
    all_three = moeflow.simulate(trace, "rtx4090", pinned="1GiB", ram="2GiB")
    assert sum(tier["experts"] for tier in all_three["tiers"].values()) == 16 * 64
    assert all_three["ssd_bytes"] == all_three["tiers"]["ssd"]["wanted"] * all_three["model"]["bytes_per_expert"]


def test_a_link_without_a_pageable_rate_is_refused_where_it_is_needed(trace_file: Path) -> None:
    trace, machine = moeflow.load_trace(trace_file), load_hardware("rtx4090")
    link = replace(machine.link, h2d=replace(machine.link.h2d, pageable_bandwidth=None))
    machine = replace(machine, link=link)
    for options in ({"host_memory": "pageable"}, {"pinned": "1GiB"}):
        with pytest.raises(moeflow.InputError, match=r"no h2d\.pageable_bandwidth; add it"):
            moeflow.simulate(trace, machine, **options)
    moeflow.simulate(trace, machine, pinned="1GiB", ram="1GiB")  # nothing is pageable


def test_arrivals_hold_a_request_back(trace_file: Path) -> None:
    trace = moeflow.load_trace(trace_file)
    later = replace(trace, meta=replace(trace.meta, requests=(Request(0, 8, 6, arrival_s=2.0),)))
    assert moeflow.simulate(later, "rtx4090")["duration_s"] == pytest.approx(
        2.0 + moeflow.simulate(trace, "rtx4090")["duration_s"]
    )
