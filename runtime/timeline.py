"""Where the time of a running model goes, as spans on the simulator's tracks (traces/timeline.py).

    with Timeline(offload).attached() as timeline:
        model.generate(...)
    chrome_trace(timeline.spans(), "title")

On an accelerator moments are marks in its own work, read once everything is over; elsewhere they are the host's clock.
Watching takes time of its own: figures come from runs that are not watched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..traces.timeline import Span
from .offload import Offload

Moment = Any  # nanoseconds of the host's clock, or a mark of the device
PS = 1000  # picoseconds in a nanosecond


class Timeline:
    """Spans of one offloaded model: dense work, experts, predictor, copies, and experts on the host's cores.

    `experts` leaves out waits for copies, but where the host computes misses it is all of a layer from its routing on;
    those `CPU experts` have measured lengths and are drawn one after the other up to the end of their layer.
    """

    def __init__(self, offload: Offload) -> None:
        self.offload, self.backend = offload, offload.backend
        self._origin = self._now()
        self._moments: list[tuple[str, str, Moment, Moment]] = []  # track, label, begin, end
        self._ending: list[tuple[str, str, Moment, int, int]] = []  # track, label, moment, ns long, ns over before it
        self._copies: list[tuple[str, Moment, Any]] = []  # label, end, mark
        self._since: Moment = None  # dense work has gone on
        self._computing: Moment = None  # experts have been computed with, without a wait
        self._label = ""
        self._copying = ""
        self._host: list[tuple[int, int]] = []  # expert, nanoseconds

    @contextmanager
    def attached(self) -> Iterator[Timeline]:
        """Watch the model until the block ends."""
        live, transfers, model = self.offload.live, self.offload.transfers, self.offload.model
        handles = [model.register_forward_pre_hook(self._pass_begins), model.register_forward_hook(self._pass_ends)]
        watched: list[tuple[Any, str, Callable[..., Any]]] = [
            (live, "compute", self._compute),
            (transfers, "wait", self._wait),
            (transfers, "_send_chunk", self._chunk),
            (transfers, "part", self._part),
            (self.backend, "copy", self._copy),
            (live.residency, "computed", self._computed),
        ]
        if live.gates is not None:
            watched.append((live.gates, "ahead", self._ahead))
        for owner, name, around in watched:
            owner.__dict__[name] = _around(getattr(owner, name), around)
        try:
            yield self
        finally:
            for owner, name, _ in watched:
                del owner.__dict__[name]
            for handle in handles:
                handle.remove()

    def spans(self) -> list[Span]:
        """Everything seen so far, in picoseconds from the beginning."""
        found = [(self._at(begin), self._at(end), track, label) for track, label, begin, end in self._moments]
        for track, label, moment, ns, before in self._ending:
            end = self._at(moment) - before * PS
            found.append((end - ns * PS, end, track, label))
        for label, moment, mark in self._copies:
            end = self._at(moment)
            found.append((end - self.backend.nanoseconds(mark) * PS, end, "copy H2D", label))
        return [span for span in found if span[1] > span[0]]

    def _now(self) -> Moment:
        return self.backend.mark() if self.backend.asynchronous else time.perf_counter_ns()

    def _at(self, moment: Moment) -> int:
        if not self.backend.asynchronous:
            return int(moment - self._origin) * PS
        self.backend.join(moment)
        return self.backend.between(self._origin, moment) * PS

    def _pass_begins(self, *_: Any) -> None:
        self._since = self._now()

    def _pass_ends(self, *_: Any) -> None:
        self._moments.append(("dense", "LM head", self._since, self._now()))

    def _compute(
        self, compute: Callable[..., Any], layer: int, module: Any, implementation: Callable[..., Any], *rest: Any
    ) -> Any:
        routed, seen, self._label = self._now(), len(self._moments), f"layer {layer}"
        self._moments.append(("dense", self._label, self._since, routed))

        def timed(*given: Any) -> Any:
            self._computing = self._now()
            made = implementation(*given)
            self._moments.append(("experts", self._label, self._computing, self._now()))
            self._computing = None
            return made

        made = compute(layer, module, timed, *rest)
        self._since = self._now()
        if not any(track == "experts" for track, *_ in self._moments[seen:]):
            self._moments.append(("experts", self._label, routed, self._since))
        later = 0
        while self._host:
            expert, ns = self._host.pop()
            self._ending.append(("CPU experts", f"{self._label} expert {expert}", self._since, ns, later))
            later += ns
        return made

    def _wait(self, wait: Callable[..., Any], *given: Any) -> None:
        computing = self._computing is not None
        if computing:
            self._moments.append(("experts", self._label, self._computing, self._now()))
        wait(*given)
        if computing:
            self._computing = self._now()

    def _chunk(self, send: Callable[..., Any], copy: Any) -> Any:
        self._copying = f"{copy.kind} {copy.key}"
        return send(copy)

    def _part(self, part: Callable[..., Any], key: int, slot: int, wanted: Any, kind: str, layer: int) -> None:
        self._copying = f"{kind} {key}"
        self._wait(part, key, slot, wanted, kind, layer)

    def _copy(self, copy: Callable[..., Any], *given: Any) -> Any:
        mark = copy(*given)
        end = mark if self.backend.asynchronous else time.perf_counter_ns()
        self._copies.append((self._copying, end, mark))
        return mark

    def _computed(self, computed: Callable[..., Any], layer: int, expert: int, size: int, ns: int) -> None:
        self._host.append((expert, ns))
        computed(layer, expert, size, ns)

    def _ahead(self, ahead: Callable[..., Any], source: int, *given: Any) -> Any:
        began = self._now()
        said = ahead(source, *given)
        self._moments.append(("predictor", f"after layer {source}", began, self._now()))
        return said


def _around(inner: Callable[..., Any], outer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: outer(inner, *given)
