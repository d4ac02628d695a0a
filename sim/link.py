"""One copy engine: chunks that are not pre-empted, demand before prefetch, first come first served within each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .device import Span

NEVER = np.iinfo(np.int64).max


@dataclass
class Traffic:
    """Chunks that crossed the link, by why they did. Wasted ones are counted in `prefetch` too.

    `low_bit` counts whole copies of few bits instead.
    """

    demand: int = 0
    stream: int = 0
    prefetch: int = 0
    wasted: int = 0
    low_bit: int = 0


class CopyEngine:
    """Busy-until arithmetic, advanced when somebody asks: nothing happens in between that could change it.

    An expert's copy is `chunks` chunks, `copy_ps` together (or what `slower` said of it); `alpha_ps` is paid when the
    engine was idle.
    `complete[key]` is when the last chunk of a held expert lands.
    """

    def __init__(
        self, alpha_ps: int, copy_ps: int, chunks: int, keys: int, spans: list[Span] | None = None, name: str = ""
    ) -> None:
        self._alpha_ps, self._chunks = alpha_ps, chunks
        self._until_chunk = [self._marks(copy_ps)] * keys
        self._unsent = [chunks] * keys
        self._sent_ahead = [0] * keys  # chunks sent as prefetch, not yet judged
        self._waiting: deque[tuple[int, int]] = deque()  # (key, ready) of prefetches
        self._free = -1
        self._asked = 0  # the last moment that `advance` was asked for
        self.complete: NDArray[np.int64] = np.full(keys, NEVER, np.int64)
        self.busy_ps = 0
        self.traffic = Traffic()
        self.report = False  # keep what `landed_by` returns
        self._took = [0] * keys  # link time of the copy under way
        self._landed: list[tuple[int, int, int]] = []  # (end, key, link time), not yet reported
        self.spans, self._track = spans, "copy H2D" + name

    def slower(self, keys: Iterable[int], copy_ps: int) -> None:
        """Copies of `keys` take `copy_ps`: those experts rest elsewhere."""
        marks = self._marks(copy_ps)
        for key in keys:
            self._until_chunk[key] = marks

    def _marks(self, copy_ps: int) -> list[int]:
        """Time until each chunk has been sent."""
        return [copy_ps * i // self._chunks for i in range(self._chunks + 1)]

    def plan(self, key: int) -> None:
        """`key` was given a slot: all of its bytes are to come."""
        self.complete[key] = NEVER
        self._unsent[key] = self._chunks
        self._sent_ahead[key] = 0
        self._took[key] = 0

    def prefetch(self, key: int, ready: int) -> None:
        """Queue behind demand and earlier prefetches; the host holds the bytes from `ready` on."""
        self._waiting.append((key, ready))

    def advance(self, now: int) -> None:
        """Send every prefetch chunk that starts strictly before `now`: at equal times demand goes first."""
        self._asked = now
        while self._waiting:
            key, ready = self._waiting[0]
            if max(self._free, ready) >= now:
                return
            self._send(key, ready, 1, "prefetch")
            self.traffic.prefetch += 1
            self._sent_ahead[key] += 1
            if not self._unsent[key]:
                self._waiting.popleft()

    def demand(self, key: int, ready: int, streamed: bool = False) -> int:
        """Send the chunks of `key` that are missing, ahead of every prefetch; returns when it is complete."""
        self.advance(ready)
        chunks = self._unsent[key]
        if chunks:
            kind = "stream" if streamed else "demand"
            setattr(self.traffic, kind, getattr(self.traffic, kind) + chunks)
            self._send(key, ready, chunks, kind)
        return int(self.complete[key])

    def withdraw(self) -> None:
        """Prefetches that wait are taken back; what they lack comes with their layer's whole set."""
        self._waiting.clear()

    def lacks(self, key: int) -> bool:
        """Chunks of `key` have not been sent."""
        return self._unsent[key] > 0

    def low_bit(self, ready: int, copy_ps: int) -> int:
        """One copy of few bits at demand's place; returns when it is complete. Nothing holds it afterwards."""
        self.advance(ready)
        start = max(self._free, ready)
        begun = start + self._alpha_ps if start > self._free else start
        self.busy_ps += begun + copy_ps - start
        self._free = begun + copy_ps
        self.traffic.low_bit += 1
        if self.spans is not None:
            self.spans.append((start, self._free, self._track, "low-bit"))
        return self._free

    def busy_until(self, end: int) -> int:
        """Busy picoseconds of a run that ends at `end`: a prefetch under way then may last longer than the run."""
        return self.busy_ps - max(0, self._free - end)

    def landed_by(self, now: int) -> list[tuple[int, int]]:
        """(key, picoseconds of link time) of each copy complete by `now`, in order, told once."""
        done = sorted(copy for copy in self._landed if copy[0] <= now)
        self._landed = [copy for copy in self._landed if copy[0] > now]
        return [(key, took) for _, key, took in done]

    def settle(self, expected: set[int], needed: set[int]) -> None:
        """The layer that `expected` was prefetched for is routed: what has not been sent leaves the queue.

        The sent chunks of what is not `needed` are waste; the unsent ones of what is needed come back as demand.
        """
        if not expected:
            return
        kept = [copy for copy in self._waiting if copy[0] not in expected]
        if len(kept) < len(self._waiting):  # what stood behind a cancelled copy moves up now, not earlier
            self._waiting = deque((key, max(ready, self._asked)) for key, ready in kept)
        for key in expected:
            if key not in needed:
                self.traffic.wasted += self._sent_ahead[key]
            self._sent_ahead[key] = 0

    def _send(self, key: int, ready: int, chunks: int, kind: str) -> None:
        start = max(self._free, ready)
        begun = start + self._alpha_ps if start > self._free else start
        first, until = self._chunks - self._unsent[key], self._until_chunk[key]
        end = begun + until[first + chunks] - until[first]
        self._unsent[key] -= chunks
        self._free = end
        self.busy_ps += end - start
        self._took[key] += end - start
        if not self._unsent[key]:
            self.complete[key] = end
            if self.report:
                self._landed.append((end, key, self._took[key]))
        if self.spans is not None:
            self.spans.append((start, end, self._track, f"{kind} {key}"))
