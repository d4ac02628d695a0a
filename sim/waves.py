"""Computing a layer's experts while some are still on their way: what is complete goes first, in waves."""

from __future__ import annotations

from dataclasses import dataclass

from .cost import Block, CostModel
from .device import Device, after
from .link import CopyEngine

WAVES = ("auto", "1", "2", "each")


@dataclass(frozen=True)
class Arrival:
    """One expert that is not complete: `at` is when it is, or, before its copy is sent, when that may start."""

    at: int
    tokens: int
    key: int  # -1: a copy of few bits
    low_bit_ps: int = 0  # that takes the link so long


@dataclass(frozen=True)
class Wave:
    """One grouped launch: `ready` is when its last expert is complete."""

    ready: int
    experts: int
    tokens: int


def choose(mode: str, hits: Wave, arrivals: list[Arrival], cost: CostModel, host: int, free: int) -> list[Wave]:
    """The waves of one layer without its streams: `1` waits for all, `2` computes hits first, `each` one by one.

    `auto` takes what ends first and, among equals, what launches least: each wave is one more launch.
    """
    plans = _plans(hits, arrivals)
    if mode != "auto" or not arrivals:  # with nothing on its way all plans are one
        return plans["1" if mode == "auto" else mode]
    issue, latency = cost.issue_ps, cost.launch_latency_ps

    def end(waves: list[Wave]) -> int:
        at_host, at_device = host, free
        for wave in waves:
            block = cost.experts(wave.experts, wave.tokens)
            at_host, at_device = after(block, at_host, at_device, issue, latency, wave.ready)
        return at_device

    return min(plans.values(), key=lambda waves: (end(waves), len(waves)))


def _plans(hits: Wave, arrivals: list[Arrival]) -> dict[str, list[Wave]]:
    first = [hits] if hits.experts else []
    if not arrivals:
        return {"1": first, "2": first, "each": first}
    last, tokens = arrivals[-1].at, sum(arrival.tokens for arrival in arrivals)
    together = Wave(last, hits.experts + len(arrivals), hits.tokens + tokens)
    plans = {"1": [together]}
    plans["2"] = [*first, Wave(last, len(arrivals), tokens)]
    plans["each"] = first + [Wave(arrival.at, 1, arrival.tokens) for arrival in arrivals]
    return plans


class Waves:
    """Runs the experts of one layer on a device fed by one link, with `scratch` slots for streams."""

    def __init__(self, cost: CostModel, device: Device, link: CopyEngine, mode: str, scratch: int) -> None:
        self.cost, self.device, self.link, self.mode, self.scratch = cost, device, link, mode, scratch

    def compute(self, label: str, hits: Wave, arrivals: list[Arrival], streams: list[Arrival]) -> int:
        """Issue the whole layer; returns the exposed wait. A stream's copy starts once a scratch slot is read out."""
        wait = 0
        for wave in choose(self.mode, hits, arrivals, self.cost, self.device.host, self.device.free):
            wait += self._run(label, wave)
        done: list[int] = []
        for i, stream in enumerate(streams):
            ready = max(stream.at, done[i - self.scratch] if i >= self.scratch else 0)
            if stream.key < 0:
                at = self.link.low_bit(ready, stream.low_bit_ps)
            else:
                at = self.link.demand(stream.key, ready, streamed=True)
            wait += self._run(label, Wave(at, 1, stream.tokens))
            done.append(self.device.free)
        return wait

    def _run(self, label: str, wave: Wave) -> int:
        block: Block = self.cost.experts(wave.experts, wave.tokens)
        return self.device.run(block, "experts", label, wave.ready)
