"""Bundled hardware profiles, the rules for a user's own, and `sim hw`."""

from __future__ import annotations

import json
import math
import re
import textwrap
from pathlib import Path

import pytest
from moeflow.hwprofiles import profile
from moeflow.hwprofiles.profile import (
    KINDS,
    list_profiles,
    load_document,
    load_hardware,
    load_link,
    load_near_memory,
    load_storage,
)
from moeflow.sim.hw_command import app
from typer.testing import CliRunner

from moeflow.errors import InputError

MACHINES = [
    "rtx3090", "rtx4090", "rtx5090", "a6000", "a40", "a100-40g", "a100-80g", "h100", "h200", "h20", "l4",
    "jetson-orin", "gh200", "ascend910b", "ascend310p", "cpu-only",
]  # fmt: skip
LINKS = [
    "pcie3x4-egpu",
    "pcie3x16",
    "pcie4x16",
    "pcie4x16-p2p",
    "pcie5x16",
    "pcie4x8",
    "nvlink-c2c",
    "ascend-a2",
    "dram",
    "unified",
]
STORAGES = ["nvme-gen3", "nvme-gen4", "nvme-gen5"]
UNITS = ["hbm-pim", "gddr6-aim", "cxl-ndp", "upmem"]
FILES = sorted(profile.FOLDER.glob("*.yaml"))

MEASURED_LINK = """
kind: link
extends: pcie4x16
calibrated: true
h2d:
  bandwidth: {value: 26.3e9, unit: B/s, kind: measured, source: this desktop}
"""
MINE = """
kind: machine
extends: rtx4090
description: my desktop
calibrated: false
device:
  flops_achieved: {value: 0.77, unit: "1", kind: measured, source: my own GEMM}
"""


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text.lstrip())
    return str(path)


def refusal(folder: Path, text: str, name: str = "x.yaml") -> str:
    """The sentence that loading this machine ends with."""
    with pytest.raises(InputError) as error:
        load_hardware(write(folder, name, text))
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


# --- bundled documents


def test_everything_promised_is_bundled():
    found = list_profiles()
    assert tuple(found) == KINDS
    assert set(MACHINES) <= set(found["machine"])
    assert set(LINKS) <= set(found["link"])
    assert set(STORAGES) <= set(found["storage"])
    assert set(UNITS) <= set(found["near_memory"])
    assert not any(name.startswith("_") for names in found.values() for name in names)


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_loads_with_possible_numbers(name):
    machine = load_hardware(name)
    assert machine.name == name
    assert machine.description
    assert not machine.calibrated
    assert machine.dispatch in ("eager", "graph")
    assert isinstance(machine.device.memory_bytes, int)
    assert 0 < machine.device.reserve_bytes < machine.device.memory_bytes
    assert 1e11 < machine.device.flops < 3e15
    assert 1e10 < machine.device.memory_bandwidth < 1e13
    assert machine.link.submit_batched_s <= machine.link.submit_s
    assert machine.link.h2d.pageable_bandwidth <= machine.link.h2d.bandwidth
    assert machine.documents["machine"] == f"hwprofiles/{name}.yaml"


@pytest.mark.parametrize("name", LINKS)
def test_a_link_loads_alone(name):
    assert load_link(name).name == name


@pytest.mark.parametrize("name", STORAGES)
def test_a_storage_reaches_its_rate_at_its_queue_depth(name):
    storage = load_storage(name)
    assert isinstance(storage.queue_depth, int)
    assert storage.queue_depth * storage.block_bytes / storage.latency_s >= storage.read_bandwidth


@pytest.mark.parametrize("name", UNITS)
def test_a_near_memory_unit_reads_faster_inside_than_out(name):
    unit = load_near_memory(name)
    assert (unit.name, unit.calibrated) == (name, False)
    assert isinstance(unit.capacity_bytes, int)
    assert unit.internal_bandwidth > max(unit.read_bandwidth, unit.write_bandwidth)


def test_a_machine_has_a_near_memory_unit_where_it_or_the_caller_names_one(tmp_path):
    assert load_hardware("rtx4090").near_memory is None
    attached = load_hardware("rtx4090", near_memory="cxl-ndp")
    assert attached.near_memory == load_near_memory("cxl-ndp")
    assert attached.sources["near_memory.flops"].startswith("estimate: ")
    mine = write(tmp_path, "mine.yaml", MINE + "near_memory: upmem\n")
    assert load_hardware(mine).near_memory.name == "upmem"
    assert load_hardware(mine, near_memory="hbm-pim").near_memory.name == "hbm-pim"
    with pytest.raises(InputError, match=r"nvme-gen4.yaml: not a near_memory but a storage"):
        load_hardware("rtx4090", near_memory="nvme-gen4")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_number_has_unit_kind_and_source(path):
    values = profile._parse(path)
    numbers = list(profile._quantities(values, profile._schema()["$defs"][values["kind"]]))
    assert numbers
    for where, number in numbers:
        assert {"value", "unit", "kind", "source"} <= set(number), where
        assert len(number["source"]) >= 10, where
        assert math.isfinite(number["value"])


def test_sources_cover_every_number_of_a_machine():
    sources = load_hardware("rtx4090").sources
    assert len(sources) == 7 + 10 + 8 + 4
    assert sources["device.flops"].startswith("datasheet: NVIDIA")
    assert sources["link.h2d.alpha_s"].startswith("derived: ")
    assert "storage.read_bandwidth" in sources


def test_values_are_those_of_the_documents():
    machine = load_hardware("rtx4090")
    assert machine.device.flops == 165.2e12
    assert machine.device.memory_bytes == 24564 * 2**20
    assert machine.link.h2d.bandwidth == 25.1e9
    assert machine.link.d2h.pageable_bandwidth is None
    assert machine.link.peer is None
    assert load_hardware("rtx4090", "pcie4x16-p2p").link.peer.bandwidth == 26.3e9
    assert load_hardware("jetson-orin").device.unified_memory
    assert not load_hardware("gh200").device.unified_memory


# --- names


def test_a_file_name_resolves_to_the_bundled_profile_when_there_is_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_hardware("ascend910b.yaml") == load_hardware("ascend910b")
    write(tmp_path, "ascend910b.yaml", MINE)
    assert load_hardware("ascend910b.yaml").description == "my desktop"
    assert load_hardware("ascend910b").description != "my desktop"


def test_a_missing_file_in_a_folder_is_not_taken_for_a_bundled_name(tmp_path):
    with pytest.raises(InputError, match="no hardware profile"):
        load_hardware(tmp_path / "rtx4090.yaml")


def test_an_unknown_name_suggests_near_ones():
    with pytest.raises(InputError, match=r"'rtx4080'; did you mean .*rtx4090.*`sim hw list`"):
        load_hardware("rtx4080")


def test_another_kind_of_document_is_refused():
    with pytest.raises(InputError, match=r"pcie4x16.yaml: not a machine but a link"):
        load_hardware("pcie4x16")
    with pytest.raises(InputError, match=r"rtx4090.yaml: not a link but a machine"):
        load_hardware("rtx4090", link="rtx4090")


# --- a user's own


def test_extending_replaces_one_number_whole_and_keeps_the_rest(tmp_path):
    mine = load_hardware(write(tmp_path, "my-desktop.yaml", MINE))
    base = load_hardware("rtx4090")
    assert mine.name == "my-desktop"
    assert mine.device.flops_achieved == 0.77
    assert mine.sources["device.flops_achieved"] == "measured: my own GEMM"
    assert mine.device.flops == base.device.flops
    assert mine.host == base.host
    assert mine.link == base.link


def test_a_file_may_extend_the_bundled_profile_of_its_own_name(tmp_path):
    assert load_hardware(write(tmp_path, "rtx4090.yaml", MINE)).device.flops_achieved == 0.77


def test_siblings_come_before_bundled_names(tmp_path):
    write(tmp_path, "mylink.yaml", MEASURED_LINK)
    mine = load_hardware(write(tmp_path, "mine.yaml", MINE + "link: mylink\n"))
    assert mine.link.name == "mylink"
    assert mine.link.h2d.bandwidth == 26.3e9
    deeper = load_hardware(write(tmp_path, "deeper.yaml", "kind: machine\nextends: mine\n"))
    assert deeper.link == mine.link


def test_calibrated_needs_machine_and_link(tmp_path):
    link = write(tmp_path, "mylink.yaml", MEASURED_LINK)
    mine = write(tmp_path, "mine.yaml", MINE.replace("calibrated: false", "calibrated: true"))
    assert not load_hardware(mine).calibrated
    assert load_hardware(mine, link=link).calibrated
    assert not load_hardware(mine, link="pcie3x16").calibrated
    assert not load_hardware("rtx4090", link=link).calibrated


def test_calibrated_true_is_not_inherited(tmp_path):
    write(tmp_path, "mine.yaml", MINE.replace("calibrated: false", "calibrated: true"))
    assert "calibrated: missing" in refusal(tmp_path, "kind: machine\nextends: mine\n", "copy.yaml")


def test_cycles_are_refused(tmp_path):
    write(tmp_path, "a.yaml", "kind: machine\nextends: b\n")
    assert "goes round in a circle" in refusal(tmp_path, "kind: machine\nextends: a\n", "b.yaml")


def test_numbers_may_be_written_with_an_exponent_alone(tmp_path):
    text = MINE.replace("value: 0.77", "value: 7e-1")
    assert load_hardware(write(tmp_path, "x.yaml", text)).device.flops_achieved == 0.7


def test_the_example_in_the_documentation_loads(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "hardware.md").read_text()
    for name, body in re.findall(r"```yaml\n *# (\S+)\n(.*?)```", page, re.DOTALL):
        write(tmp_path, name, textwrap.dedent(body))
    mine = load_hardware(tmp_path / "mybox.yaml")
    assert (mine.name, mine.link.name, mine.link.h2d.bandwidth) == ("mybox", "mylink", 12.9e9)


BASE = "kind: machine\nextends: rtx4090\ncalibrated: false\n"
REFUSED = {
    "unknown key": (
        BASE + "device: {flopz: 1}\n",
        ("x.yaml: device.flopz: unknown key; known: flops, flops_achieved"),
    ),
    "unknown top key": (BASE + "gpu: {}\n", "x.yaml: gpu: unknown key; known: kind, name"),
    "bare number": (
        BASE + "device: {flops: 3e14}\n",
        "x.yaml: device.flops: bare value 300000000000000.0; write {value: 300000000000000.0, unit: FLOP/s, kind: ",
    ),
    "no source": (
        BASE + "host: {issue_s: {value: 1e-6, unit: s, kind: estimate}}\n",
        "x.yaml: host.issue_s.source: missing; write {value: ..., unit: s",
    ),
    "wrong unit": (
        BASE + "device: {flops: {value: 1e14, unit: TFLOP/s, kind: measured, source: me}}\n",
        "x.yaml: device.flops.unit: is 'TFLOP/s', must be 'FLOP/s'",
    ),
    "unknown kind of number": (
        BASE + "device: {flops: {value: 1e14, unit: FLOP/s, kind: guess, source: someone}}\n",
        "x.yaml: device.flops.kind: 'guess' is not one of",
    ),
    "number in a note": (
        BASE + "device: {flops: {value: fast, unit: FLOP/s, kind: measured, source: someone}}\n",
        "x.yaml: device.flops.value: 'fast' is not of type 'number'",
    ),
    "not a number": (
        BASE + "device: {flops: {value: .nan, unit: FLOP/s, kind: measured, source: someone}}\n",
        "x.yaml: device.flops.value: ",
    ),
    "fraction above one": (
        BASE + 'device: {flops_achieved: {value: 80, unit: "1", kind: measured, source: someone}}\n',
        "x.yaml: device.flops_achieved.value: 80 is greater than the maximum of 1",
    ),
    "twice": (BASE + "calibrated: true\n", "x.yaml: not valid YAML at line"),
    "no kind": ("calibrated: false\n", "x.yaml: kind: is None, must be one of machine, link, storage"),
    "no mapping": ("- 1\n", "x.yaml: holds no keys"),
    "extends nothing": ("kind: machine\nextends: rtx409\n", "x.yaml: no hardware profile 'rtx409'; did you mean"),
    "extends another kind": ("kind: machine\nextends: pcie4x16\n", "extends: hwprofiles/pcie4x16.yaml is a link"),
    "unknown link": (BASE + "link: pcie9x99\n", "x.yaml: no hardware profile 'pcie9x99'"),
    "broken": ("kind: [machine\n", "x.yaml: not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_document_is_refused_with_its_path(tmp_path, case):
    text, sentence = REFUSED[case]
    assert sentence in refusal(tmp_path, text)


def test_every_required_number_is_named_when_it_is_missing(tmp_path):
    values = load_document("rtx4090").values
    for section in ("device", "host"):
        for key in values[section]:
            stripped = {**values, section: {k: v for k, v in values[section].items() if k != key}}
            path = write(tmp_path, "x.yaml", json.dumps(stripped))
            with pytest.raises(InputError, match=rf"x\.yaml: {section}\.{key}: missing"):
                load_hardware(path)


# --- commands


def test_list_shows_every_profile():
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    for name in (*MACHINES, *LINKS, *STORAGES, *UNITS):
        assert name in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


def test_list_as_json_is_in_si_units():
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    machine = next(row for row in rows["machine"] if row["name"] == "ascend910b")
    assert machine["memory_bytes"] == 64 * 2**30
    assert machine["link_bandwidth"] == 22e9
    assert {row["name"] for row in rows["link"]} >= set(LINKS)
    assert rows["storage"][0]["queue_depth"] == 32
    assert {row["name"] for row in rows["near_memory"]} == set(UNITS)


def test_show_prints_every_source():
    result = CliRunner().invoke(app, ["show", "ascend910b.yaml"])
    assert result.exit_code == 0
    assert "TFLOP/s" in result.stdout
    assert "CANN 8.1.RC1" in result.stdout
    assert "uncalibrated" in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


def test_show_with_another_link_as_json():
    result = CliRunner().invoke(app, ["show", "rtx4090", "--link", "pcie3x16", "--json"])
    shown = json.loads(result.stdout)
    assert shown["documents"]["link"] == "hwprofiles/pcie3x16.yaml"
    assert shown["numbers"]["link.h2d.bandwidth"]["value"] == 12.4e9
    assert shown["numbers"]["device.flops"]["unit"] == "FLOP/s"
    assert shown["calibrated"] is False


def test_show_of_a_link_alone():
    result = CliRunner().invoke(app, ["show", "pcie4x16"])
    assert result.exit_code == 0
    assert "nvbandwidth" in result.stdout
    assert "LPDDR5X" in CliRunner().invoke(app, ["show", "rtx4090", "--near-memory", "cxl-ndp"]).stdout
    refused = CliRunner().invoke(app, ["show", "pcie4x16", "--link", "pcie3x16"])
    assert isinstance(refused.exception, InputError)
