"""Measured time as an input: what the clock, simulated or real, reports to a policy that asks for it.

Reports are delivered at layer boundaries and logged, so that a log's inputs reproduce its decisions (DESIGN section 3).
"""

from __future__ import annotations


class Timed:
    """Overridden by policies that set `timing_free` to False; the others are never told."""

    timing_free = True

    def copied(self, layer: int, expert: int, size: int, ns: int) -> None:
        """`size` bytes of (layer, expert) were copied in `ns` nanoseconds of link time."""

    def computed(self, layer: int, expert: int, size: int, ns: int) -> None:
        """The host computed with `size` bytes of weights in `ns` nanoseconds."""

    def stalled(self, layer: int, ns: int) -> None:
        """The device waited `ns` nanoseconds for experts of `layer`."""

    def layer_took(self, layer: int, ns: int) -> None:
        """`ns` nanoseconds from the end of the layer before to this layer's end, waiting included."""
