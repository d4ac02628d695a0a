"""`sim hw calibrate` on this machine's CPU in tiny sizes, the files it writes, and what it refuses."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
import yaml
from fake_box import FakeBox, FakeLink, Truth
from moeflow.hwprofiles.profile import load_document, load_documents, load_hardware
from moeflow.runtime import calibrate as calibration
from moeflow.runtime import calibrate_profile, calibrate_storage, calibrate_subject
from moeflow.runtime.calibrate_command import calibrate_command
from moeflow.runtime.calibrate_load import Others
from moeflow.runtime.calibrate_number import Number
from moeflow.runtime.calibrate_profile import Files, documents, doubtful, refuse_to_mix, write
from moeflow.runtime.calibrate_subject import Subject
from moeflow.runtime.calibrate_timing import KIB, MIB, Effort
from moeflow.runtime.devices import default_device
from moeflow.runtime.reader import Reader
from moeflow.sim.run import simulate
from typer.testing import CliRunner

from moeflow import InputError
from moeflow.errors import UnsupportedHardwareError

TINY = Effort(
    repetitions=3, fewest=3, warmups=1, limit_s=0.1, copy_bytes=(64 * KIB, 256 * KIB, MIB), buffer_bytes=8 * MIB,
    issued=8, hidden=64, intermediate=32, pool=8, distinct=(1, 4), rows=(1, 16), host_rows=(1, 16), product=64,
    file_bytes=4 * MIB, read_bytes=MIB, block_bytes=(64 * KIB, 256 * KIB), tokens=4,
)  # fmt: skip
HERE = {"device": "Some Card", "host": "Some CPU, 8 cores", "software": "torch 2.13", "date": "2026-01-31"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """Measured once, on the CPU whatever else this machine has: the machine's file, the documents, what was said."""
    out, said = tmp_path_factory.mktemp("box") / "mybox.yaml", []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a busy machine makes several threads wait for each other for milliseconds
    try:
        made = calibration.calibrate(out, "cpu", effort=TINY, say=said.append)
    finally:
        torch.set_num_threads(threads)
    return out, made, said


def fake_numbers() -> dict[str, Number]:
    """All numbers of a profile, of a box with a virtual clock as far as it has them."""
    box = FakeBox(Truth())
    numbers = calibration.link(box) | calibration.compute(box) | calibration.host(box)
    rest = {
        "device.memory_bytes": 24 << 30, "device.reserve_bytes": 1 << 30, "host.policy_s": 1e-5, "host.sample_s": 3e-4,
        "storage.read_bandwidth": 3e9, "storage.latency_s": 1e-4, "storage.block_bytes": 128 * KIB,
        "storage.queue_depth": 4,
    }  # fmt: skip
    return numbers | {path: Number(value, "made up for a test") for path, value in rest.items()}


NUMBERS = fake_numbers()


def box(folder: Path, name: str = "mybox", direct: bool = True, **here: str) -> Path:
    files = Files.beside(folder / f"{name}.yaml")
    write(documents(NUMBERS, files, HERE | here, True, False, direct, True), files)
    return files.machine


# --- on this machine


def test_what_is_written_is_a_profile_of_this_machine(written: Any) -> None:
    out, made, said = written
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "mybox-link.yaml", "mybox-storage.yaml", "mybox.yaml",
    ]  # fmt: skip
    machine = load_hardware(out)
    assert (machine.name, machine.link.name, machine.storage.name) == (
        "mybox-on-cpu", "mybox-memcpy", "mybox-storage",
    )  # fmt: skip
    assert "no accelerator" in machine.description
    assert machine.host.issue_s == machine.link.submit_s == machine.host.launch_latency_s == 0
    assert 0 < machine.device.reserve_bytes < machine.device.memory_bytes == machine.host.memory_bytes
    for path, quantity in _quantities(out):
        assert quantity["value"] > 0 or quantity["kind"] == "derived" or path.endswith("_s"), path
        if quantity["kind"] == "measured":
            assert quantity["source"].startswith(f"measured here on {made['machine']['measured_on']['date']}: "), path
    counted = [path for path, number in _quantities(out) if "repetitions" in number["source"]]
    assert len(counted) >= 15
    assert made == {kind: yaml.safe_load(path.read_text()) for kind, path in Files.beside(out).of().items()}
    assert any("link" in line for line in said) and any("disk" in line for line in said)


def test_a_document_counts_as_calibrated_unless_one_of_its_numbers_scatters(written: Any) -> None:
    _, made, said = written
    busy = any(line.startswith("other programs took") for line in said)
    for kind, document in made.items():
        doubted = [line for line in said if "not calibrated" in line and calibrate_profile.kind_of(line) == kind]
        if kind != "storage":
            assert document["calibrated"] == (not doubted and not busy)


@pytest.mark.parametrize("ram", [None, "64MiB"])
def test_the_simulator_runs_on_it(written: Any, ram: str | None) -> None:
    out, made, _ = written
    result = simulate(None, str(out), "lru", "0.25", ram=ram, model=None).values
    assert result["tokens_per_s"] > 0
    assert result["hardware"]["name"] == "mybox-on-cpu"
    kinds = ("machine", "link") if ram is None else ("machine", "link", "storage")
    assert result["calibrated"] == all(made[kind]["calibrated"] for kind in kinds)


def _quantities(out: Path) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{kind}.{path}", quantity)
        for kind, document in load_documents(load_document(str(out), "machine")).items()
        for path, quantity in document.quantities()
    ]


# --- what is calibrated, and what is not mixed


def test_an_accelerator_s_profile_is_calibrated(tmp_path: Path) -> None:
    machine = load_hardware(box(tmp_path))
    assert machine.calibrated and machine.storage.calibrated
    assert (machine.name, machine.link.name) == ("mybox", "mybox-link")
    assert machine.description == "Some Card"
    assert machine.sources["link.duplex"].startswith("measured: measured here on 2026-01-31: ")
    assert machine.link.h2d.bandwidth == pytest.approx(25e9, rel=0.03)


def test_reads_through_the_page_cache_are_not_calibrated(tmp_path: Path) -> None:
    machine = load_hardware(box(tmp_path, direct=False))
    assert machine.calibrated and not machine.storage.calibrated


def test_numbers_that_scatter_take_their_document_s_claim_away(tmp_path: Path) -> None:
    numbers = NUMBERS | {
        "link.duplex": Number(0.9, "made up for a test", scatter=0.4),
        "host.sync_s": Number(1e-6, "made up for a test", scatter=0.4),  # too little to matter
    }
    assert doubtful(numbers) == {"link.duplex": 0.4}
    made = documents(numbers, Files.beside(tmp_path / "b.yaml"), HERE, True, False, True, True)
    assert {kind: document["calibrated"] for kind, document in made.items()} == {
        "machine": True, "link": False, "storage": True,
    }  # fmt: skip


def test_a_busy_machine_is_not_calibrated(tmp_path: Path) -> None:
    made = documents(NUMBERS, Files.beside(tmp_path / "b.yaml"), HERE, True, False, True, False)
    assert not any(document["calibrated"] for document in made.values())


def test_what_others_take_is_all_that_is_taken_less_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([(0.0, 100.0, 7.0), (10.0, 100.0 + 12.0, 7.0 + 8.0)])
    monkeypatch.setattr(Others, "_now", staticmethod(lambda: next(moments)))
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert Others().share() == pytest.approx(0.1)  # 4 s of 40


def test_another_box_s_link_or_storage_is_no_calibration(tmp_path: Path) -> None:
    mine, other = box(tmp_path), box(tmp_path, "other", device="Another Card")
    third = box(tmp_path, "third", host="Another CPU")
    link, storage = str(tmp_path / "other-link.yaml"), str(tmp_path / "third-storage.yaml")
    assert load_hardware(mine).calibrated and load_hardware(other).calibrated and load_hardware(third).calibrated
    assert not load_hardware(mine, link=link).calibrated
    assert not load_hardware(mine, link="pcie4x16").calibrated
    assert not load_hardware(mine, storage=storage).storage.calibrated
    assert not load_hardware("rtx4090", link=link).calibrated
    result = simulate(None, str(mine), "lru", "0.25", link=link).values
    assert not result["calibrated"] and any(note.startswith("uncalibrated") for note in result["notes"])


def test_a_copy_of_a_measured_profile_was_measured_nowhere(tmp_path: Path) -> None:
    box(tmp_path)
    (tmp_path / "copy.yaml").write_text("kind: machine\nextends: mybox\ncalibrated: false\n")
    assert "measured_on" not in load_document(str(tmp_path / "copy.yaml")).values


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("device", "Another Card", r"another device \(Some Card, here Another Card\)"),
        ("host", "Another CPU", r"another host \(Some CPU, 8 cores, here Another CPU\)"),
    ],
)
def test_another_box_s_files_are_not_overwritten(tmp_path: Path, key: str, value: str, said: str) -> None:
    files = Files.beside(box(tmp_path))
    refuse_to_mix(files, HERE | {"software": "a newer driver", "date": "2027-01-01"})
    with pytest.raises(InputError, match=said):
        refuse_to_mix(files, HERE | {key: value})


@pytest.mark.parametrize("text", ["kind: machine\nextends: rtx4090\n", "{", "", "measured_on: 3", b"\xff\xfe"])
def test_a_file_that_no_calibration_wrote_is_not_overwritten(tmp_path: Path, text: str | bytes) -> None:
    there = tmp_path / "mybox-link.yaml"
    there.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = there.read_bytes()
    with pytest.raises(InputError, match=r"mybox-link.yaml: is there and no calibration wrote it"):
        calibration.calibrate(tmp_path / "mybox.yaml", "cpu", effort=TINY)
    assert there.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- refusals


def test_wrong_names_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    for out, device, disk, said in [
        ("mybox", None, None, "name a .yaml file"),
        ("my box.yaml", None, None, "name a .yaml file"),
        ("no/mybox.yaml", None, None, "there is no folder"),
        ("mybox.yaml", "nonsense", None, "no device of torch"),
        ("mybox.yaml", None, tmp_path / "no", "--disk .*: is no folder"),
    ]:
        with pytest.raises(InputError, match=said) as error:
            calibration.calibrate(tmp_path / out, device, disk, TINY)
        assert error.value.exit_status == 2 and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_not_here_is_unsupported_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(calibration, "default_device", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert calibration.chosen_device("cpu") == torch.device("cpu")
    assert calibration.chosen_device("xpu:1") == torch.device("xpu", 1)
    assert calibration.chosen_device(None) == torch.device("xpu")
    for name in ("xpu:2", "cuda", "meta"):
        with pytest.raises(UnsupportedHardwareError, match="no such device here") as error:
            calibration.calibrate(tmp_path / "mybox.yaml", name, effort=TINY)
        assert error.value.exit_status == 3


def test_grouped_experts_that_a_device_cannot_compute_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("grouped_mm is not implemented\nfor this device")

    fake = FakeBox(Truth())
    monkeypatch.setattr(fake, "experts", lambda distinct, rows: refuses)
    with pytest.raises(UnsupportedHardwareError, match=r"cannot compute grouped experts .*\(grouped_mm is not imp"):
        calibration.compute(fake)


def test_an_accelerator_s_kernels_are_transformers_own_grouped_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject itself, on the fake device: no accelerator is at hand here."""
    links: list[FakeLink] = []
    monkeypatch.setattr(calibrate_subject, "backend_for", lambda device: links.append(FakeLink(Truth())) or links[-1])
    monkeypatch.setattr(calibrate_subject, "bits_depend_on_place", lambda device: False)
    seen: list[tuple[int, ...]] = []
    theirs = calibrate_subject.moe.grouped_mm_experts_forward

    def noted(module: Any, hidden: Any, ids: Any, weights: Any) -> Any:
        made = theirs(module, hidden, ids, weights)
        seen.append((module.num_experts, *made.shape))
        assert made.isfinite().all() and made.abs().sum() > 0
        return made

    monkeypatch.setattr(calibrate_subject.moe, "grouped_mm_experts_forward", noted)
    subject = Subject(torch.device("cpu"), TINY)
    assert subject.asynchronous and len(links) == 2
    with torch.inference_mode():
        for call in (subject.experts(4, 16), subject.experts(1, 1)):
            subject.device_seconds(call)
        for way in ("h2d", "pageable", "d2h"):
            subject.join(way, subject.copy(way, MIB))
    assert seen == [(4, 64, 64), (1, 1, 64)]
    assert [link.copies for link in links] == [2, 1]
    freed: list[bool] = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (20 << 30, 24 << 30))
    module = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(is_integrated=1), get_device_name=lambda device: "A Card"
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    subject.release()
    assert freed and subject.memory() == (24 << 30, 4 << 30) and subject.unified()
    here = calibrate_profile.measured_on(torch.device("xpu"))
    assert here["device"] == "A Card" and f"torch {torch.__version__}" in here["software"]


def test_the_host_s_kernels_are_the_runtime_s(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(torch.device("cpu"), TINY)
    rows = torch.randn(2, TINY.hidden).to(calibrate_subject.DTYPE)
    one = {name: weight[0] for name, weight in subject._weights.items()}
    gate, up = (rows @ one["gate_up_proj"].T).chunk(2, -1)
    expected = (torch.nn.functional.silu(gate) * up) @ one["down_proj"].T
    made: list[Any] = []
    ours = calibrate_subject.by_steps
    monkeypatch.setattr(calibrate_subject, "by_steps", lambda *given: made.append((given[2], ours(*given))))
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: rows.repeat(shape[0] // 2, 1) if len(shape) == 2 else None)
    subject.experts(1, 2)()
    torch.testing.assert_close(made[0][1], expected)


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MiB are free, .* are needed to time reads"):
        calibrate_storage.storage(tmp_path, Effort(file_bytes=1 << 60))
    assert not list(tmp_path.iterdir())


def test_without_direct_reads_the_numbers_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffered(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.direct = False

    monkeypatch.setattr(calibrate_storage, "Reader", Buffered)
    disk = calibrate_storage.storage(tmp_path, TINY)
    assert not disk.direct
    for path in ("storage.read_bandwidth", "storage.latency_s"):
        assert disk.numbers[path].kind == "estimate"
        assert "page cache, which may have answered" in disk.numbers[path].how
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    out = box(tmp_path)
    before = {path: path.read_text() for path in tmp_path.iterdir()}

    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="cannot write there"):
        box(tmp_path, date="2027-01-01")
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before and out in before


# --- the command


def test_the_command_prints_what_it_found_or_the_documents(
    tmp_path: Path, written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    _, made, _ = written
    monkeypatch.setattr(calibration, "calibrate", lambda out, device, disk, say: (say("link: ..."), made)[1])
    app = typer.Typer()
    app.command()(calibrate_command)
    shown = CliRunner().invoke(app, ["--out", str(tmp_path / "mybox.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "GB/s" in shown.stdout and "calibrated: machine" in shown.stdout and "mybox-link.yaml" in shown.stdout
    assert shown.stderr == "link: ...\n"
    assert json.loads(CliRunner().invoke(app, ["--out", "mybox.yaml", "--json"]).stdout) == made


@pytest.mark.parametrize(("door", "before"), [("sim", ["sim"]), ("main", ["moeflow", "sim"])])
def test_the_front_door_knows_the_command_and_its_exit_status(
    tmp_path: Path, door: str, before: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["hw", "calibrate", "--out", str(tmp_path / "x.yaml"), "--device", "cuda:99"]
    monkeypatch.setattr(sys, "argv", before + words)
    with pytest.raises(SystemExit) as ended:
        getattr(import_module("moeflow.__main__"), door)()
    assert ended.value.code == 3
    said = f"error: --device cuda:99: torch finds no such device here; leave --device out for {default_device().type}\n"
    assert capsys.readouterr() == ("", said)
