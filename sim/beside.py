"""What computes experts beside the device: the host's cores, or a near-memory unit."""

from __future__ import annotations

from collections.abc import Iterable

from .device import Span


class Beside:
    """One expert after the other. Picoseconds; `track` names it in the timeline."""

    def __init__(self, track: str, spans: list[Span] | None) -> None:
        self.track, self.spans = track, spans
        self._free = 0  # when it has finished what it was given

    def stop_spans(self) -> None:
        """Keep no more spans for the timeline."""
        self.spans = None

    def run(self, arrived: int, work: Iterable[tuple[int, int, str]]) -> int:
        """Activations are there at `arrived`; `work`: (when the weights are, how long, label). Returns when it ends."""
        self._free = max(self._free, arrived)
        for ready, took, label in work:
            start = max(self._free, ready)
            self._free = start + took
            if self.spans is not None:
                self.spans.append((start, self._free, self.track, label))
        return self._free
