"""The transfer engine by itself, on the fake device: order, chunks, cancellation, what counts as wasted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_device import FakeDevice
from moeflow.runtime import transfers as module
from moeflow.runtime.disk_tier import DiskTier
from moeflow.runtime.transfers import Transfers

SIZE = 4096


class Rows:
    """Experts whose bytes are their key; `slow` keys have not landed until they are asked for."""

    def __init__(self, slow: set[int] | None = None) -> None:
        self.slow, self.asked = slow or set(), []
        self.log: list[tuple[str, int]] = []

    def fetch(self, key: int, urgent: bool) -> Any:
        self.asked.append((key, urgent))
        return OneRow(self, key)


class OneRow:
    def __init__(self, rows: Rows, key: int) -> None:
        self.rows, self.key = rows, key

    @property
    def landed(self) -> bool:
        return self.key not in self.rows.slow

    def row(self) -> torch.Tensor:
        return torch.full((SIZE,), self.key, dtype=torch.uint8)

    def sent(self, mark: Any) -> None:
        self.rows.log.append(("sent", self.key))

    def hurry(self) -> None:
        self.rows.log.append(("hurry", self.key))

    def drop(self) -> None:
        self.rows.log.append(("drop", self.key))


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice(1.0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1024)
    monkeypatch.setattr(module, "AHEAD", 2048)


def engine(device: FakeDevice, source: Any = None, slots: int = 4) -> Transfers:
    made = Transfers(device, source or Rows(), device.rows(slots, SIZE))
    device.watch(made)
    return made


def test_demand_goes_before_the_chunks_of_a_prefetch_that_are_not_submitted(
    device: FakeDevice, small_chunks: None
) -> None:
    made = engine(device)
    made.prefetch(7, 0)
    made.pump()
    assert made.traffic.prefetch == 2048  # as much as may be under way
    made.demand(8, 1)
    made.wait([1], 0)
    assert made.has(8, 1)
    assert not made.has(7, 0)
    assert device.now <= 2048 + SIZE + 10_000
    for _ in range(10):
        made.pump()
    device.join(made._copy[0].marks[-1])
    assert made.has(7, 0)
    assert (made.rows[0] == 7).all()
    assert (made.traffic.prefetch, made.traffic.demand, made.traffic.copies) == (SIZE, SIZE, 8)


def test_what_is_predicted_wrongly_is_cancelled_until_it_is_sent(device: FakeDevice, small_chunks: None) -> None:
    source = Rows()
    made = engine(device, source)
    for key in (8, 9, 10):
        made.prefetch(key, key - 8)
    made.pump()
    made.settle(range(8, 16), {9})
    assert made.traffic.wasted == 2048  # two chunks of expert 8 were under way; nothing of 10
    assert source.log == [("drop", 8), ("drop", 10)]
    made.demand(9, 1)
    made.wait([1], 1)
    assert (made.rows[1] == 9).all()
    made.demand(8, 0)  # needed after all: from its first byte
    made.wait([0], 1)
    assert (made.rows[0] == 8).all()


def test_a_slot_is_written_only_after_what_reads_it(device: FakeDevice) -> None:
    made = engine(device)
    made.demand(1, 0)
    made.wait([0], 0)
    made.used([0])
    made.demand(2, 0)  # the fake device refuses a copy that does not wait for the reader
    made.wait([0], 0)
    assert (made.rows[0] == 2).all()


def test_a_slot_that_changes_hands_before_anything_was_sent(device: FakeDevice, small_chunks: None) -> None:
    made = engine(device)
    made.prefetch(1, 0)
    made.pump()
    made.prefetch(2, 0)
    made.prefetch(3, 0)
    made.demand(3, 0)
    made.wait([0], 0)
    assert (made.rows[0] == 3).all()
    assert made.has(3, 0)
    assert not made.has(1, 0)


def test_prefetches_wait_for_demand_that_is_still_being_read(device: FakeDevice) -> None:
    source = Rows(slow={5})
    made = engine(device, source)
    made.demand(5, 0)
    made.prefetch(6, 1)
    made.pump()
    assert made.traffic.copies == 0
    source.slow.clear()
    made.pump()
    made.pump()
    assert (made.traffic.demand, made.traffic.prefetch) == (SIZE, SIZE)
    assert source.asked == [(5, True), (6, False)]


def test_a_prefetch_that_turns_into_demand_is_read_sooner(device: FakeDevice) -> None:
    source = Rows(slow={5})
    made = engine(device, source)
    made.prefetch(5, 0)
    made.pump()
    made.settle(range(0, 8), {5})
    made.demand(5, 0)
    assert source.log == [("hurry", 5)]
    made.wait([0], 0)
    assert (made.rows[0] == 5).all()
    assert (made.traffic.demand, made.traffic.wasted) == (SIZE, 0)


def test_waits_are_measured(device: FakeDevice) -> None:
    made = engine(device)
    made.demand(1, 0)
    made.wait([0], 3)
    made.pump()
    [(layer, ns)] = made.stalls
    assert layer == 3
    assert 0 < ns <= SIZE


class Disk:
    """Experts on disk whose bytes are their key."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read(self, key: int, row: torch.Tensor) -> None:
        self.reads.append(key)
        row.fill_(key)

    def statistics(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_of_host_memory_are_reused_only_when_they_are_sent(device: FakeDevice, rows: int) -> None:
    disk = Disk()
    tier = DiskTier(device, disk, device.host_rows(rows + 1, SIZE))
    made = engine(device, tier, slots=8)
    for turn in range(3):
        for key in range(8):
            made.demand(10 * turn + key, key)
        made.wait(list(range(8)), 0)
        made.used(list(range(8)))
        for key in range(8):
            assert (made.rows[key] == 10 * turn + key).all()
    assert sorted(disk.reads) == [10 * turn + key for turn in range(3) for key in range(8)]
    tier.close()


def test_what_is_in_host_memory_is_not_read_again(device: FakeDevice) -> None:
    disk = Disk()
    tier = DiskTier(device, disk, device.host_rows(4 + 1, SIZE))
    made = engine(device, tier)
    for keys in ((1, 2, 3, 4), (5, 1, 2, 3), (1, 2, 3, 5)):
        for slot, key in enumerate(keys):
            made.demand(key, slot)
            made.wait([slot], 0)
    made.forget()
    assert disk.reads == [1, 2, 3, 4, 5, 1, 2, 3]  # the least recently used of four goes
    assert tier.statistics() == {"rows_in_ram": 4, "found_in_ram": 4, "experts_read": 8}
    tier.close()
