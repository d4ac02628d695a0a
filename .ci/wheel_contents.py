"""Is every file of the source tree in the wheel, and does every module import?

wheel_contents.py tree WHEEL                compare the wheel with the tree around this file
wheel_contents.py imports [--without-torch] import every module of the installed moeflow
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent
# What the extra `live` brings, and the only folders and modules that may need it just to be imported.
LIVE = {"torch", "transformers", "tokenizers"}
MAY_NEED_LIVE = ("moeflow.traces.", "moeflow.runtime.", "moeflow.policies.rpp_network")


def compare_with_tree(wheel: Path) -> list[str]:
    """Files that only the tree or only the wheel has."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tree = set()
    for package, folder in folders.items():
        names = subprocess.run([*listed, "--", folder], check=True, capture_output=True, text=True).stdout
        for name in names.split("\0"):
            if name and (ROOT / name).exists():
                tree.add(str(Path(package.replace(".", "/"), Path(name).relative_to(folder))))
    with ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    print(f"{wheel.name}: {len(shipped)} files, {wheel.stat().st_size / 1e6:.1f} MB")
    return [f"not in the wheel: {name}" for name in sorted(tree - shipped)] + [
        f"in the wheel, not in the tree: {name}" for name in sorted(shipped - tree)
    ]


def import_all(without_torch: bool) -> list[str]:
    """Modules that do not import; without torch those in MAY_NEED_LIVE are excused if that is why."""
    import moeflow

    problems, needing = [], []
    names = ["moeflow", *(module.name for module in walk_packages(moeflow.__path__, "moeflow."))]
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            missing = (error.name or "").partition(".")[0]
            if without_torch and missing in LIVE and name.startswith(MAY_NEED_LIVE):
                needing.append(name)
            else:
                problems.append(f"{name}: {error}")
    print(f"{len(names) - len(needing) - len(problems)} modules import from {Path(moeflow.__file__).parent}")
    if needing:
        print("need the extra live:", *needing)
    return problems


if __name__ == "__main__":
    problems = (
        compare_with_tree(Path(sys.argv[2])) if sys.argv[1] == "tree" else import_all("--without-torch" in sys.argv)
    )
    sys.exit("\n".join(problems) or None)
