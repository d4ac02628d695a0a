"""The copy engine by hand: alpha 10, an expert of 30 in 3 chunks of 10."""

from __future__ import annotations

from moeflow.sim.link import NEVER, CopyEngine, Traffic

A, B, C = 0, 1, 2


def engine(alpha: int = 10, copy: int = 30, chunks: int = 3) -> CopyEngine:
    link = CopyEngine(alpha, copy, chunks, keys=3)
    for key in (A, B, C):
        link.plan(key)
    return link


def test_alpha_is_paid_when_the_engine_was_idle_and_only_then():
    link = engine()
    assert link.demand(A, 100) == 140  # idle: 100 + 10 + 30
    assert link.demand(B, 105) == 170  # busy: follows at once
    assert link.demand(C, 171) == 211  # idle for one picosecond
    assert link.busy_ps == 40 + 30 + 40


def test_a_copy_that_is_ready_when_the_engine_becomes_free_pays_no_alpha():
    link = engine()
    assert link.demand(A, 100) == 140
    assert link.demand(B, 140) == 170


def test_the_first_copy_of_all_pays_alpha_even_at_time_zero():
    assert engine().demand(A, 0) == 40


def test_demand_waits_for_the_chunk_in_flight_and_for_no_more():
    link = engine()
    link.prefetch(A, 100)
    assert link.demand(B, 125) == 160  # A's chunks: 100-120 (with alpha), 120-130; B goes ahead of A's third
    assert link.complete[A] == NEVER
    link.advance(1000)
    assert link.complete[A] == 170
    assert link.traffic == Traffic(demand=3, prefetch=3)


def test_at_equal_times_demand_goes_before_prefetch():
    link = engine()
    link.prefetch(A, 100)
    assert link.demand(B, 120) == 150  # A's second chunk could start at 120 too
    assert link.traffic == Traffic(demand=3, prefetch=1)


def test_prefetches_go_first_come_first_served_even_when_the_second_is_ready_before_the_first():
    link = engine()
    link.prefetch(A, 200)
    link.prefetch(B, 100)
    link.advance(1000)
    assert (link.complete[A], link.complete[B]) == (240, 270)


def test_a_late_expert_joins_demand_with_its_unsent_chunks():
    link = engine()
    link.prefetch(A, 100)
    link.prefetch(B, 100)
    link.advance(121)  # A's first two chunks have begun: the second ends at 130
    link.settle({A}, {A})
    assert link.demand(A, 121) == 140  # its third
    assert link.demand(C, 121) == 170  # before B, which is still a prefetch
    link.advance(1000)
    assert link.complete[B] == 200
    assert link.traffic == Traffic(demand=4, prefetch=5)


def test_a_late_expert_whose_last_chunk_is_in_flight_sends_nothing_more():
    link = engine()
    link.prefetch(A, 100)
    link.advance(131)
    assert link.complete[A] == 140
    link.settle({A}, {A})
    assert link.demand(A, 131) == 140
    assert link.traffic == Traffic(prefetch=3)


def test_a_prefetch_that_was_not_needed_is_cancelled_and_what_it_sent_is_waste():
    link = engine()
    link.prefetch(A, 100)
    link.advance(121)
    link.settle({A}, {B})
    link.advance(1000)
    assert link.traffic == Traffic(prefetch=2, wasted=2)
    assert link.complete[A] == NEVER
    assert link.busy_ps == 30


def test_a_prefetch_of_another_layer_is_not_settled():
    link = engine()
    link.prefetch(A, 100)
    link.prefetch(B, 100)
    link.advance(1)
    link.settle({A}, set())
    link.advance(1000)
    assert link.complete[B] == 140
    assert link.traffic == Traffic(prefetch=3)


def test_what_was_cancelled_is_sent_to_the_end_when_it_is_needed_while_still_held():
    link = engine()
    link.prefetch(A, 100)
    link.advance(101)  # one chunk
    link.settle({A}, set())
    assert link.demand(A, 500) == 530  # alpha and two chunks


def test_what_is_planned_again_is_sent_as_a_whole():
    link = engine()
    link.demand(A, 100)
    link.plan(A)
    assert link.complete[A] == NEVER
    assert link.demand(A, 200) == 240


def test_chunks_that_do_not_divide_a_copy_add_up_to_it():
    link = engine(alpha=0, copy=100, chunks=3)
    link.prefetch(A, 0)
    link.advance(33)  # the second chunk begins at 33: not before
    assert link.traffic.prefetch == 1
    link.advance(34)
    assert link.traffic.prefetch == 2
    link.advance(1000)
    assert link.complete[A] == 100
    assert link.busy_ps == 100


def test_with_unified_memory_a_copy_takes_alpha_alone():
    assert engine(copy=0).demand(A, 100) == 110


def test_streams_are_counted_apart():
    link = engine()
    assert link.demand(A, 0, streamed=True) == 40
    assert link.traffic == Traffic(stream=3)
