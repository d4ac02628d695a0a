"""What every test may use."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # pytest-xdist keeps every core busy; torch's threads would get in its way

# numba keeps machine code by the file of the compiled function and does not see changes of what it calls elsewhere: the
# tests keep theirs by all sources. Before anything imports numba, and for processes that tests start.
ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("policies", "sim") for path in (ROOT / folder).glob("*.py"))
SOURCES_HASH = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16]
os.environ["NUMBA_CACHE_DIR"] = str(ROOT / ".numba_cache" / SOURCES_HASH)

# The same examples on every run, and no failure because a machine was slow.
settings.register_profile("moeflow", derandomize=True, deadline=None)
settings.load_profile("moeflow")


@pytest.fixture(scope="session")
def shared_traces() -> Path:
    """The folder of recorded traces that lies next to the repository on the project's machines."""
    folder = Path(__file__).parents[2] / "shared" / "traces"
    if not folder.is_dir():
        pytest.skip(f"no recorded traces: {folder} is missing")
    return folder
