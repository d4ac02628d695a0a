"""Waves by hand: an experts block takes 100 plus 10 per expert, in one launch of issue 10 and latency 5."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from moeflow.sim.cost import Block
from moeflow.sim.device import Device
from moeflow.sim.link import CopyEngine
from moeflow.sim.waves import Arrival, Wave, Waves, choose


def cost(fixed: int = 100, each: int = 10, issue: int = 10) -> SimpleNamespace:
    experts = lambda distinct, tokens: Block(1, fixed + each * distinct)  # noqa: E731
    return SimpleNamespace(issue_ps=issue, launch_latency_ps=5, experts=experts)


HITS = Wave(0, 3, 4)
SOON, LATER = Arrival(50, 2, 7), Arrival(1000, 1, 8)


@pytest.mark.parametrize(
    "mode, waves",
    [
        ("1", [Wave(1000, 5, 7)]),
        ("2", [HITS, Wave(1000, 2, 3)]),
        ("each", [HITS, Wave(50, 1, 2), Wave(1000, 1, 1)]),
    ],
)
def test_a_named_mode_is_taken(mode, waves):
    assert choose(mode, HITS, [SOON, LATER], cost(), host=0, free=0) == waves


@pytest.mark.parametrize("mode", ["1", "2", "each", "auto"])
def test_without_arrivals_the_hits_are_one_wave_and_without_hits_there_is_none_for_them(mode):
    assert choose(mode, HITS, [], cost(), 0, 0) == [HITS]
    assert choose(mode, Wave(0, 0, 0), [], cost(), 0, 0) == []
    assert choose(mode, Wave(0, 0, 0), [SOON], cost(), 0, 0) == [Wave(50, 1, 2)]


def test_auto_waits_for_a_copy_that_is_nearly_there():
    # 1: 50 + 140 = 190. 2: hits 15-145, then 110: 255
    assert choose("auto", HITS, [SOON], cost(), 0, 0) == [Wave(50, 4, 6)]


def test_auto_computes_hits_while_a_long_copy_runs():
    # 1: 1000 + 140. 2: 1000 + 110
    assert choose("auto", HITS, [LATER], cost(), 0, 0) == [HITS, Wave(1000, 1, 1)]


def test_auto_takes_arrivals_one_by_one_where_a_launch_is_nearly_free():
    # with 0 + 100 per expert: 1: 1500, 2: 1200, each: 15-315, 315-415, 1000-1100
    assert choose("auto", HITS, [SOON, LATER], cost(0, 100), 0, 0) == [HITS, Wave(50, 1, 2), Wave(1000, 1, 1)]


def test_auto_takes_the_fewest_launches_among_plans_that_end_together():
    # a device busy until 5000 hides every arrival; expert time is the same however it is cut, launches are free
    assert choose("auto", HITS, [SOON, LATER], cost(0, 100), 0, 5000) == [Wave(1000, 5, 7)]


def layer(scratch: int, mode: str = "auto") -> Waves:
    """A link with alpha 0 and 300 per expert in one chunk; streams have keys 0 to 3."""
    link = CopyEngine(0, 300, 1, keys=4)
    for key in range(4):
        link.plan(key)
    return Waves(cost(), Device(cost()), link, mode, scratch)


def test_a_stream_waits_for_the_scratch_slot_that_is_computed_from():
    one = layer(scratch=1)
    wait = one.compute("layer", Wave(0, 0, 0), [], [Arrival(0, 1, 0), Arrival(0, 1, 1)])
    # copy 0-300, compute 300-410, copy 410-710, compute 710-820
    assert (one.device.free, wait) == (820, 300 - 15 + 300)


def test_with_two_scratch_slots_the_next_copy_overlaps():
    two = layer(scratch=2)
    wait = two.compute("layer", Wave(0, 0, 0), [], [Arrival(0, 1, 0), Arrival(0, 1, 1), Arrival(0, 1, 2)])
    # copies 0-300, 300-600, 600-900 (slot 0 was read out at 410); computes 300-410, 600-710, 900-1010
    assert (two.device.free, wait) == (1010, 285 + 190 + 190)


def test_streams_come_after_everything_that_has_a_slot():
    one = layer(scratch=2)
    at = one.link.demand(3, 0)
    one.compute("layer", Wave(0, 1, 1), [Arrival(at, 1, 3)], [Arrival(0, 1, 0)])
    # hits 15-125, admitted 300-410, stream copied 300-600, computed 600-710
    assert one.device.free == 710
