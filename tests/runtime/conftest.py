"""Models come from tests/traces; logits are compared bit for bit, so float32 on the CPU has to run on one thread."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("traces", "policies", "sim")]

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _quiet_single_thread():
    """With more threads, rows of an elementwise loop are split by load, and vector and scalar code differ in bits."""
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
