"""Published figures, and how far a prediction is from one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("published.yaml")
KEYS = {"title", "source", "date", "model", "hardware", "settings", "unit", "rests_on", "figures"}


@dataclass(frozen=True)
class Figure:
    """`low` and `high` are the published value with its rounding left out; `half` is half of its last digit."""

    name: str
    what: str
    low: float
    high: float
    half: float
    unit: str
    hit: float | None = None  # the hit rate published with it
    ratio: tuple[str, str] | None = None  # figures that it is the quotient of

    def error(self, predicted: float) -> float:
        """Signed, as a share of the published value; of a range's nearer end, 0 within it."""
        near = min(max(predicted, self.low), self.high)
        return predicted / near - 1

    def inside(self, interval: tuple[float, float]) -> bool:
        """Does the interval reach the published value, which its author rounded?"""
        return interval[0] <= self.high + self.half and self.low - self.half <= interval[1]

    def same_side(self, predicted: float) -> bool:
        """Of a ratio: both say gain, or both say loss."""
        return (predicted > 1) == (self.low > 1) == (self.high > 1)

    def __str__(self) -> str:
        shown = [f"{value:.2f}" if self.ratio else f"{value:g}" for value in (self.low, self.high)]
        return shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]}"


@dataclass(frozen=True)
class Anchor:
    """One source: what was measured, on what, and what it does not say."""

    name: str
    facts: dict[str, Any]
    figures: dict[str, Figure]


def load_anchors(path: Path = FILE) -> dict[str, Anchor]:
    """The anchors of `published.yaml`. Raises ValueError naming what is missing or out of place."""
    documents = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: _anchor(name, values) for name, values in documents.items()}


def _anchor(name: str, values: dict[str, Any]) -> Anchor:
    if missing := KEYS - values.keys():
        raise ValueError(f"{name}: {', '.join(sorted(missing))} missing")
    if not str(values["source"]).startswith("https://"):
        raise ValueError(f"{name}: source {values['source']!r} is no address")
    if not isinstance(values["date"], date):
        raise ValueError(f"{name}: date {values['date']!r} is no date")
    figures: dict[str, Figure] = {}
    for key, entry in values["figures"].items():
        figures[key] = _figure(f"{name}.{key}", key, {"unit": values["unit"], **entry}, figures)
    return Anchor(name, {key: value for key, value in values.items() if key != "figures"}, figures)


def _figure(where: str, name: str, entry: dict[str, Any], before: dict[str, Figure]) -> Figure:
    if "ratio" in entry:
        above, below = (before[part] for part in entry["ratio"])
        low, high = above.low / below.high, above.high / below.low
        return Figure(name, entry["what"], low, high, 0.005, "x", ratio=(above.name, below.name))
    low, high = (entry.get(key, entry.get("value")) for key in ("low", "high"))
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)) or not 0 < low <= high:
        raise ValueError(f"{where}: give a value, or low and high")
    return Figure(name, entry["what"], low, high, _half_digit(low), entry["unit"], entry.get("hit"))


def _half_digit(value: float) -> float:
    return 0.5 * 10.0 ** -len(f"{value:g}".partition(".")[2])
