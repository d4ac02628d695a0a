"""The SSD reader by hand: latency 70, 1000 per expert; 2 layers of 4 experts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from moeflow.sim.storage import Reader
from moeflow.sim.tiers import NEAR, PAGEABLE, PINNED, SSD, tiers_of


def reader(in_ram: int | None) -> Reader:
    return Reader(SimpleNamespace(read_alpha_ps=70, read_ps=1000), tiers_of(2, 4, None, in_ram), low_bit_ps=300)


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


def test_an_expert_of_few_bits_is_a_shorter_read_and_not_the_whole_one():
    one = reader(0)
    assert one.read(0, 100, low_bit=True) == 470
    assert one.host_has(0, 100) == 100
    assert one.read(0, 200) == 1470
    assert (one.reads, one.low_bit_reads, one.wanted) == (1, 1, [0, 0, 2, 0])


@pytest.mark.parametrize(
    "pinned, in_ram, tiers",
    [
        (None, None, [[PINNED] * 4] * 2),
        (0, None, [[PAGEABLE] * 4] * 2),
        (3, None, [[PINNED, PINNED, PAGEABLE, PAGEABLE], [PINNED, PAGEABLE, PAGEABLE, PAGEABLE]]),
        (2, 5, [[PINNED, PAGEABLE, PAGEABLE, SSD], [PINNED, PAGEABLE, SSD, SSD]]),
        (5, 5, [[PINNED, PINNED, PINNED, SSD], [PINNED, PINNED, SSD, SSD]]),
        (8, 8, [[PINNED] * 4] * 2),
    ],
)
def test_the_lowest_ids_rest_where_copies_are_fastest(pinned, in_ram, tiers):
    assert tiers_of(2, 4, pinned, in_ram).reshape(2, 4).tolist() == tiers


def test_what_near_memory_holds_takes_no_room_in_host_memory():
    tiers = tiers_of(2, 4, pinned=2, in_ram=3, near=3).reshape(2, 4)
    assert tiers.tolist() == [[NEAR, NEAR, PINNED, SSD], [NEAR, PINNED, PAGEABLE, SSD]]
    assert (tiers_of(2, 4, near=8) == NEAR).all()
