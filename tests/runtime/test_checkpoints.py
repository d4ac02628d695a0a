"""Experts straight from a checkpoint: the rows that transformers would load, never the whole model in memory."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import generate, inputs, model_of, same
from fake_device import FakeDevice
from families import FAMILIES
from moeflow.policies.policy import Policy
from moeflow.runtime.backend import HostBackend
from moeflow.runtime.offload import Offload
from moeflow.runtime.reader import Reader
from test_equality import REFUSED

import moeflow
from moeflow import InputError

SERVED = sorted(FAMILIES.keys() - REFUSED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoints in several shards, by family and number format."""
    made: dict[Any, Path] = {}

    def folder(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = tmp_path_factory.mktemp(family)
            model_of(family, dtype).save_pretrained(made[family, dtype], max_shard_size="60KB")
        return made[family, dtype]

    return folder


@pytest.fixture(scope="module")
def residents(folders: Any) -> Any:
    """The models that transformers loads from those folders."""
    made: dict[Any, Any] = {}

    def resident(family: str, dtype: torch.dtype = torch.float32) -> Any:
        if (family, dtype) not in made:
            loaded = type(model_of(family)).from_pretrained(folders(family, dtype)).eval()
            made[family, dtype] = aligned(loaded)
        return made[family, dtype]

    return resident


def aligned(model: Any) -> Any:
    """Loaded weights are views of a mapped file, and at an odd address a CPU's product can differ in its last bits."""
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            parameter.data = parameter.data.clone()
    return model


@torch.inference_mode()
def run(model: Any) -> list[torch.Tensor]:
    return [model(**inputs(2, True)).logits, *generate(model, 2, True, 3)]


def meta_weights(model: Any) -> list[str]:
    return [name for name, value in model.named_parameters() if value.device.type == "meta"]


@pytest.mark.parametrize("family", SERVED)
def test_every_family_loads_without_its_experts(family: str, folders: Any, residents: Any) -> None:
    model = aligned(moeflow.offload(folders(family), "lru", 0.25))
    assert len(list(folders(family).glob("*.safetensors"))) > 1
    assert meta_weights(model) == meta_weights(model_offloaded(family))
    assert same(run(residents(family)), run(model))


def model_offloaded(family: str) -> Any:
    """Names of what is on meta do not outlive the context, so they are taken inside."""

    class Names:
        def __init__(self) -> None:
            with moeflow.offload(model_of(family), "lru", 0.25) as model:
                self.named = [(n, p.detach()) for n, p in model.named_parameters()]

        def named_parameters(self) -> Any:
            return iter(self.named)

    return Names()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
def test_half_precision_moves_as_it_is(family: str, dtype: torch.dtype, folders: Any, residents: Any) -> None:
    resident = residents(family, dtype)
    model = aligned(moeflow.offload(folders(family, dtype), "lru", 0.25))
    assert model.dtype == resident.dtype == dtype
    assert same(run(resident), run(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
@pytest.mark.parametrize("policy", ["lru", "lookahead"])
@pytest.mark.parametrize("device", [HostBackend, lambda: FakeDevice(5.0, reorder=3)])
def test_experts_on_disk(device: Any, family: str, policy: str, folders: Any, residents: Any) -> None:
    expected = run(residents(family))
    live = Offload.of_checkpoint(folders(family), Policy.load(policy), 0.25)
    row, slots = live.layout.size, live.slots.total  # slots count as host memory on a CPU
    for rows in (1, 5):
        ram, backend = f"{(slots + rows) * row}B", device()
        live = Offload.of_checkpoint(folders(family), Policy.load(policy), 0.25, ram=ram, backend=backend)
        if isinstance(backend, FakeDevice):
            backend.watch(live.transfers)
        aligned(live.model)
        assert same(expected, run(live.model))
        said = live.statistics()
        assert said["disk"]["rows_in_ram"] == rows
        assert said["disk"]["bytes_read"] > 0
        assert not said["notes"]
        live.detach()
        assert same(expected, run(live.model))


def test_reads_that_take_their_time(folders: Any, residents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads are held up at odd moments: prefetched reads come late, or demand overtakes them."""
    expected = run(residents("qwen3_moe"))
    live = Offload.of_checkpoint(folders("qwen3_moe"), Policy.load("next-gate"), 0.5, ram="150KiB")
    aligned(live.model)
    read, count = live.source.saved.read, itertools.count()

    def slow(key: int, row: torch.Tensor) -> None:
        row.fill_(255)
        time.sleep((0.003, 0, 0, 0.01, 0)[next(count) % 5])
        read(key, row)

    monkeypatch.setattr(live.source.saved, "read", slow)
    assert same(expected, run(live.model))
    assert live.statistics()["exposed_wait_s"] > 0
    live.detach()


def test_a_file_system_without_direct_reads(folders: Any, residents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refusing(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument", str(path))
        return opened(path, flags, *more)

    monkeypatch.setattr("moeflow.runtime.reader.os.open", refusing)
    with pytest.warns(UserWarning, match="refuses direct reads"):
        live = Offload.of_checkpoint(folders("qwen3_moe"), Policy.load("lru"), 0.25, ram="90KiB")
        assert same(run(residents("qwen3_moe")), run(aligned(live.model)))
    assert "page cache" in live.statistics()["notes"][0]
    live.detach()


def test_ram_for_all_experts_needs_no_disk(folders: Any) -> None:
    live = Offload.of_checkpoint(folders("qwen3_moe"), Policy.load("lru"), 0.25, ram="1GiB")
    assert "disk" not in live.statistics()


def test_float32_weights_of_a_bfloat16_model_are_converted(folders: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(folders("qwen3_moe"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    resident = aligned(type(model_of("qwen3_moe")).from_pretrained(folder))
    assert resident.dtype == torch.bfloat16
    assert same(run(resident), run(aligned(moeflow.offload(folder, "lru", 0.25))))


def changed(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    given = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**given, **config}))
    return target


@pytest.mark.parametrize(
    ("quantised", "words"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "block FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_formats_to_come_are_refused_by_name(quantised: Any, words: str, folders: Any, tmp_path: Path) -> None:
    folder = changed(folders("qwen3_moe"), tmp_path / "q", quantization_config=quantised)
    with pytest.raises(InputError, match=words):
        moeflow.offload(folder)


def test_what_is_wrong_with_a_checkpoint_is_said(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        moeflow.offload(tmp_path)
    folder = changed(folders("qwen3_moe"), tmp_path / "a")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="ends before tensor"):
        moeflow.offload(folder)
    shard.unlink()
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        moeflow.offload(folder)
    folder = changed(folders("qwen3_moe"), tmp_path / "b")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    gone = next(file for name, file in index["weight_map"].items() if ".experts." in name)
    kept = {name: file for name, file in index["weight_map"].items() if file != gone}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": kept}))
    with pytest.raises(InputError, match=r"no weights for|saved tensors for 8 experts"):
        moeflow.offload(folder)
    left = changed(folders("mixtral"), tmp_path / "c", architectures=["NoSuchModel"])
    with pytest.raises(InputError, match="NoSuchModel"):
        moeflow.offload(left)


def test_a_disk_that_fails_under_a_running_model(folders: Any, residents: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(residents("qwen3_moe"))
    live = Offload.of_checkpoint(folders("qwen3_moe"), Policy.load("lru"), 0.25, ram="90KiB", backend=HostBackend())
    aligned(live.model)
    reader, reads = live.source.saved.reader, []
    read = reader.read

    def failing(file: Path, first: int, into: torch.Tensor) -> None:
        reads.append(first)
        if len(reads) in (20, 21, 40):
            into[: len(into) // 2] = 7
            raise OSError(f"{file}: bad sector")
        read(file, first, into)

    monkeypatch.setattr(reader, "read", failing)
    failures = 0
    for _ in range(4):
        try:
            assert same(expected, run(live.model))
        except OSError as error:
            assert "bad sector" in str(error)
            failures += 1
    assert 1 <= failures <= 3
    assert same(expected, run(live.model))
    live.source.close()
    with pytest.raises(CancelledError):
        run(live.model)


@pytest.mark.parametrize("direct", [True, False])
def test_ranges_of_files(direct: bool, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8)
    (tmp_path / "f").write_bytes(data.tobytes())
    reader = Reader()
    reader.direct = reader.direct and direct
    for first, size in ((0, 1), (4095, 2), (4096, 4096), (123, 45_678), (49_999, 1), (0, 50_000)):
        into = torch.zeros(size, dtype=torch.uint8)
        reader.read(tmp_path / "f", first, into)
        assert np.array_equal(into.numpy(), data[first : first + size])
    with pytest.raises(OSError, match="ends at byte 50000, in the middle of an expert"):
        reader.read(tmp_path / "f", 49_000, torch.zeros(9_000, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError):
        reader.read(tmp_path / "g", 0, torch.zeros(1, dtype=torch.uint8))
    reader.close()


def test_ram_is_for_checkpoints() -> None:
    with pytest.raises(InputError, match="give its folder or id"):
        moeflow.offload(model_of("qwen3_moe"), ram="1GiB")
