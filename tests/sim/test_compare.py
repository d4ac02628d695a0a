"""`result.json`'s per-request table, and `sim compare` on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cases import cases, machines
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.sim.cli import app
from moeflow.sim.compare import compare, load_result
from moeflow.traces.trace import DECODE, PREFILL, REJECTED
from moeflow.traces.writer import write_trace
from test_cli import random_trace
from test_runs import run, setup_of
from typer.testing import CliRunner

import moeflow


@given(data=st.data())
@settings(max_examples=25)
def test_each_request_has_the_figures_of_its_own_steps(data):
    """Against the definition, row by row."""
    case = data.draw(cases(arrivals=data.draw(st.booleans())))
    result, trace = run(setup_of(case, data.draw(machines()))), case.trace
    times, found = result.measurements.steps, result["per_request"]
    step_of = np.searchsorted(trace.step_starts, np.arange(trace.rows), side="right") - 1
    assert found["request"] == sorted(set(trace.request.tolist()))
    for i, request in enumerate(found["request"]):
        rows = [row for row in range(trace.rows) if trace.request[row] == request and trace.phase[row] == DECODE]
        assert found["tokens"][i] == sum(not trace.flags[row] & REJECTED for row in rows)
        for name, of_step in (("tpot_s", times["end_ps"] - times["start_ps"]), ("wait_s", times["wait_ps"])):
            if not rows:
                assert found[name][i] is None
            else:
                assert found[name][i] == sum(int(of_step[step_of[row]]) for row in rows) / 1e12 / len(rows)
        assert (found["ttft_s"][i] is None) == (PREFILL not in trace.phase[trace.request == request])
    if result["ttft_s"]:
        known = [value for value in found["ttft_s"] if value is not None]
        assert result["ttft_s"]["p99"] == max(known)


def test_requests_add_up_to_the_run_and_the_table_is_compact():
    result = moeflow.simulate(random_trace(), "rtx4090", "lru")
    assert result["per_request"]["tpot_s"] == [pytest.approx(result["tpot_s"]["mean"], rel=1e-12)]
    assert result["per_request"]["wait_s"] == [pytest.approx(result["wait_s_per_token"], rel=1e-12)]
    assert json.loads(result.to_json()) == json.loads(json.dumps(result.values))
    lines = result.to_json().splitlines()
    assert '    "tokens": [6],' in lines and '    "request": [0],' in lines


def result_of(tpot, requests=None, **others):
    ids = list(range(len(tpot))) if requests is None else requests
    empty = [None] * len(tpot)
    table = {"request": ids, "tokens": [1] * len(tpot), "tpot_s": tpot, "ttft_s": empty, "wait_s": [0.0] * len(tpot)}
    return {
        "trace": {"name": "t", "sha256": "a" * 64}, "policy": {"name": "p", "oracle": False},
        "hardware": {"name": "h", "link": "l"}, "budget_bytes": 1, "exactness": "bit", "calibrated": True,
        "per_request": table, **others,
    }  # fmt: skip


def test_differences_by_hand():
    found = compare(result_of([1.0, 2.0, 3.0, 9.0], [0, 1, 2, 7]), result_of([2.0, 2.5, 4.5, 8.0], [0, 1, 2, 8]))
    tpot = found["figures"]["tpot_s"]
    assert tpot["requests"] == 3 and tpot["mean"] == [2.0, 3.0]
    assert tpot["difference"]["value"] == pytest.approx(1.0) and tpot["ratio"]["value"] == pytest.approx(1.5)
    low, high = tpot["difference"]["interval"]
    assert 0.5 <= low < 1 < high <= 1.5
    assert tpot["p"] == 0.25  # three differences of one sign: 2 / 2^3
    assert "ttft_s" not in found["figures"]  # nobody has one
    wait = found["figures"]["wait_s"]
    assert wait["difference"] == {"value": 0.0, "interval": None} and wait["ratio"] is None and wait["p"] == 1.0


def test_one_request_has_no_interval():
    tpot = compare(result_of([1.0]), result_of([2.0]))["figures"]["tpot_s"]
    assert tpot["ratio"] == {"value": 2.0, "interval": None}


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(40):
        a = rng.gamma(4, size=40)
        b = a + rng.normal(0.3, 0.5, 40)
        low, high = compare(result_of(a.tolist()), result_of(b.tolist()))["figures"]["tpot_s"]["difference"]["interval"]
        covered += low <= 0.3 <= high
    assert covered >= 34


def test_swapping_the_runs_turns_the_sign():
    rng = np.random.default_rng(2)
    a, b = result_of(rng.random(20).tolist()), result_of(rng.random(20).tolist())
    there, back = (compare(*pair)["figures"]["tpot_s"] for pair in ((a, b), (b, a)))
    assert there["difference"]["value"] == -back["difference"]["value"] and there["p"] == back["p"]
    assert compare(a, b) == compare(a, b)


# --- the command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_trace(folder / "t.parquet", random_trace())
    write_trace(folder / "u.parquet", random_trace(seed=1))
    for name, trace, policy in (("a", "t", "lru"), ("b", "t", "belady"), ("c", "u", "lru")):
        result = moeflow.simulate(folder / f"{trace}.parquet", "rtx4090", policy)
        (folder / name).mkdir()
        (folder / name / "result.json").write_text(result.to_json())
    (folder / "list.json").write_text("[]")
    (folder / "broken.json").write_text("{")
    old = {k: v for k, v in json.loads((folder / "a" / "result.json").read_text()).items() if k != "per_request"}
    (folder / "old.json").write_text(json.dumps(old))
    return folder


def test_the_command_compares_folders_and_files(runs: Path) -> None:
    done = CliRunner().invoke(app, ["compare", str(runs / "a"), str(runs / "b" / "result.json")])
    assert done.exit_code == 0 and "time per token" in done.stdout and "oracle" in done.stdout
    done = CliRunner().invoke(app, ["compare", str(runs / "a"), str(runs / "b"), "--json"])
    ours = compare(load_result(runs / "a"), load_result(runs / "b"), (str(runs / "a"), str(runs / "b")))
    assert json.loads(done.stdout) == ours


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("c", "runs of different traces, t.parquet"),
        ("nowhere", "no such file"),
        ("broken.json", "no JSON"),
        ("list.json", "is no result of `sim run`"),
        ("old.json", "run it again"),
        ("t.parquet", "cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(runs: Path, other: str, says: str) -> None:
    done = CliRunner().invoke(app, ["compare", str(runs / "a"), str(runs / other)])
    assert isinstance(done.exception, moeflow.InputError) and says in str(done.exception)
    assert "\n" not in str(done.exception)
