"""The accelerator backend against a fake of torch's streams and events: no such device is at hand here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from calls import generate, model_of, offloaded, same
from moeflow.runtime import accelerator, cuda
from moeflow.runtime.accelerator import AcceleratorBackend
from moeflow.runtime.backend import HostBackend
from moeflow.runtime.cuda import CudaBackend
from moeflow.runtime.devices import backend_for, default_device
from moeflow.runtime.on_host import on_host, packed, unpacked

from moeflow import InputError

CPU = torch.device("cpu")


class Event:
    """Says what it was used for, to the one log of the test."""

    log: list[Any] = []  # noqa: RUF012
    made = 0

    def __init__(self, device: Any, enable_timing: bool) -> None:
        Event.made += 1
        self.name, self.at = Event.made, 0

    def record(self, stream: Any) -> None:
        self.at = len(Event.log)
        Event.log.append(("record", stream.name, self))

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Event.log.append(("join", self))

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1e3


class Stream:
    def __init__(self, device: Any = None, name: str = "copies") -> None:
        self.name = name

    def wait_event(self, event: Event) -> None:
        Event.log.append(("wait", self.name, event))

    def __enter__(self) -> Stream:
        Event.log.append(("enter", self.name))
        return self

    def __exit__(self, *ended: Any) -> None:
        Event.log.append(("exit", self.name))


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Any:
    Event.log.clear()
    current = Stream(name="compute")
    monkeypatch.setattr(accelerator.torch, "Event", Event)
    monkeypatch.setattr(accelerator.torch, "Stream", Stream)
    monkeypatch.setattr(accelerator.torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(accelerator.torch.accelerator, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    made = AcceleratorBackend(torch.device("cuda"))
    made.device = CPU  # tensors are the host's; everything else thinks it is not
    return made


class Cudart:
    registered: dict[int, int] = {}  # noqa: RUF012
    fails = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        Cudart.registered[address] = size
        return 2 if Cudart.fails else 0

    def cudaHostUnregister(self, address: int) -> int:
        del Cudart.registered[address]
        return 0


def test_a_copy_waits_for_its_slot_s_readers_on_the_copy_stream(faked: AcceleratorBackend) -> None:
    reader = faked.mark()
    to, source = torch.zeros(8, dtype=torch.uint8), torch.arange(8, dtype=torch.uint8)
    Event.log.clear()
    copied = faked.copy(to, source, [reader])
    assert [entry[:2] for entry in Event.log] == [
        ("wait", "copies"), ("enter", "copies"), ("record", "copies"), ("record", "copies"), ("exit", "copies"),
    ]  # fmt: skip
    assert Event.log[0][2] is reader
    assert torch.equal(to, source)
    Event.log.clear()
    faked.wait(copied)
    assert Event.log == [("wait", "compute", copied.ended)]
    assert faked.passed(copied)
    assert faked.nanoseconds(copied) == 1000
    faked.join(copied)
    assert Event.log[-1] == ("join", copied.ended)


def test_a_model_on_the_fake_keeps_its_bits(faked: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("qwen3_moe")
    expected = generate(model, 2, True)
    monkeypatch.setattr(faked, "host_rows", HostBackend().host_rows)
    live = offloaded(model, "lookahead", 0.5, faked)
    try:
        assert same(expected, generate(model, 2, True))
    finally:
        live.detach()


def test_cuda_locks_rows_when_they_are_full_and_unlocks_them(
    faked: AcceleratorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("qwen3_moe")
    expected = generate(model, 1, False)
    backend = CudaBackend(torch.device("cuda", 0))
    backend.device = CPU
    live = offloaded(model, "lru", 0.5, backend)
    assert sorted(Cudart.registered.values()) == [8 * live.layout.size] * 3
    assert set(Cudart.registered) == {rows.data_ptr() for rows in live.source.layers}
    assert same(expected, generate(model, 1, False))
    live.detach()
    assert not Cudart.registered
    monkeypatch.setattr(Cudart, "fails", True)
    with pytest.raises(InputError, match="cannot be pinned"):
        offloaded(model, "lru", 0.5, backend)
    Cudart.registered.clear()
    assert same(expected, generate(model, 1, False))


def test_what_was_said_comes_in_one_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    told = {
        "ids": torch.randint(-1, 500, (7, 4), generator=generator),
        "weights": torch.rand(7, 4, generator=generator).to(torch.bfloat16),
        "ahead": torch.randint(-1, 500, (7, 2, 4), generator=generator, dtype=torch.int32),
        "probs": torch.rand(7, 30, generator=generator),
    }
    words = packed(told)
    assert words.dtype == torch.int32
    found, plain = unpacked(words.numpy(), told), on_host(told)
    for name in told:
        assert found[name].dtype == plain[name].dtype
        assert np.array_equal(found[name], plain[name])


def test_which_backend_a_device_gets(faked: AcceleratorBackend) -> None:
    assert isinstance(backend_for(CPU), HostBackend)
    assert type(backend_for(torch.device("cuda"))) is CudaBackend
    assert type(backend_for(torch.device("xpu"))) is AcceleratorBackend
    with pytest.raises(InputError, match="load the model first"):
        backend_for(torch.device("meta"))
    assert default_device() == CPU
    assert cuda.CudaBackend.asynchronous
