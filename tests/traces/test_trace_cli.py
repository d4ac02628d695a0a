"""The command `trace`: what it prints, its exit status, and how quickly it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from moeflow.traces import cli, importers
from moeflow.traces.reader import load_trace
from moeflow.traces.writer import write_trace
from test_format import LAYERS, random_trace
from typer.testing import CliRunner


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.parquet"
    write_trace(path, random_trace())
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a command that ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["trace", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_info_shows_what_the_file_holds(trace_file: Path) -> None:
    shown = run("info", trace_file)
    for expected in ("16 experts, top-4", "50 in", "CC0-1.0", "lookahead", "device", "none"):
        assert expected in shown
    facts = json.loads(run("info", trace_file, "--json"))
    trace = random_trace()
    assert facts["rows"] == 50 and facts["steps"] == len(np.unique(trace.step)) and facts["requests"] == 2
    assert facts["prefill_tokens"] == int((trace.phase == 0).sum())
    assert facts["columns"]["experts"] == {"dtype": "uint8", "shape": [LAYERS, 4], "serves": "every policy"}
    assert facts["bytes"] == trace_file.stat().st_size and facts["lookahead_distances"] == [1, 3]


def test_check_accepts_a_valid_trace(trace_file: Path) -> None:
    assert "valid, 50 rows" in run("check", trace_file)
    facts = json.loads(run("check", trace_file, "--json"))
    assert facts["valid"] and facts["content_sha256"] == random_trace().content_sha256
    assert any("absent" in note for note in facts["notes"])


def test_check_names_the_fault(
    trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_file.write_bytes(trace_file.read_bytes()[:-100])
    assert "truncated" in failing(monkeypatch, capsys, "check", trace_file)
    monkeypatch.setattr(sys, "argv", ["trace", "check", str(trace_file), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    assert facts["valid"] is False and str(trace_file) in facts["fault"]


def test_import_and_export(tmp_path: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importers, "load_model_spec", lambda name: random_trace().meta.model)
    run("export", trace_file, tmp_path / "t.npz")
    assert "50 rows" in run("import", tmp_path / "t.npz", tmp_path / "back.parquet", "--model", "test")
    np.testing.assert_array_equal(load_trace(tmp_path / "back.parquet").experts, random_trace().experts)


def test_mistakes_get_one_sentence_and_status_2(
    tmp_path: Path, trace_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.parquet"
    for command in ("info", "check"):
        assert f"{missing}: no such file" in failing(monkeypatch, capsys, command, missing)
    assert "no such file" in failing(monkeypatch, capsys, "import", missing, tmp_path / "out.parquet")
    assert "use .jsonl or .npz" in failing(monkeypatch, capsys, "export", trace_file, tmp_path / "t.csv")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"layer": 0, "experts": [1]}\n')
    assert "no model spec 'nope'" in failing(
        monkeypatch, capsys, "import", lines, tmp_path / "out.parquet", "--model", "nope"
    )
    assert "chooses 8" in failing(
        monkeypatch, capsys, "import", lines, tmp_path / "out.parquet", "--model", "olmoe-1b-7b"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "trace.parquet"]


def test_usage_errors_end_with_status_2() -> None:
    for arguments in (["info"], ["nonsense"], ["check", "file", "--colour"]):
        assert CliRunner().invoke(cli.app, arguments).exit_code == 2


def test_as_a_program_without_traceback(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "moeflow.traces.cli"]
    result = subprocess.run([*program, "check", str(tmp_path / "none")], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"error: {tmp_path / 'none'}: no such file; name a trace (Parquet) that exists\n"


def test_help_loads_nothing_heavy() -> None:
    script = "import sys; import moeflow.traces.cli as c; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "matplotlib", "pandas", "pyarrow", "numba", "scipy"} & set(loaded)
    assert "record" in CliRunner().invoke(cli.app, ["--help"]).stdout
