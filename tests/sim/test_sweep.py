"""`sim sweep`: the grid, the file, and what happens when something is killed, full or wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from moeflow.sim.cell import COLUMNS, TraceFile, run_cell
from moeflow.sim.cli import app
from moeflow.sim.executors import on_this_machine
from moeflow.sim.grid import Axis, make_grid, parse_axis
from moeflow.sim.journal import Journal
from moeflow.sim.pareto import pareto_front
from moeflow.sim.sweep import journal_path, run_sweep
from moeflow.traces.writer import write_trace
from test_cli import random_trace
from typer.testing import CliRunner

import moeflow

OPTIONS = {"ram": None, "batch": None, "host_memory": "pinned", "model": None}


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "random.parquet"
    write_trace(path, random_trace())
    return path


def grid(trace_file: Path, policies=("lru", "lfu"), axes=(), budgets=("0.1", "0.25"), machines=("rtx4090",)):
    file, _ = TraceFile.of(trace_file)
    return make_grid(policies, axes, budgets, machines, (None,), file.content_sha256, OPTIONS), file


def in_this_process(cells, work):
    for cell in cells:
        yield cell, work(cell)


def swept(trace_file: Path, out: Path, execute=in_this_process, **others):
    cells, file = grid(trace_file, **others)
    return run_sweep(cells, file, OPTIONS, out, execute)


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from moeflow.sim.cli import main; main()", *map(str, words)]


# --- the grid


def test_rows_come_in_grid_order_and_settings_reach_only_policies_that_have_them(trace_file: Path) -> None:
    axes = (Axis("prefetch.distance", (1, 2)), Axis("cache.half_life", (4, 16)))
    cells, _ = grid(trace_file, ("lru", "lrfu", "lookahead"), axes, ("0.25",))
    assert [(cell.name, *cell.settings.values()) for cell in cells] == [
        ("lru", None, None),
        ("lrfu", None, 4),
        ("lrfu", None, 16),
        ("lookahead", 1, None),
        ("lookahead", 2, None),
    ]
    assert cells[1].policy.document["cache"]["half_life"] == 4.0
    assert cells[4].policy.document["prefetch"]["distance"] == 2


def test_another_class_takes_no_parameters_of_the_one_before(trace_file: Path) -> None:
    axes = (Axis("cache.half_life", (4,)), Axis("cache.evict", ("lru", "lrfu")))
    cells, _ = grid(trace_file, ("lrfu",), axes, ("0.25",))
    assert [list(cell.settings.values()) for cell in cells] == [[None, "lru"], [4, "lrfu"]]
    assert all(cell.policy is not None for cell in cells)


def test_a_digest_changes_with_everything_that_figures_depend_on(trace_file: Path) -> None:
    def of(policy="lru", budget="0.25", machine="rtx4090", link=None, sha="a", options=OPTIONS) -> str:
        (cell,) = make_grid((policy,), (), (budget,), (machine,), (link,), sha, options)
        return cell.digest

    other = {of(policy="lfu"), of(budget="0.5"), of(machine="h100"), of(link="pcie3x16"), of(sha="b")}
    assert len(other | {of(), of(options={**OPTIONS, "batch": 2})}) == 7 and of() == of()


def test_a_value_that_cannot_be_is_a_row_with_its_error(trace_file: Path, tmp_path: Path) -> None:
    rows, failed = swept(
        trace_file, tmp_path / "s.parquet", policies=("lrfu", "lookahead"),
        axes=(Axis("cache.half_life", (0, 4)),), budgets=("0.25", "1 slots"),
    )  # fmt: skip
    assert not failed and len(rows) == 6
    errors = [row["error"] for row in rows]
    assert "half_life must be above 0" in errors[0] and "half_life" in errors[1]
    assert errors[2] is None and "the least is 18 slots" in errors[3]
    assert "needs the column 'lookahead'" in errors[4]
    assert not journal_path(tmp_path / "s.parquet").exists()


# --- the figures and the file


def test_a_row_holds_what_simulate_says(trace_file: Path, tmp_path: Path) -> None:
    rows, _ = swept(trace_file, tmp_path / "s.parquet")
    result = moeflow.simulate(trace_file, "rtx4090", "lfu", "0.1")
    row = next(row for row in rows if (row["policy"], row["budget"]) == ("lfu", "0.1"))
    for column, (_, path) in COLUMNS.items():
        if column != "error":
            value = result.values
            for key in path:
                value = value[key]
            assert row[column] == value, column
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.to_pylist() == rows
    assert json.loads(table.schema.metadata[b"moeflow"])["format"] == 1


def test_the_file_is_the_same_for_one_and_two_processes(trace_file: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        execute = lambda cells, work, jobs=jobs: on_this_machine(cells, work, jobs)  # noqa: E731
        _, failed = swept(trace_file, tmp_path / f"{jobs}.parquet", execute, machines=("rtx4090", "h100"))
        assert not failed
    swept(trace_file, tmp_path / "0.parquet", machines=("rtx4090", "h100"))
    assert len({(tmp_path / f"{jobs}.parquet").read_bytes() for jobs in (0, 1, 2)}) == 1


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 5), (2, 3), (3, 4), (4, 1)], [0, 1, 3]),
        ([(2, 2), (1, 1), (1, 1)], [1]),
        ([(1, 2), (1, 1)], [1]),
        ([], []),
    ],
)
def test_the_front_by_hand(points, front) -> None:
    assert pareto_front(points) == front


def test_a_worker_of_another_moeflow_computes_nothing(trace_file: Path) -> None:
    cells, file = grid(trace_file)
    with pytest.raises(moeflow.InputError, match=r"and the sweep 0\.0\.0; install the same there"):
        run_cell(cells[0], replace(file, moeflow="0.0.0"), OPTIONS)


# --- interruptions


def test_a_killed_sweep_continues_and_loses_nothing_finished(trace_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    words = ("sweep", "--trace", trace_file, "--policy", "lru,lfu,fifo,arc", "--budget", "0.1,0.2,0.3,0.4,0.5")
    process = subprocess.Popen(command(*words, "--hw", "rtx4090", "--out", out, "--jobs", 2), stderr=subprocess.DEVNULL)
    _wait_for_lines(journal_path(out), process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = Journal(journal_path(out)).entries
    assert finished and not out.exists()
    computed = []

    def counting(cells, work):
        computed.extend(cell.digest for cell in cells)
        yield from in_this_process(cells, work)

    others = {"policies": ("lru", "lfu", "fifo", "arc"), "budgets": ("0.1", "0.2", "0.3", "0.4", "0.5")}
    swept(trace_file, out, counting, **others)
    assert len(computed) == 20 - len(finished) and not finished.keys() & set(computed)
    swept(trace_file, tmp_path / "whole.parquet", **others)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not journal_path(out).exists()


def test_ctrl_c_keeps_the_journal_and_exits_130(trace_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.parquet"
    words = ("sweep", "--trace", trace_file, "--policy", "lru,lfu,fifo,arc", "--budget", "0.1,0.2,0.3,0.4,0.5")
    process = subprocess.Popen(
        command(*words, "--hw", "rtx4090,h100,l4,a40", "--out", out, "--jobs", 1), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    _wait_for_lines(journal_path(out), process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the workers too
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in said and "Traceback" not in said
    assert Journal(journal_path(out)).entries and not out.exists()


def _wait_for_lines(journal: Path, process: subprocess.Popen) -> None:
    while not (journal.exists() and journal.read_bytes().count(b"\n")):
        assert process.poll() is None
        time.sleep(0.005)


def test_a_cut_off_last_line_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    journal.append("a", {"x": 0.1})
    journal.append("b", {"x": 2})
    path.write_bytes(path.read_bytes()[:-3])
    again = Journal(path)
    assert again.entries == {"a": {"x": 0.1}}
    again.append("c", 3)
    assert Journal(path).entries == {"a": {"x": 0.1}, "c": 3}
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    with pytest.raises(moeflow.InputError, match="line 1 is damaged"):
        Journal(path)


def test_a_full_disk_keeps_what_was_computed(trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, calls = tmp_path / "s.parquet", os.write, []

    def full_at_the_third(descriptor: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 3:
            real(descriptor, data[:40])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr("moeflow.sim.journal.os.write", full_at_the_third)
    with pytest.raises(moeflow.InputError, match=r"No space left on device.*kept there: free some space"):
        swept(trace_file, out)
    monkeypatch.undo()
    assert len(Journal(journal_path(out)).entries) == 2 and not out.exists()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(moeflow.InputError, match=r"No space left on device\); what was computed is kept in"):
        swept(trace_file, out)
    monkeypatch.undo()
    assert len(Journal(journal_path(out)).entries) == 4
    swept(trace_file, out, lambda cells, work: pytest.fail("nothing is left to compute"))
    assert out.exists()


DYING = """
import os
from pathlib import Path
from moeflow.policies.eviction import Eviction

class Dying(Eviction):
    def __init__(self, flag: str = "") -> None:
        super().__init__()
        self.flag = flag

    def start(self, meta, slots, future):
        super().start(meta, slots, future)
        if self.flag == "raise":
            raise ZeroDivisionError("a fault of the policy")
        if self.flag == "always" or not Path(self.flag).exists():
            Path(self.flag).touch()
            os._exit(9)

    def touch(self, routed):
        self.score[routed.layer, routed.needed] = routed.step

    def parameters(self):
        return {"flag": self.flag}
"""


def test_a_dying_worker_costs_its_own_cell_only_after_a_second_try(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dying.py").write_text(DYING)
    (tmp_path / "dying.yaml").write_text("cache: {evict: 'dying:Dying'}")
    axes = (Axis("cache.flag", ("once", "always", "raise")),)
    execute = lambda cells, work: on_this_machine(cells, work, 2)  # noqa: E731
    others = {"policies": ("dying.yaml", "lru"), "axes": axes, "budgets": ("0.25",)}
    rows, failed = swept(trace_file, tmp_path / "s.parquet", execute, **others)
    assert [row["error"] for row in rows] == [
        None,
        "the worker that computed it died (killed, or out of memory), twice",
        "ZeroDivisionError: a fault of the policy",
        None,
    ]
    assert rows[0]["decision_log_sha256"] == rows[3]["decision_log_sha256"]  # it is LRU
    assert [name.split(",")[0] for name in failed] == [
        "dying.yaml cache.flag=always", "dying.yaml cache.flag=raise"
    ]  # fmt: skip
    assert len(Journal(journal_path(tmp_path / "s.parquet")).entries) == 2  # another run tries the failed ones alone


# --- the command


@pytest.fixture(scope="module")
def printed(trace_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("command")
    words = ["sweep", "--trace", trace_file, "--policy", "lru,lrfu,belady", "--set", "cache.half_life=4,16"]
    words += ["--hw", "rtx4090,h100", "--budget", "0.1,0.25,0.001", "--out", folder / "s.parquet", "--jobs", 1]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.stdout, folder


def test_the_command_prints_the_front_and_the_next_command(printed: tuple[str, Path], tmp_path: Path) -> None:
    text, folder = printed
    assert "Pareto front" in text and "the fastest cell in detail: sim run --hw h100 --policy" in text
    assert "belady" not in text and "4 cells of oracles and lossy policies" in text
    assert "8 cells have no figures" in text
    words = text.split("in detail: sim ")[1].split()
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--json"])
    best = min(
        (row for row in pq.read_table(folder / "s.parquet").to_pylist() if row["tpot_s"] and not row["oracle"]),
        key=lambda row: row["tpot_s"],
    )
    assert json.loads((tmp_path / "result.json").read_text())["tpot_s"]["mean"] == best["tpot_s"], done.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--policy", "lruu"), "did you mean 'lru'"),
        (("--policy", "lru,lru"), "given twice"),
        (("--policy", "lru,,lfu"), "an entry is empty"),
        (("--budget", ""), "an entry is empty"),
        (("--hw", "rtx4090,rtx409"), "rtx4090"),
        (("--link", "pcie9"), "pcie9"),
        (("--distance", "1,far"), "whole numbers from 1 on"),
        (("--distance", "0"), "whole numbers from 1 on"),
        (("--distance", "1"), "no policy of this sweep has such a key"),
        (("--set", "cache.half_life"), "such as cache.half_life=4,16,64"),
        (("--set", "cash.half_life=1"), "no part 'cash'"),
        (("--set", "cache.half_lief=1"), "no policy of this sweep has such a key"),
        (("--set", "cache.half_life={a: 1}"), "no plain value"),
        (("--set", "cache.half_life=[1"), "no plain value"),
        (("--trace", "missing.parquet"), "missing.parquet"),
        (("--model", "mixtral-8x7b"), "16 x 64, top-8"),
        (("--out", "missing/s.parquet"), "the folder does not exist"),
        (("--out", "."), "it is a folder"),
        (("--executor", "slurm"), "expected local or dask://HOST:PORT"),
        (("--executor", "dask://"), "expected local or dask://HOST:PORT"),
        (("--executor", "dask://host:1", "--jobs", "2"), "leave it out"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "--hw": "rtx4090",
        "--trace": str(trace_file),
        "--policy": "lrfu",
        **dict(zip(words[::2], words[1::2], strict=True)),
    }
    done = CliRunner().invoke(app, ["sweep", *(word for pair in given.items() for word in pair)])
    assert isinstance(done.exception, moeflow.InputError) and says in str(done.exception)
    assert "\n" not in str(done.exception) and not list(tmp_path.iterdir())


def test_settings_keep_their_types() -> None:
    assert parse_axis("cache.half_life=4,0.5,x").values == (4, 0.5, "x")
    assert parse_axis("prefetch.in_flight=null,2").values == (None, 2)
