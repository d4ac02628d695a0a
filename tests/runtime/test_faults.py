"""Whatever copies do, the output keeps its bits or an error says what happened; nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import generate, inputs, model_of, offloaded, same
from fake_device import FakeDevice
from moeflow.sim.run import simulate

from moeflow import InputError, Policy

DEVICES: dict[str, Any] = {
    "fast": lambda: FakeDevice(0.001),
    "slow": lambda: FakeDevice(50.0),
    "uneven": lambda: FakeDevice(0.5, slow=lambda n: 1 + 400 * (n % 7 == 3)),
    "reordered": lambda: FakeDevice(0.5, reorder=1),
    "reordered and slow": lambda: FakeDevice(20.0, reorder=2),
}
POLICIES = ["lru", "moeflow", "lookahead", "next-gate", "transition", "activation-matrix-prefetch", "plec"]


@torch.inference_mode()
def run(model: Any) -> list[torch.Tensor]:
    return [model(**inputs(4, True)).logits, *generate(model, 3, True, 8), *generate(model, 1, False, 8)]


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    torch.set_num_threads(1)
    return run(model_of("qwen3_moe"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("policy", POLICIES)
def test_bits_and_decisions_survive(expected: list[torch.Tensor], policy: str, device: str) -> None:
    made = DEVICES[device]()
    live = offloaded(model_of("qwen3_moe"), policy, 0.5, made, told=True)
    made.watch(live.transfers)
    try:
        assert same(expected, run(live.model))
    finally:
        live.detach()
    said = simulate(live.decisions.told.trace(), "rtx4090", Policy.load(policy), 0.5, engine="events")
    assert said["decision_log_sha256"] == live.residency.decision_log_sha256


@pytest.mark.parametrize("device", DEVICES)
def test_eviction_pressure(expected: list[torch.Tensor], device: str) -> None:
    made = DEVICES[device]()
    live = offloaded(model_of("qwen3_moe"), {"cache": {"evict": "lru", "scope": "global"}}, "3 slots", made)
    made.watch(live.transfers)
    try:
        assert same(expected, run(live.model))
    finally:
        live.detach()


def test_no_memory_for_slots_leaves_the_model_as_it_was(expected: list[torch.Tensor]) -> None:
    model = model_of("qwen3_moe")
    with pytest.raises(InputError, match="smaller budget="):
        offloaded(model, "lru", 0.5, FakeDevice(most_rows=3))
    assert same(expected, run(model))


def test_no_host_memory_halfway_leaves_the_model_as_it_was(expected: list[torch.Tensor]) -> None:
    class LittleHost(FakeDevice):
        given = 0

        def host_rows(self, count: int, size: int) -> torch.Tensor:
            self.given += 1
            if self.given == 3:
                raise InputError("no more host memory")
            return super().host_rows(count, size)

    model = model_of("qwen3_moe")
    with pytest.raises(InputError, match="no more host memory"):
        offloaded(model, "lru", 0.5, LittleHost())
    assert same(expected, run(model))


class Unreadable:
    """A row whose bytes cannot be read the first `times` times."""

    def __init__(self, times: list[int], good: Any, landed: bool) -> None:
        self.times, self.good, self.landed = times, good, landed

    def row(self) -> torch.Tensor:
        if self.times[0]:
            self.times[0] -= 1
            raise OSError("bad sector")
        return self.good.row()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.good, name)


@pytest.mark.parametrize("nth", [0, 3, 11])
@pytest.mark.parametrize("landed", [True, False])
@pytest.mark.parametrize("policy", ["lru", "lookahead"])
def test_a_read_error_is_told_and_the_next_call_is_right(
    expected: list[torch.Tensor], nth: int, landed: bool, policy: str
) -> None:
    live = offloaded(model_of("qwen3_moe"), policy, 0.5, FakeDevice())
    good, left, times = live.transfers.source, [nth], [1]

    class Faulty:
        def fetch(self, key: int, urgent: bool) -> Any:
            left[0] -= 1
            return Unreadable(times, good.fetch(key, urgent), landed) if left[0] < 0 else good.fetch(key, urgent)

    live.transfers.source = Faulty()
    try:
        try:
            found = run(live.model)
        except OSError as error:
            assert str(error) == "bad sector"
        else:  # nobody needed the expert when it was read, and later it could be read
            assert same(expected, found)
            assert live.transfers.lost_prefetches == 1
        assert not times[0]
        assert same(expected, run(live.model))
    finally:
        live.detach()
