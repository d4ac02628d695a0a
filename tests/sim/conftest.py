"""tests/sim draws its cases from the same strategies as tests/policies."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "policies"))
