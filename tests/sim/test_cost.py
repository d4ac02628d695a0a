"""Durations of one small model on one round-numbered machine, computed by hand.

1 GB/s of device memory, 1 TFLOP/s, 2 us of device time per kernel; hidden 100, 2 heads of 50 (MHA), bfloat16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import RTX4090
from moeflow.hwprofiles.profile import NearMemory
from moeflow.sim.cost import Batch, Block, CostModel
from moeflow.sim.tiers import NEAR, PAGEABLE, PINNED, SSD
from moeflow.traces.model_spec import Attention, ModelSpec

US = 10**6  # picoseconds
NS = 10**3

MODEL = ModelSpec(
    "small", layers=2, moe_layers=(1,), experts=10, top_k=2, hidden=100, intermediate=50,
    attention=Attention("gqa", heads=2, kv_heads=2, head_dim=50), vocabulary=1000,
    shared_intermediate=20, dense_intermediate=200,
)  # fmt: skip
MACHINE = replace(
    RTX4090,
    device=replace(
        RTX4090.device, memory_bandwidth=2e9, memory_achieved=0.5, flops=2e12, flops_achieved=0.5, op_latency_s=2e-6
    ),
    link=replace(RTX4090.link, h2d=replace(RTX4090.link.h2d, alpha_s=1e-5, bandwidth=3e9, pageable_bandwidth=1.5e9)),
)
ONE = Batch(tokens=1, attended=10, cached=10, outputs=1)


def cost(dispatch: str = "eager", model: ModelSpec = MODEL, **device) -> CostModel:
    machine = replace(MACHINE, dispatch=dispatch, device=replace(MACHINE.device, **device))
    return CostModel(machine, model)


def without_kernels(block: Block, kernels: int) -> int:
    """Device time less 2 us for each kernel."""
    return block.device_ps - kernels * 2 * US


def test_one_token_is_bound_by_the_bytes_of_the_weights():
    one = cost()
    assert without_kernels(one.embed(ONE), 2) == 200 * NS  # a row of 100 values
    assert without_kernels(one.router(ONE), 5) == 2000 * NS  # 10 x 100 values
    assert without_kernels(one.gates(ONE, 3), 2) == 6000 * NS
    assert without_kernels(one.shared(ONE), 5) == 3 * 100 * 20 * 2 * NS
    assert without_kernels(one.dense(ONE), 5) == 3 * 100 * 200 * 2 * NS
    assert without_kernels(one.head(ONE), 4) == 1000 * 100 * 2 * NS
    # 4 projections of 100 x 100, and keys and values of 10 cached tokens and the new one: 11 x 2 x 100
    assert without_kernels(one.attention(ONE), 16) == (40_000 + 2_200) * 2 * NS


def test_many_tokens_are_bound_by_operations():
    many = Batch(tokens=10_000, attended=10_000, cached=1, outputs=10_000)
    one = cost(memory_bandwidth=2e12)
    assert without_kernels(one.router(many), 5) == 2 * 10_000 * 1000  # 1 ps per operation
    assert without_kernels(one.dense(many), 5) == 2 * 10_000 * 60_000
    assert without_kernels(one.head(many), 4) == 2 * 10_000 * 100_000
    # projections, and one score and one weighted value of 2 x 50 per pair
    assert without_kernels(one.attention(many), 16) == 2 * 10_000 * 40_000 + 2 * 10_000 * 200


def test_only_sampled_tokens_pass_the_head():
    many = Batch(tokens=10_000, attended=10_000, cached=1, outputs=1)
    assert cost().head(many) == cost().head(ONE)


def test_attention_over_a_prompt_is_quadratic():
    def scores(n: int) -> int:
        prompt = Batch(n, attended=n * (n + 1) // 2, cached=n, outputs=1)
        return without_kernels(cost(memory_bandwidth=2e12).attention(prompt), 16) - 2 * n * 40_000

    assert scores(2000) == 2 * 2000 * 2001 // 2 * 200
    assert scores(4000) == 2 * 4000 * 4001 // 2 * 200


def test_latent_attention_reads_the_latent_cache():
    latent = Attention("mla", 2, 2, head_dim=40, rope_head_dim=10, v_head_dim=40, kv_lora_rank=30)
    one = cost(model=replace(MODEL, attention=latent))
    weights = 100 * 2 * 50 + 100 * (30 + 10) + 30 * 2 * (40 + 40) + 2 * 40 * 100
    assert without_kernels(one.attention(ONE), 16) == (weights + 11 * 40) * 2 * NS
    many = Batch(tokens=10_000, attended=20_000, cached=1, outputs=1)
    one = cost(model=replace(MODEL, attention=latent), memory_bandwidth=2e12)
    assert without_kernels(one.attention(many), 16) == 2 * 10_000 * weights + 2 * 20_000 * 2 * (30 + 30 + 10)


@pytest.mark.parametrize(
    "distinct, assignments, device_ns",
    [
        (1, 1, 30_000),  # 3 x 100 x 50 values of 2 bytes
        (4, 4, 120_000),  # each distinct expert is read
        (1, 100, 30_000),  # 3 us of operations hide behind the read
        (4, 100, 120_000),
        (1, 10_000, 300_000),  # operations: 2 x 10,000 x 15,000
        (4, 10_000, 300_000),
    ],
)
def test_expert_kernels_read_distinct_experts_and_multiply_assignments(distinct, assignments, device_ns):
    assert without_kernels(cost().experts(distinct, assignments), 7) == device_ns * NS


def test_experts_with_two_matrices_are_smaller():
    assert without_kernels(cost(model=replace(MODEL, matrices=2)).experts(1, 1), 7) == 20_000 * NS


def test_shared_and_dense_feed_forward_have_the_matrices_that_the_memory_figures_count():
    plain = cost(model=replace(MODEL, matrices=2))
    assert without_kernels(plain.shared(ONE), 5) == 2 * 100 * 20 * 2 * NS
    assert without_kernels(plain.dense(ONE), 5) == 2 * 100 * 200 * 2 * NS


def test_quantised_experts_are_read_and_copied_in_their_own_format():
    one = cost(model=replace(MODEL, expert_dtype="mxfp4"))
    assert without_kernels(one.experts(1, 1), 7) == 7_969 * NS  # 15,000 x 4.25 bits
    assert one.copy_ps == round(7_969 / 3e9 * 1e12)


def test_head_and_kv_cache_stay_at_16_bits_in_an_8_bit_model():
    """As `ModelSpec.head_bytes` and `kv_bytes_per_token` say."""
    one = cost(model=replace(MODEL, dtype="float8"))
    assert without_kernels(one.head(ONE), 4) == 1000 * 100 * 2 * NS
    assert without_kernels(one.attention(ONE), 16) == (40_000 * 1 + 2_200 * 2) * NS


def test_a_graph_is_one_launch_and_eager_dispatch_one_per_kernel():
    assert cost("eager").experts(1, 1).launches == 7
    assert cost("graph").experts(1, 1).launches == 1
    assert cost("graph").experts(1, 1).device_ps == cost("eager").experts(1, 1).device_ps
    assert cost("eager").issue_ps == round(MACHINE.host.issue_s * 1e12)
    machine = replace(MACHINE, host=replace(MACHINE.host, issue_s=1e-6, graph_issue_s=9e-6))
    assert CostModel(machine, MODEL).issue_ps == 1 * US
    assert CostModel(replace(machine, dispatch="graph"), MODEL).issue_ps == 9 * US


def test_a_copy_is_its_bytes_over_the_rate_of_its_kind_of_memory():
    assert CostModel(MACHINE, MODEL).copy_ps == 10 * US  # 30,000 B at 3 GB/s
    assert [cost().copy_from(tier) for tier in (PINNED, PAGEABLE, SSD)] == [10 * US, 20 * US, 10 * US]
    assert CostModel(MACHINE, MODEL).copy_alpha_ps == 10 * US
    assert [cost(unified_memory=True).copy_from(tier) for tier in (PINNED, PAGEABLE, SSD)] == [0, 0, 0]


def test_a_rate_that_the_link_lacks_is_an_error():
    link = replace(MACHINE.link, h2d=replace(MACHINE.link.h2d, pageable_bandwidth=None))
    with pytest.raises(ValueError, match="pageable"):
        CostModel(replace(MACHINE, link=link), MODEL).copy_from(PAGEABLE)


@pytest.mark.parametrize(
    "queue_depth, read_ps",
    [
        (100, round(32768 / 7e9 * 1e12)),  # 8 blocks of 4096 at the full rate
        (1, 8 * 100 * US),  # one block per latency
        (10, 80 * US),
    ],
)
def test_an_ssd_reads_whole_blocks_at_the_rate_its_queue_allows(queue_depth, read_ps):
    storage = replace(
        MACHINE.storage, read_bandwidth=7e9, latency_s=1e-4 if queue_depth < 100 else 1e-6, block_bytes=4096,
        queue_depth=queue_depth,
    )  # fmt: skip
    assert CostModel(replace(MACHINE, storage=storage), MODEL).read_ps == read_ps


def test_a_copy_is_no_faster_than_host_memory():
    slow = replace(MACHINE, host=replace(MACHINE.host, memory_bandwidth=1e9))
    assert CostModel(slow, MODEL).copy_ps == 30 * US


def test_copies_take_from_the_host_s_cores_what_they_pass_through_its_memory():
    """10 GB/s of host memory: a pinned copy reads at 3, a pageable one thrice at 1.5, the SSD twice at 2."""
    host = replace(MACHINE.host, memory_bandwidth=10e9, cpu_flops=1e18)
    storage = replace(MACHINE.storage, read_bandwidth=2e9, latency_s=1e-9, block_bytes=1000, queue_depth=10**6)
    one = CostModel(replace(MACHINE, host=host, storage=storage), MODEL)
    assert one.host_expert(1) == 3 * US  # 30,000 bytes
    for tiers, left in (([PINNED], 7e9), ([PAGEABLE], 5.5e9), ([SSD], 6e9), ([PINNED, PAGEABLE, SSD], 5.5e9)):
        assert one.host_expert(1, [tiers]) == round(30_000 / left * 1e12)
    slow = CostModel(replace(MACHINE, host=replace(host, memory_bandwidth=3e9), storage=storage), MODEL)
    assert slow.host_expert(1, [[PINNED]]) == 100 * US, "a tenth is left"
    assert one.host_expert(1, [[PINNED], [PINNED, PAGEABLE]]) == round(30_000 / 2.5e9 * 1e12), "each link takes its own"


def test_an_expert_of_few_bits_is_copied_and_read_as_such():
    one = cost()
    assert one.low_bit_bytes(4) == 7_500
    assert [one.low_bit_copy(4, tier) for tier in (PINNED, PAGEABLE, SSD)] == [10 * US // 4, 20 * US // 4, 10 * US // 4]
    storage = replace(MACHINE.storage, read_bandwidth=1e9, latency_s=1e-9, block_bytes=4000, queue_depth=10**6)
    assert CostModel(replace(MACHINE, storage=storage), MODEL).low_bit_read(4) == 8 * US  # two blocks
    assert cost(model=replace(MODEL, expert_dtype="mxfp4")).low_bit_bytes(8) <= 7_969, "never more than the whole"


def test_a_miss_costs_at_least_a_copy_from_the_fastest_tier_of_the_run():
    one = cost()
    assert one.least_service_ps(False, [PAGEABLE]) == 20 * US
    assert one.least_service_ps(False, [PINNED, PAGEABLE]) == 10 * US


def near(**numbers) -> CostModel:
    """A unit that reads 30 GB/s inside and computes 10 GFLOP/s; link out 4 GB/s with 10 us, in 3 GB/s with 10 us."""
    unit = {
        "internal_bandwidth": 30e9, "flops": 10e9, "capacity_bytes": 10**9, "alpha_s": 5e-6, "write_bandwidth": 1e9,
        "read_bandwidth": 5e9,
    } | numbers  # fmt: skip
    link = replace(MACHINE.link, d2h=replace(MACHINE.link.d2h, alpha_s=1e-5, bandwidth=4e9))
    return CostModel(replace(MACHINE, link=link, near_memory=NearMemory("unit", False, **unit)), MODEL)


def test_near_memory_reads_an_expert_once_and_then_pays_for_every_token():
    assert near(flops=1e15).near_expert(1) == 1 * US  # 30,000 bytes
    assert [near().near_expert(tokens) // US for tokens in (1, 2, 10)] == [3, 6, 30]  # 30,000 operations a token


def test_activations_cross_the_narrower_of_link_and_unit_with_the_latency_of_both():
    there, back = near().near_activations(Batch(20, 0, 0, 0))  # 20 x 100 values of 2 bytes
    assert (there, back) == (15 * US + 4 * US, 10 * US + round(4000 / 3e9 * 1e12))
    machine = replace(MACHINE, device=replace(MACHINE.device, unified_memory=True), near_memory=near()._unit())
    assert CostModel(machine, MODEL).near_activations(Batch(20, 0, 0, 0)) == (5 * US + 4 * US, 800 * NS)


def test_an_expert_of_near_memory_is_fetched_through_its_interface():
    assert near().copy_from(NEAR) == 10 * US  # the link is narrower
    assert near(read_bandwidth=1e9).copy_from(NEAR) == 30 * US
    with pytest.raises(ValueError, match="near-memory unit"):
        cost().copy_from(NEAR)


def test_the_host_s_cores_read_near_memory_through_its_interface_and_copies_from_it_leave_them_their_own():
    one = near(read_bandwidth=1e9)
    assert one.host_expert(1, tier=NEAR) == 30 * US
    assert one.host_expert(1, [[NEAR]]) == one.host_expert(1)


def test_link_and_near_memory_together_take_at_least_their_rates_added():
    one = near(flops=1e15)  # 10 us a copy, 1 us near
    assert one.least_service_ps(False, [NEAR], near=True) == 10 * US * US // (11 * US)
    assert one.least_service_ps(False, [PINNED], near=True) == 10 * US, "nothing lies there"


def test_prices_are_the_durations_in_nanoseconds():
    told = near().prices(np.array([NEAR, PINNED, PAGEABLE, SSD] + [PINNED] * 6, np.int8))
    assert told.copy[0, :3].tolist() == [10_000, 10_000, 20_000]
    assert told.near.tolist() == [[True] + [False] * 9]
    assert (told.first_copy, told.expert, told.token) == (10_000, 1_000, 3_000)
    assert told.exchange == 25_000 + 2_000  # two latencies and the kernel that adds
    assert told.exchange_token == 200 + 67 + 600  # in, out, and added on the device
