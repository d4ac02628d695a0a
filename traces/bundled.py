"""The recording that moeflow ships: the tiny MoE of `tiny_moe/` on its own prompts."""

from __future__ import annotations

from pathlib import Path

TINY_MOE = Path(__file__).parent / "tiny_moe"  # a folder that transformers loads
BUNDLED_TRACE = Path(__file__).parent / "bundled.parquet"
PRICED_AS = "olmoe-1b-7b"  # same routing geometry; its real sizes price the bundled trace by default
