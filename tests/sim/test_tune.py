"""`sim tune`: what it draws, how it goes on, and that what it writes does what it says."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from cases import spec
from moeflow.policies.policy import Policy
from moeflow.sim.cli import app
from moeflow.sim.search_space import EXACTNESS, Space, allowed_classes
from moeflow.sim.study import complete, ended, open_study
from moeflow.sim.tune import halves
from moeflow.traces.trace import Request, Trace, TraceMeta
from moeflow.traces.writer import write_trace
from typer.testing import CliRunner

import moeflow

optuna = pytest.importorskip("optuna", reason="the extra `search` is not installed: no optuna")


def many_requests(requests: int = 6, decode: int = 4, lookahead: bool = False) -> Trace:
    """Skewed random routing, a four-token prompt and decode rows each, one request after the other."""
    model, rng = spec(layers=2, experts=8, top_k=2), np.random.default_rng(0)
    rows = requests * (4 + decode)
    own = np.arange(rows) % (4 + decode)
    preferred = rng.normal(size=(2, 8)) * 2
    ids = np.argsort(rng.gumbel(size=(rows, 2, 8)) + preferred)[:, :, :-3:-1].astype(np.uint8)
    step = np.arange(rows) // (4 + decode) * (1 + decode) + np.maximum(0, own - 3)
    return Trace(
        TraceMeta(model, tuple(Request(i) for i in range(requests)), lookahead_distances=(1,) if lookahead else ()),
        step.astype(np.int32),
        (np.arange(rows) // (4 + decode)).astype(np.int32),
        own.astype(np.int32),
        np.full(rows, -1, np.int32),
        (own > 3).astype(np.int8),
        np.zeros(rows, np.int16),
        np.zeros(rows, np.uint8),
        ids,
        weights=np.full((rows, 2, 2), 0.5, np.float16),
        lookahead=np.repeat(np.concatenate((ids[:, :1], ids[:, 1:], ids[:, 1:]), 1)[:, :, None], 1, 2)
        if lookahead
        else None,
    )


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "six.parquet"
    write_trace(path, many_requests())
    return path


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from moeflow.sim.cli import main; main()", *map(str, words)]


# --- the space


@pytest.mark.parametrize(("allow", "lookahead"), [(None, True), ("numeric", True), ("numeric,lossy", False)])
def test_what_is_drawn_can_run_on_this_trace_and_is_what_was_allowed(allow: str | None, lookahead: bool) -> None:
    trace, allowed = many_requests(lookahead=lookahead), allowed_classes(allow)
    space = Space(trace, allowed, (1, 8), "statistics.safetensors")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    policies = []
    for _ in range(80):
        try:
            policies.append(Policy.from_document(space.document(study.ask())))
        except moeflow.InputError as error:
            assert "must lie" in str(error) or "expected 0 <=" in str(error), error  # a parameter past its end
    assert len(policies) > 60
    for policy in policies:
        assert not policy.oracle and set(policy.needs) <= set(trace.columns)
        assert policy.miss_service().exactness in allowed
    assert {policy.miss_service().exactness for policy in policies} == set(allowed)
    kinds = {policy.document["prefetch"]["kind"] for policy in policies}
    assert ("lookahead" in kinds) == ("predicted" in kinds) == lookahead and "oracle" not in kinds
    evictions = {policy.document["cache"]["evict"] for policy in policies}
    assert not evictions & {"belady", "static", "score-ema"} and ("plec" in evictions) == lookahead
    assert {policy.split for policy in policies} == {"uniform", "entropy", "demand", "dp"}


def test_the_untuned_default_can_be_drawn() -> None:
    space = Space(many_requests(), ("bit",), (1, 8))
    preset = Policy.load("moeflow")
    drawn = optuna.trial.FixedTrial(space.drawn(preset, 3))
    assert Policy.from_document(space.document(drawn)).document == preset.document
    assert space.budget(drawn, 2) == str(3 * 2 + 2)


def test_halves_share_no_request_and_lose_none() -> None:
    trace = many_requests(7)
    tuned, judged = halves(trace, 3)
    parts = [set(half.request.tolist()) for half in (tuned, judged)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(range(7)) and len(parts[0]) == 4
    assert halves(trace, 3)[0].content_sha256 == tuned.content_sha256
    with pytest.raises(moeflow.InputError, match="a single request"):
        halves(many_requests(1), 0)


def test_allowed_classes_always_hold_the_exact_ones() -> None:
    assert allowed_classes(None) == ("bit",)
    assert allowed_classes("lossy") == ("bit", "lossy")
    assert allowed_classes("lossy,numeric") == EXACTNESS


# --- the command


@pytest.fixture(scope="module")
def tuned(trace_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    words = ["--trace", trace_file, "--hw", "rtx4090", "--trials", 14, "--out", folder, "--allow", "numeric"]
    done = CliRunner().invoke(app, ["tune", *map(str, words)])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "front of 14 trials" in done.stdout and "* picked" in done.stdout
    return folder


def test_sim_run_gives_the_reported_figures(tuned: Path, tmp_path: Path) -> None:
    found = json.loads((tuned / "tune.json").read_text())
    words = shlex.split(found["command"])[1:]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.exception
    result, whole = json.loads((tmp_path / "result.json").read_text()), found["whole_trace"]
    assert result["tpot_s"]["mean"] == whole["time"] and result["budget_bytes"] == whole["memory"]
    assert result["hit"] == whole["hit"] and result["bounds"] == whole["bounds"]
    assert result["policy"]["document"] == found["picked"]["document"]


def test_the_winner_is_judged_on_requests_that_the_search_has_not_seen(tuned: Path, trace_file: Path) -> None:
    found = json.loads((tuned / "tune.json").read_text())
    assert not set(found["tuned_on"]) & set(found["judged_on"])
    unseen = moeflow.load_trace(trace_file).of_requests(found["judged_on"])
    policy = Policy.from_document(found["picked"]["document"])
    means = [
        np.mean(moeflow.simulate(unseen, "rtx4090", which, found["picked"]["budget"])["per_request"]["tpot_s"])
        for which in ("moeflow", policy)
    ]
    tpot = found["judged"]["figures"]["tpot_s"]
    assert tpot["mean"] == pytest.approx(means, rel=1e-12) and tpot["requests"] == len(found["judged_on"])


def test_the_front_holds_the_picked_one_and_nothing_beaten(tuned: Path) -> None:
    found = json.loads((tuned / "tune.json").read_text())
    points = [(row["time"], row["memory"]) for row in found["front"]]
    assert points == sorted(points) and all(a[1] > b[1] for a, b in pairwise(points))
    assert found["picked"] == found["front"][0]  # the least time
    study = open_study(found["search"]["study"], str(tuned / "study.log"), 2, "tpe", 0)
    assert all(any(p[0] <= trial.values[0] and p[1] <= trial.values[1] for p in points) for trial in complete(study))


def test_the_policy_file_says_on_what_it_was_tuned(tuned: Path) -> None:
    text = (tuned / "policy.yaml").read_text()
    assert text.startswith("# Tuned on 3 of 6 requests of ") and "for rtx4090 over pcie4x16" in text
    assert "sim run --hw rtx4090" in text
    assert yaml.safe_load(text) == json.loads((tuned / "tune.json").read_text())["picked"]["document"]


def test_the_same_seed_finds_the_same_and_a_finished_study_is_not_run_again(
    tuned: Path, trace_file: Path, tmp_path: Path
) -> None:
    words = ["--trace", trace_file, "--hw", "rtx4090", "--out", tmp_path, "--allow", "numeric"]
    for trials in (5, 14):  # stopped and continued in between
        done = CliRunner().invoke(app, ["tune", *map(str, words), "--trials", str(trials)])
        assert done.exit_code == 0, done.exception
    files = [(folder / "tune.json").read_text().replace(str(folder), "") for folder in (tuned, tmp_path)]
    assert files[0] == files[1]
    found = json.loads(files[0])
    other = found["front"][-1]["trial"]
    done = CliRunner().invoke(app, ["tune", *map(str, words), "--trials", "14", "--pick", str(other), "--json"])
    assert json.loads(done.stdout)["picked"]["trial"] == other
    assert json.loads(done.stdout)["search"] == found["search"]


def test_two_processes_and_a_killed_one_work_on_one_storage(trace_file: Path, tmp_path: Path) -> None:
    storage = tmp_path / "shared.db"
    words = ("tune", "--trace", trace_file, "--hw", "rtx4090", "--storage", f"sqlite:///{storage}")
    first = subprocess.Popen(
        command(*words, "--trials", 1000, "--out", tmp_path / "k"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not _trials(storage):
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = _trials(storage)
    both = [
        subprocess.Popen(
            command(*words, "--trials", before + 8, "--out", tmp_path / name), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for name in "ab"
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    found = [json.loads((tmp_path / name / "tune.json").read_text()) for name in "ab"]
    assert found[0]["search"]["study"] == found[1]["search"]["study"]
    study = open_study(found[0]["search"]["study"], f"sqlite:///{storage}", 2, "tpe", 0)
    assert before + 8 <= len(ended(study)) <= before + 9  # both may begin the last one
    drawn = [json.dumps(trial.params, sort_keys=True) for trial in ended(study)]
    assert len(set(drawn)) >= len(drawn) - 1  # no process repeats what the other draws


def _trials(storage: Path) -> int:
    if not storage.exists():
        return 0
    try:
        names = optuna.get_all_study_names(f"sqlite:///{storage}")
        return len(ended(optuna.load_study(study_name=names[0], storage=f"sqlite:///{storage}"))) if names else 0
    except Exception:  # the other process is making its tables
        return 0


def test_nsga2_and_one_objective(trace_file: Path, tmp_path: Path) -> None:
    words = ["--trace", trace_file, "--hw", "rtx4090", "--trials", 6, "--sampler", "nsga2", "--objective", "link"]
    words += ["--pick", "link", "--budget-range", "0.25,0.5", "--out", tmp_path, "--json", "--timeout", 100]
    done = CliRunner().invoke(app, ["tune", *map(str, words)])
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout)
    assert found["slots_per_layer"] == [2, 4] and found["objectives"] == ["link"] and len(found["front"]) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--objective", "time,speed"), "'speed' is not one of time, memory, link"),
        (("--objective", "time,time"), "named twice"),
        (("--allow", "fast"), "not one of numeric, lossy"),
        (("--vram", "1MB"), "before any expert"),
        (("--vram", "lots"), "expected a size"),
        (("--budget-range", "0.1"), "such as 0.1,0.5"),
        (("--budget-range", "0.5,0.25"), "swap them"),
        (("--budget-range", "0.01,0.5"), "too little"),
        (("--budget-range", "0.5,0.5", "--vram", "20GiB"), "give one of them"),
        (("--sampler", "random"), "expected tpe or nsga2"),
        (("--pick", "best"), "or the number of a trial"),
        (("--pick", "99"), "or a trial of the front"),
        (("--storage", "mysterious://x"), "cannot be opened"),
        (("--timeout", "0"), "the time was up"),
        (("--hw", "rtx409"), "rtx4090"),
        (("--trace", "missing.parquet"), "no such file"),
        (("--model", "olmoe-1b-7b"), "2 x 8, top-2"),
        (("--out", "taken"), "it is a file"),
    ],
)
def test_a_mistake_is_one_sentence(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    given = {"--hw": "rtx4090", "--trace": str(trace_file), "--trials": "1"}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    done = CliRunner().invoke(app, ["tune", *(word for pair in given.items() for word in pair)])
    assert isinstance(done.exception, moeflow.InputError) and says in str(done.exception), done.exception
    assert "\n" not in str(done.exception) and not list(tmp_path.glob("*/tune.json"))


def test_without_optuna_the_extra_is_named(trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = CliRunner().invoke(app, ["tune", "--hw", "rtx4090", "--trace", str(trace_file)])
    assert "pip install 'moeflow[search]'" in str(done.exception)
