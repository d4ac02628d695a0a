"""Moments of the events engine that need no oracle: one step, a free host, few things on the link.

A copy takes 1000 ns in one chunk, an SSD read 10,000 ns; kernels are short and launching costs nothing. Of the four
experts of a layer, 0 and 1 are in host memory and 2 and 3 on the SSD. Link spans name layer * 4 + expert.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from cases import RTX4090, spec, trace_of
from moeflow.policies.policy import Policy
from moeflow.policies.residency import Slots
from moeflow.sim.events import EventsEngine, Setup

NS = 1000
EMBEDDING = 0  # as a source of predictions; layer l's router input is l + 1


def setup(needed, predicted: dict[tuple[int, int], int], distance: int = 1, copy_ps: int = 1000 * NS) -> Setup:
    """Layer l needs `needed[l]` (-1: nothing), or `needed[t][l]` for token t; `predicted[source, layers ahead]`."""
    ids = np.atleast_2d(needed)
    tokens, layers = ids.shape
    model = spec(layers, 4, 1)
    lookahead = np.full((tokens, layers + 1, distance, 1), 255, np.uint8)
    for (source, ahead), expert in predicted.items():
        lookahead[:, source, ahead - 1] = expert
    trace = trace_of(model, [ids[:, :, None]])
    meta = replace(trace.meta, lookahead_distances=tuple(range(1, distance + 1)))
    trace = replace(trace, meta=meta, lookahead=lookahead)
    free = dict.fromkeys(("issue_s", "launch_latency_s", "sync_s", "sample_s", "policy_s"), 0.0)
    link, size = RTX4090.link, model.bytes_per_expert
    h2d = replace(link.h2d, alpha_s=0.0, bandwidth=size / (copy_ps * 1e-12))
    machine = replace(
        RTX4090,
        device=replace(RTX4090.device, op_latency_s=0.0),
        host=replace(RTX4090.host, memory_bandwidth=1e18, **free),
        link=replace(link, h2d=h2d, submit_s=0.0, submit_batched_s=0.0),
        storage=replace(
            RTX4090.storage, block_bytes=size, read_bandwidth=size / 1e-5, latency_s=1e-9, queue_depth=10**6
        ),
    )
    policy = Policy.from_document({"prefetch": {"kind": "lookahead", "distance": distance}})
    residency = policy.residency(trace, Slots((3,) * layers))
    return Setup(trace, model, machine, residency, chunks=1, experts_in_ram=2 * layers, timeline_steps=1)


def copies(case: Setup) -> list[tuple[str, int, int]]:
    """[(what, start, end)] on the link."""
    spans = EventsEngine(case).run().spans
    return [(what, start, end) for start, end, track, what in sorted(spans) if track == "copy H2D"]


def order(found: list[tuple[str, int, int]]) -> list[str]:
    return [what for what, _, _ in found]


def test_prefetches_use_the_link_while_demand_is_still_read_from_the_ssd():
    """Layer 0 needs 3, on the SSD, and its router input predicts 0 of layer 1, in host memory."""
    found = copies(setup([3, 0], {(1, 1): 0}))
    assert order(found) == ["prefetch 4", "demand 3"]
    assert found[0][1] < 1000 * NS
    assert found[1][1] >= 10_000 * NS


def test_what_waited_behind_a_cancelled_prefetch_does_not_start_before_the_cancellation():
    """The embedding predicts 3 of layer 0, on the SSD, and then 0 of layer 1; layer 0 needs 0 instead.

    The second prefetch waits behind the first until layer 0 is routed, and then demand goes first.
    """
    found = copies(setup([0, 0], {(EMBEDDING, 1): 3, (EMBEDDING, 2): 0}, distance=2))
    assert order(found)[0] == "demand 0"
    assert found[1][1] == found[0][2]


def test_demand_goes_in_demand_order_even_when_the_first_is_still_read_from_the_ssd():
    """Two tokens need 2, on the SSD, and one needs 0."""
    assert order(copies(setup([[2], [2], [0]], {}))) == ["demand 2", "demand 0"]


def test_a_copy_that_outlives_the_run_does_not_make_the_link_busier_than_the_run_is_long():
    """Layer 0's input predicts 1 of layer 1, which then needs nothing: that copy is in flight when the run ends."""
    measured = EventsEngine(setup([0, -1], {(1, 1): 1})).run()
    assert measured.steps["prefetch"].sum() == 1
    assert measured.link_busy_ps <= measured.steps["end_ps"][-1]


def test_a_copy_that_lands_at_the_very_moment_of_routing_is_a_hit_and_a_picosecond_later_late():
    case = {"needed": [-1, 0], "predicted": {(EMBEDDING, 2): 0}, "distance": 2}
    spans = EventsEngine(setup(**case)).run().spans
    begins = next(start for start, _, track, _ in spans if track == "copy H2D")
    routed = sorted(end for _, end, track, _ in spans if track == "predictor")[2]  # after step start and layer 0
    for copy_ps, hit in ((routed - begins, 1), (routed - begins + 1, 0)):
        steps = EventsEngine(setup(**case, copy_ps=copy_ps)).run().steps
        assert (steps["hit"].sum(), steps["late"].sum()) == (hit, 1 - hit)
