"""What every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # pytest-xdist keeps every core busy; torch's threads would get in its way

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
