"""The package as installed: names, versions, pins, and that simulation starts without the heavy libraries."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import moeflow

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
HEAVY = {"torch", "transformers", "matplotlib", "pyarrow", "numba", "scipy"}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {package: Version(pinned) for package, pinned in pairs}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_versions_agree() -> None:
    assert moeflow.__version__ == PROJECT["version"] == version("moeflow")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{moeflow.__version__}]" in changelog


@pytest.mark.parametrize(
    ("lock", "requirements"),
    [
        ("sim.txt", PROJECT["dependencies"]),
        ("test.txt", PROJECT["dependencies"] + EXTRAS["live"] + EXTRAS["test"]),
    ],
)
def test_pins_satisfy_the_declared_ranges(lock: str, requirements: list[str]) -> None:
    pinned = pins(lock)
    for requirement in map(Requirement, requirements):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert pinned[name] in requirement.specifier, f"{lock} pins {name}=={pinned[name]}, not {requirement}"


def test_the_test_pins_extend_the_simulation_pins() -> None:
    assert pins("sim.txt").items() <= pins("test.txt").items()
    assert "torch" not in pins("sim.txt")
    assert pins("test.txt")["torch"] == Version("2.13.0")


def test_licence_is_shipped() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert distribution("moeflow").metadata["License-Expression"] == "Apache-2.0"


def test_the_three_commands_are_installed() -> None:
    scripts = {script.name: script.value for script in entry_points(group="console_scripts")}
    assert {name: scripts.get(name) for name in PROJECT["scripts"]} == PROJECT["scripts"]


@pytest.mark.parametrize(
    "command", [["sim"], ["trace"], ["moeflow"], ["moeflow", "sim"], ["moeflow", "trace"], ["sim", "hw"]]
)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    module, _, main = PROJECT["scripts"][command[0]].partition(":")
    program = (
        f"import sys; from {module} import {main}; sys.argv = {[*command, '--help']!r}\n"
        f"try: {main}()\n"
        f"finally: print(*sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr)"
    )
    shown = python("-c", program)
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout.lower()
    assert shown.stderr.split() == []


def test_umbrella_command_says_its_version_and_what_is_wrong() -> None:
    assert python("-m", "moeflow", "--version").stdout == f"moeflow {moeflow.__version__}\n"
    for arguments, problem in [((), "a command is missing"), (("fly",), "no such command: fly")]:
        refused = python("-m", "moeflow", *arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith(f"error: {problem}\n")
