"""`sim sweep --executor dask://...` on a real cluster of two worker processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from moeflow.sim.cell import TraceFile
from moeflow.sim.cli import app
from moeflow.sim.executors import executor, on_cluster
from moeflow.sim.sweep import run_sweep
from moeflow.traces.writer import write_trace
from test_cli import random_trace
from test_sweep import OPTIONS, grid, in_this_process, swept
from typer.testing import CliRunner

import moeflow

distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed: no distributed")

MANY = {"policies": ("lru", "lfu", "fifo", "arc"), "budgets": ("0.1", "0.2", "0.3", "0.4")}


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as running:
        yield running


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "random.parquet"
    write_trace(path, random_trace())
    return path


def test_a_cluster_that_loses_a_worker_half_way_writes_the_same_bytes(
    cluster, trace_file: Path, tmp_path: Path
) -> None:
    lost = []

    def losing_one(cells, work):
        for cell, figures in on_cluster(cells, work, cluster.scheduler_address):
            if not lost:
                lost.append(next(iter(cluster.workers.values())).pid)
                os.kill(lost[0], signal.SIGKILL)
            yield cell, figures

    rows, failed = swept(trace_file, tmp_path / "cluster.parquet", losing_one, **MANY)
    assert lost and not failed and len(rows) == 16 and not any(row["error"] for row in rows)
    swept(trace_file, tmp_path / "local.parquet", in_this_process, **MANY)
    assert (tmp_path / "cluster.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()


def test_the_command_takes_the_scheduler_address(cluster, trace_file: Path, tmp_path: Path) -> None:
    address = cluster.scheduler_address.replace("tcp://", "dask://")
    words = ("--trace", trace_file, "--hw", "rtx4090", "--out", tmp_path / "s.parquet", "--executor", address)
    done = CliRunner().invoke(app, ["sweep", *map(str, words)])
    assert done.exit_code == 0 and "1 fastest of 1 cells" in done.stdout


def test_a_cell_that_kills_every_worker_is_reported_by_name(cluster, trace_file: Path) -> None:
    cells, _ = grid(trace_file, ("lru", "lfu"), budgets=("0.1",))
    finished = on_cluster(cells, _kill_at_lfu, cluster.scheduler_address)
    found = {cell.name: figures.get("error") for cell, figures in finished}
    assert [found["lru"], found["lfu"]] == [
        None,
        "the worker that computed it died (killed, or out of memory)",
    ]


def _kill_at_lfu(cell):
    if cell.name == "lfu":
        os._exit(9)
    return {}


def test_a_worker_that_finds_another_trace_ends_the_sweep(cluster, trace_file: Path, tmp_path: Path) -> None:
    cells, file = grid(trace_file)
    write_trace(trace_file, random_trace(seed=1))
    execute = executor(cluster.scheduler_address.replace("tcp://", "dask://"), None)
    with pytest.raises(moeflow.InputError, match=r"holds another trace .*put the same file under the same path"):
        run_sweep(cells, file, OPTIONS, tmp_path / "s.parquet", execute)
    trace_file.unlink()
    cells, _ = grid(_written(tmp_path / "b.parquet"))
    gone = TraceFile(str(tmp_path / "gone.parquet"), file.content_sha256)
    with pytest.raises(moeflow.InputError, match=r"worker on .*: .*gone.parquet: no such file"):
        run_sweep(cells, gone, OPTIONS, tmp_path / "s.parquet", execute)


def _written(path: Path) -> Path:
    write_trace(path, random_trace())
    return path


def test_no_scheduler_is_one_sentence(trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeflow.sim.executors.CONNECT_S", 0.3)
    with pytest.raises(moeflow.InputError, match=r"no scheduler with a worker answers at tcp://127.0.0.1:9 "):
        swept(trace_file, tmp_path / "s.parquet", executor("dask://127.0.0.1:9", None))


def test_without_dask_the_extra_is_named(trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(moeflow.InputError, match=r"pip install 'moeflow\[cluster\]'"):
        swept(trace_file, tmp_path / "s.parquet", executor("dask://127.0.0.1:9", None))
