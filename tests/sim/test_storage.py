"""The SSD reader by hand: latency 70, 1000 per expert; 2 layers of 4 experts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from moeflow.sim.storage import Reader


def reader(in_ram: int | None) -> Reader:
    return Reader(SimpleNamespace(read_alpha_ps=70, read_ps=1000), layers=2, experts=4, in_ram=in_ram)


def test_what_host_memory_holds_is_there_at_once():
    one = reader(None)
    assert one.read(5, 100) == 100
    assert one.host_has(5, 200) == 200
    assert one.reads == 0


def test_latency_is_paid_when_the_reader_was_idle():
    one = reader(0)
    assert one.read(0, 100) == 1170
    assert one.read(1, 110) == 2170  # queued behind the first
    assert one.read(2, 2170) == 3170  # just in time
    assert one.read(3, 4000) == 5070
    assert one.reads == 4


def test_the_first_read_of_all_pays_latency_at_time_zero():
    assert reader(0).read(0, 0) == 1070


def test_a_copy_asked_for_again_waits_for_the_read_under_way():
    one = reader(0)
    one.read(0, 100)
    assert one.host_has(0, 500) == 1170
    assert one.host_has(0, 2000) == 2000


@pytest.mark.parametrize("in_ram, resting", [(3, [0, 1, 4]), (4, [0, 1, 4, 5]), (8, list(range(8))), (1, [0]), (0, [])])
def test_the_same_number_of_experts_rests_in_ram_in_every_layer_lowest_ids_first(in_ram, resting):
    one = reader(in_ram)
    assert [key for key in range(8) if one.read(key, 10**6 * key) == 10**6 * key] == resting
