"""A number of a profile, as calibration found it or had to take it from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .calibrate_fit import Line, Roofline
from .calibrate_timing import Timing


@dataclass(frozen=True)
class Number:
    """In SI units; `kind` as docs/hardware.md has it. `how`: what was done; of measured ones the date is added."""

    value: float
    how: str
    kind: str = "measured"
    note: str = ""
    scatter: float = 0.0  # the largest of the repetitions' spread, what a fit is off by, and alpha's share


Numbers = dict[str, Number]  # dotted path in the profile, `link.` and `storage.` before those documents' -> number


def timed(timing: Timing, what: str, per: int = 1, note: str = "") -> Number:
    """Seconds of one of `per` things that were timed together."""
    return Number(timing.seconds / per, f"{what}, {timing}", note=note, scatter=timing.spread)


def fitted(value: float, fit: Line | Roofline, timings: Iterable[Timing], what: str, note: str = "") -> Number:
    """A number from a fit over these timings."""
    timings = list(timings)
    least, spread = min(one.repetitions for one in timings), sorted(one.spread for one in timings)[len(timings) // 2]
    how = f"{what}, fit over {len(timings)} medians of at least {least} repetitions each, spread {spread:.1%} in the"
    how += f" median, fit off by {fit.off:.1%} in the median"
    return Number(value, how, note=note, scatter=max(spread, fit.off, fit.fixed if isinstance(fit, Line) else 0.0))
