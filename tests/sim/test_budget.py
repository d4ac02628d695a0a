"""`--budget` and `--vram` as slots."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest
from cases import RTX4090, spec
from hypothesis import given
from hypothesis import strategies as st
from moeflow.policies.residency import Slots
from moeflow.sim.budget import parse_bytes, slots_for_budget, slots_for_memory

from moeflow.errors import InputError

MODEL = spec(layers=4, experts=10, top_k=2)
EACH = MODEL.bytes_per_expert  # 3 x 64 x 32 x 2 = 12,288


def slots(budget, scope: str = "layer", scratch: int = 2, model=MODEL) -> Slots:
    return slots_for_budget(budget, model, scope, scratch)


@pytest.mark.parametrize(
    "text, size",
    [
        ("20GiB", 20 * 2**30), ("20GB", 20 * 10**9), ("800MB", 800 * 10**6), ("512MiB", 2**29), ("7B", 7),
        ("1.5KiB", 1536), ("3TB", 3 * 10**12), ("2TiB", 2**41), (" 4 gib ", 2**32), ("1.13KB", 1130),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_bytes(text, "--ram") == size


@given(st.decimals(0, 999, places=2), st.sampled_from([("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12)]))
def test_a_decimal_size_is_exact(number, unit):
    assert parse_bytes(f"{number}{unit[0]}", "--ram") == Decimal(number) * unit[1]


@pytest.mark.parametrize("text", ["20", "GiB", "20GiBit", "-1GB", "1e3GB", "20 bananas", ""])
def test_what_is_not_a_size_is_refused_with_the_options_name(text):
    with pytest.raises(InputError, match=r"--ram .*expected a size such as"):
        parse_bytes(text, "--ram")


@pytest.mark.parametrize("budget", [0.25, "0.25", ".25", "2.5e-1"])
def test_a_fraction_is_rounded_down_in_every_layer_and_scratch_comes_on_top(budget):
    assert slots(budget) == Slots((2, 2, 2, 2), 2)


def test_a_fraction_of_a_global_pool_is_rounded_down_once():
    assert slots(0.28, "global") == Slots((11,), 2)


@pytest.mark.parametrize("hundredths", range(1, 101))
def test_no_slot_is_lost_to_binary_fractions(hundredths):
    fraction = f"{hundredths / 100}"
    assert slots(fraction, model=spec(2, 100)) == Slots((hundredths,) * 2, 2)
    assert slots(fraction, "global", model=spec(2, 50)) == Slots((hundredths,), 2)


def test_one_as_a_float_is_everything_and_as_a_whole_number_one_slot():
    assert slots(1.0) == Slots((10, 10, 10, 10), 2)
    with pytest.raises(InputError, match="1 slots is too little"):
        slots(1)


@pytest.mark.parametrize("budget", [16, "16", "16 slots", "16slots"])
def test_slots_include_scratch_and_the_remainder_goes_to_the_first_layers(budget):
    assert slots(budget) == Slots((4, 4, 3, 3), 2)
    assert slots(budget, "global") == Slots((14,), 2)


@pytest.mark.parametrize("spare, per_scope", [(0, (4, 4, 3, 3)), (EACH - 1, (4, 4, 3, 3)), (-1, (4, 3, 3, 3))])
def test_bytes_include_scratch_and_count_whole_slots(spare, per_scope):
    assert slots(f"{16 * EACH + spare}B") == Slots(per_scope, 2)


@pytest.mark.parametrize("scope, per_scope", [("layer", (10, 10, 10, 10)), ("global", (40,))])
def test_more_than_everything_is_everything(scope, per_scope):
    assert slots("1GiB", scope) == Slots(per_scope, 2)
    assert slots(1000, scope) == Slots(per_scope, 2)


@pytest.mark.parametrize(
    "budget, scope, scratch, least",
    [
        (5, "layer", 2, 6),
        (2, "global", 2, 3),
        (7, "layer", 4, 8),
        (f"{6 * EACH - 1}B", "layer", 2, 6),
        (0.09, "layer", 2, 6),
    ],
)
def test_below_scratch_plus_one_slot_per_scope_the_minimum_is_named(budget, scope, scratch, least):
    with pytest.raises(InputError, match=rf"the least is {least} slots \({least * EACH / 2**20:.1f} MiB"):
        slots(budget, scope, scratch)


@pytest.mark.parametrize("budget, scope", [(6, "layer"), (3, "global"), (f"{6 * EACH}B", "layer"), (0.1, "layer")])
def test_the_minimum_itself_is_accepted(budget, scope):
    assert min(slots(budget, scope).per_scope) == 1


@pytest.mark.parametrize("budget", ["0.0", "1.5", "2."])
def test_a_fraction_outside_zero_to_one_is_refused(budget):
    with pytest.raises(InputError, match="between 0 and 1"):
        slots(budget)


@pytest.mark.parametrize("budget", ["-3", "a quarter", "25%", "nan", ""])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(InputError, match="--budget"):
        slots(budget)


def machine(memory_bytes: int, reserve: int = 1000):
    return replace(RTX4090, device=replace(RTX4090.device, memory_bytes=memory_bytes, reserve_bytes=reserve))


def test_a_device_holds_slots_in_what_weights_workspace_and_kv_leave():
    fixed = 1000 + MODEL.dense_bytes + 50 * MODEL.kv_bytes_per_token
    hardware = machine(2**40)
    assert slots_for_memory(fixed + 16 * EACH, MODEL, hardware, "layer", 2, 50) == Slots((4, 4, 3, 3), 2)
    assert slots_for_memory(fixed + 16 * EACH - 1, MODEL, hardware, "layer", 2, 50) == Slots((4, 3, 3, 3), 2)


def test_a_device_too_small_for_the_dense_part_is_refused_with_its_parts():
    with pytest.raises(InputError, match=r"before any expert .dense weights .* workspace .* KV cache for 50 tokens"):
        slots_for_memory(1000 + MODEL.dense_bytes, MODEL, machine(2**40), "layer", 2, 50)
