"""What README and docs show works as it is written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from moeflow.sim.cli import app
from moeflow.traces.writer import write_trace

import moeflow

ROOT = Path(__file__).parents[1]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_trace("mine.parquet", moeflow.load_trace(ROOT / "traces" / "bundled.parquet"))
    return tmp_path


def test_the_readme_python_example_runs(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = (block for block in blocks("README.md", "python") if "simulate" in block)
    exec(compile(example, "README.md", "exec"), {})
    tokens_per_s, hit, bound = map(float, capsys.readouterr().out.split())
    assert tokens_per_s > 0 and 0 < hit < 1 and 0 < bound <= 1 / tokens_per_s


def test_the_readme_live_example_runs() -> None:
    torch = pytest.importorskip("torch", reason="the extra `live` is not installed: no torch")
    (example,) = (block for block in blocks("README.md", "python") if "offload" in block)
    values = {"inputs": {"input_ids": torch.tensor([[1, 5, 9]])}}
    exec(compile(example.replace("path-or-hub-id", str(ROOT / "traces" / "tiny_moe")), "README.md", "exec"), values)
    assert moeflow.stats(values["model"])["exactness"] == "bit"
    values["model"].detach()


def test_the_readme_policy_is_a_valid_document(mine: Path) -> None:
    (document,) = blocks("README.md", "yaml")
    (mine / "mine.yaml").write_text(document)
    prefetch = moeflow.Policy.load("mine.yaml").document["prefetch"]
    assert (prefetch["kind"], prefetch["distance"]) == ("lookahead", 2)


def test_the_readme_commands_exist_with_the_options_shown(mine: Path) -> None:
    from typer.testing import CliRunner

    readme = (ROOT / "README.md").read_text().splitlines()
    lines = [line.split("#")[0] for line in readme if line.startswith("    sim ")]
    assert len(lines) >= 5
    for line in lines:
        _, command, *arguments = shlex.split(line)
        known = CliRunner().invoke(app, [command, "--help"]).output
        assert all(word in known for word in arguments if word.startswith("--") and command in ("run", "plan")), line


def test_the_readme_plan_is_what_the_command_prints(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moeflow.sim.cli import main

    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"<!-- plan -->\n```text\n(.*?)```", readme, re.DOTALL)
    (command,) = re.findall(r"    (sim plan .*)\n\n<!-- plan -->", readme)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", shlex.split(command))
        main()
    printed, expected = capsys.readouterr().out.split(), shown.split()
    number = r"-?\d+(\.\d+)?"
    assert [re.sub(number, "#", word) for word in printed] == [re.sub(number, "#", word) for word in expected]
    for ours, theirs in zip(printed, expected, strict=True):
        if re.fullmatch(rf"{number}%?", theirs):  # routing is drawn with floats, which differ between NumPy versions
            assert float(ours.strip("%")) == pytest.approx(float(theirs.strip("%")), rel=0.03, abs=0.1)


def test_the_policy_of_the_documentation_runs_by_its_import_path(mine: Path) -> None:
    (code,) = blocks("docs/policies.md", "python")
    (document,) = blocks("docs/policies.md", "yaml")
    (mine / "keep_late.py").write_text(code)
    (mine / "mine.yaml").write_text(document)
    policy = moeflow.Policy.load("mine.yaml")
    assert policy.document["cache"] == {
        "evict": "keep_late:KeepLate",
        "scope": "global",
        "split": "uniform",
        "stale": 0,
        "weight": 0.9,
    }
    result = moeflow.simulate("mine.parquet", "rtx4090", policy)
    assert result["policy"]["name"] == "mine" and 0 < result["hit"] < 1
    assert len(code.splitlines()) <= 30
