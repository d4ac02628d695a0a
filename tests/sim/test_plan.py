"""`sim plan`: what fits, what is best, and files that other programs can run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from moeflow.hwprofiles.profile import list_profiles, load_hardware
from moeflow.sim.cli import main
from moeflow.sim.cost import CostModel
from moeflow.sim.plan import Plan, make_plan
from moeflow.sim.plan_advice import advice, ktransformers_options, llama_options, llama_override
from moeflow.sim.plan_advice import settings as chosen
from moeflow.sim.plan_files import contents, write_plan
from moeflow.sim.surrogate import localities
from moeflow.traces.models import load_model_spec
from moeflow.traces.writer import write_trace
from test_cli import random_trace

import moeflow

SLOW_LINK = """
kind: link
extends: pcie3x16
description: an x4 slot behind a cable
calibrated: false
h2d:
  bandwidth: {value: 1.1e+9, unit: B/s, kind: estimate, source: "reported for Gen3 x4 behind Thunderbolt"}
"""
MIDDLE = localities()[1:2]
SMALL = {"context": 96, "routing": MIDDLE}  # 48 tokens of prompt and of answer
TINY = replace(load_model_spec("olmoe-1b-7b"), layers=3, moe_layers=(1, 2), dense_intermediate=1024)


@pytest.fixture(scope="module")
def slow_link(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("links") / "x4.yaml"
    path.write_text(SLOW_LINK)
    return str(path)


Printed = tuple[int, str, str]  # exit status, stdout, stderr


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """The command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Printed:
        monkeypatch.setattr("sys.argv", ["sim", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), *capsys.readouterr()

    return run


def room_for(model: object, machine: str, experts: int, context: int = 96) -> str:
    """Device memory with room for so many experts."""
    spec = load_model_spec(model) if isinstance(model, str) else model
    fixed = load_hardware(machine).device.reserve_bytes + spec.dense_bytes + context * spec.kv_bytes_per_token
    return f"{fixed + experts * spec.bytes_per_expert}B"


def rates(plan: Plan) -> dict[str, float]:
    return {row["way"]: row["tokens_per_s"] for row in plan.values["rows"] if row["refused"] is None}


GOLDEN = {
    ("olmoe-1b-7b", "rtx4090"): ("cpu", {"layers": 0.14, "cpu": 55.43, "lru": 3.04, "moeflow": 2.82, "split": 5.45}),
    ("olmoe-1b-7b", "h100"): ("resident", {"resident": 203.16}),
    ("olmoe-1b-7b", "ascend910b"): (
        "cpu",
        {"layers": 2.73, "cpu": 16.58, "lru": 15.73, "moeflow": 15.62, "split": 15.48},
    ),
    ("gpt-oss-20b", "rtx4090"): ("cpu", {"layers": 0.19, "cpu": 53.81, "lru": 3.81, "moeflow": 3.55, "split": 4.36}),
    ("gpt-oss-20b", "h100"): ("resident", {"resident": 133.02}),
    ("gpt-oss-20b", "ascend910b"): (
        "cpu",
        {"layers": 3.71, "cpu": 11.61, "lru": 10.70, "moeflow": 10.70, "split": 10.58},
    ),
}  # tokens/s


@pytest.mark.parametrize("model", ["olmoe-1b-7b", "gpt-oss-20b"])
@pytest.mark.parametrize("machine", ["rtx4090", "h100", "ascend910b"])
def test_golden_plans(model: str, machine: str, slow_link: str) -> None:
    spec = load_model_spec(model)
    half = len(spec.moe_layers) * spec.experts // 2
    vram = None if machine == "h100" else room_for(model, machine, half)
    plan = make_plan(model, machine, vram=vram, link=slow_link if machine == "rtx4090" else None, **SMALL)
    best, expected = GOLDEN[model, machine]
    assert plan.values["best"] == best
    assert rates(plan) == pytest.approx(expected, rel=0.03)
    verdict = advice(plan)[0]
    if machine == "rtx4090":
        assert "An expert cache will not help" in verdict and "x4" in verdict
    if machine == "h100":
        assert "Offloading is not needed" in verdict and "GiB" in verdict


@settings(max_examples=6)
@given(st.integers(1, 60), st.integers(1, 40))
def test_a_faster_link_never_slows_the_lru_cache(gb_per_s: int, more: int) -> None:
    machine = load_hardware("rtx4090")

    def rate(bandwidth: float) -> float:
        link = replace(machine.link, h2d=replace(machine.link.h2d, bandwidth=bandwidth))
        plan = make_plan(TINY, replace(machine, link=link), vram=room_for(TINY, "rtx4090", 60), **SMALL)
        return float(plan.row("lru")["tokens_per_s"])

    assert rate((gb_per_s + more) * 1e9) >= rate(gb_per_s * 1e9) * (1 - 1e-9)


def test_more_device_memory_keeps_more_layers_and_experts() -> None:
    few, more = (make_plan(TINY, "rtx4090", vram=room_for(TINY, "rtx4090", n), **SMALL) for n in (40, 100))
    assert few.box.slots == 40 and more.box.slots == 100
    assert rates(few)["cpu"] < rates(more)["cpu"] and rates(few)["lru"] < rates(more)["lru"]
    assert few.row("layers")["refused"].startswith("two layers")


def test_layer_offload_and_cpu_layers_by_hand() -> None:
    """One of two MoE layers fits: the other is copied whole, or its 8 experts a token are computed by the host."""
    plan = make_plan(TINY, "rtx4090", vram=room_for(TINY, "rtx4090", 127), **SMALL)
    cost = CostModel(plan.box.hardware, TINY)
    assert plan.row("layers")["refused"].startswith("two layers")
    cpu = plan.row("cpu")
    assert cpu["hit"] == 0.5 and cpu["interval"][0] == cpu["interval"][1]
    host_s = 8 * cost.host_expert(1) / 1e12
    assert 1 / cpu["tokens_per_s"] == pytest.approx(1 / plan.values["resident_tokens_per_s"] + host_s, rel=0.1)
    four = replace(TINY, layers=4, moe_layers=(0, 1, 2, 3))
    plan = make_plan(four, "rtx4090", vram=room_for(four, "rtx4090", 3 * 64), **SMALL)
    moved = 3 * (cost.copy_alpha_ps + 64 * cost.copy_ps) / 1e12  # one layer stays, two layers' slots carry the others
    assert 1 / plan.row("layers")["tokens_per_s"] == pytest.approx(moved)
    assert plan.row("layers")["hit"] == 0.25


def test_experts_on_ssd_are_slower_and_said() -> None:
    vram = room_for(TINY, "rtx4090", 64)
    all_in_ram = make_plan(TINY, "rtx4090", vram=vram, **SMALL)
    some = make_plan(TINY, "rtx4090", vram=vram, ram=f"{20 * TINY.bytes_per_expert}B", **SMALL)
    assert some.values["memory"]["on_ssd"] == 108
    assert all(rates(some)[way] <= rates(all_in_ram)[way] for way in ("cpu", "lru", "split"))
    assert any("rest on nvme" in sentence for sentence in advice(some))


def test_a_near_memory_unit_changes_no_plan() -> None:
    with_unit = make_plan(TINY, load_hardware("rtx4090", near_memory="cxl-ndp"), **SMALL)
    assert with_unit.values == make_plan(TINY, "rtx4090", **SMALL).values


def test_a_model_that_crawls_from_the_ssd_is_called_hopeless() -> None:
    machine = load_hardware("rtx4090")
    slow = replace(machine, storage=replace(machine.storage, read_bandwidth=1e7))
    plan = make_plan(TINY, slow, vram=room_for(TINY, "rtx4090", 20), ram=f"{10 * TINY.bytes_per_expert}B", **SMALL)
    said = advice(plan)
    assert said[0].startswith("Hopeless") and "118 of 128 experts" in said[1]


@pytest.mark.parametrize("machine", list_profiles()["machine"])
def test_every_bundled_machine_can_be_planned_for(machine: str) -> None:
    plan = make_plan(TINY, machine, vram=room_for(TINY, machine, 64), context=96, routing=MIDDLE)
    assert all(row["refused"] is None for row in plan.values["rows"][2:])
    assert all(0 <= row["wait_share"] <= 1 and row["tokens_per_s"] > 0 for row in plan.values["rows"][2:])
    assert advice(plan) and contents(plan)


def test_a_recording_takes_the_place_of_surrogates(tmp_path: Path) -> None:
    trace = random_trace(steps=260)
    plan = make_plan(
        "olmoe-1b-7b", "rtx4090", vram=room_for("olmoe-1b-7b", "rtx4090", 512, 512), context=512, trace=trace
    )
    assert plan.values["routing"]["kind"] == "recorded"
    low, high = plan.row("lru")["interval"]
    assert low <= plan.row("lru")["tokens_per_s"] <= high
    run = moeflow.simulate(trace, plan.box.hardware, "lru", 512)
    assert plan.row("lru")["tokens_per_s"] == pytest.approx(run["tokens_per_s"])
    assert not any("surrogate" in sentence for sentence in advice(plan))


def test_same_plan_same_bytes() -> None:
    one, two = (contents(make_plan(TINY, "rtx4090", vram=room_for(TINY, "rtx4090", 64), **SMALL)) for _ in range(2))
    assert one == two


HOSTILE = 'x\'; touch owned; echo "$(touch owned)"\n`touch owned`'


def test_files_are_valid_and_names_cannot_escape(tmp_path: Path) -> None:
    plan = make_plan(replace(TINY, name=HOSTILE), "rtx4090", vram=room_for(TINY, "rtx4090", 64), **SMALL)
    write_plan(plan, tmp_path / "plan")
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == [
        "plan.json", "policy.yaml", "run-ktransformers.sh", "run-llama.sh",
    ]  # fmt: skip
    moeflow.Policy.load(tmp_path / "plan" / "policy.yaml")
    assert json.loads((tmp_path / "plan" / "plan.json").read_text())["model"] == HOSTILE
    called = tmp_path / "bin"
    called.mkdir()
    for name in ("llama-server", "python"):
        (called / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (called / name).chmod(0o755)
    for script, options in (
        ("run-llama.sh", llama_options(plan)),
        ("run-ktransformers.sh", ktransformers_options(plan)),
    ):
        path = tmp_path / "plan" / script
        environment = {"PATH": f"{called}:/usr/bin:/bin", "CORES": "8"}
        done = subprocess.run(
            [path, "my model.gguf", "--port", "1"], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        words = done.stdout.splitlines()
        assert done.returncode == 0 and "my model.gguf" in words and words[-2:] == ["--port", "1"]
        assert all(option in words for option in options)
        missing = subprocess.run([path], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert missing.returncode != 0 and "usage" in missing.stderr
    assert not (tmp_path / "owned").exists()


def test_layers_on_the_cpu_are_counted_as_llama_cpp_numbers_blocks() -> None:
    plan = make_plan(TINY, "rtx4090", vram=room_for(TINY, "rtx4090", 64), **SMALL)
    assert chosen(plan)["llama_layers_on_cpu"] == 2  # block 0 is dense, block 1 on the host, block 2 on the device
    _, pattern = llama_override(plan)
    tensor = re.compile(pattern.removesuffix("=CPU"))
    assert tensor.search("blk.1.ffn_up_exps.weight") and not tensor.search("blk.2.ffn_up_exps.weight")
    assert not tensor.search("blk.11.ffn_up_exps.weight")
    assert chosen(plan)["kt_experts_per_layer"] == 32


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(TINY, "rtx4090", vram=room_for(TINY, "rtx4090", 64), **SMALL)
    write, written = Path.write_text, []

    def full(self: Path, text: str, **options: str) -> int:
        written.append(self)
        if len(written) == 3:
            write(self, text[: len(text) // 2], **options)
            raise OSError(28, "No space left on device")
        return write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(moeflow.InputError, match="No space left"):
        write_plan(plan, tmp_path / "plan")
    assert list((tmp_path / "plan").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "qwen3-30b-a3"), "did you mean qwen3-30b-a3b"),
        (("--hw", "rtx409"), "rtx4090"),
        (("--vram", "2GiB"), "dense weights 0.89"),
        (("--vram", "lots"), "20GiB"),
        (("--ram", "0"), "not even one expert"),
        (("--ram", "0GiB"), "not even one expert"),
        (("--context", "-5"), "--context -5"),
        (("--link", "pcie9"), "pcie9"),
        (("--trace", "missing.parquet"), "missing.parquet"),
        (("--out", "taken"), "it is a file"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(
    sim: Callable[..., Printed], tmp_path: Path, arguments: tuple[str, str], says: str
) -> None:
    (tmp_path / "taken").write_text("")
    given = {"--model": "olmoe-1b-7b", "--hw": "rtx4090", arguments[0]: arguments[1]}
    status, _, said = sim("plan", *(word for pair in given.items() for word in pair))
    assert status == 2 and says in said and said.startswith("error: ") and said.count("\n") == 1


def test_a_trace_of_another_shape_or_too_long_is_refused() -> None:
    with pytest.raises(moeflow.InputError, match="do not fit trace"):
        make_plan("gpt-oss-20b", "rtx4090", trace=random_trace())
    with pytest.raises(moeflow.InputError, match="reaches 14 tokens"):
        make_plan("olmoe-1b-7b", "rtx4090", trace=random_trace(), context=8)
    trace = random_trace()
    with pytest.raises(moeflow.InputError, match="no decode rows"):
        make_plan("olmoe-1b-7b", "rtx4090", trace=replace(trace, phase=np.zeros_like(trace.phase)))


def test_the_command_prints_table_advice_and_flags(sim: Callable[..., Printed], tmp_path: Path) -> None:
    write_trace(tmp_path / "mine.parquet", random_trace())
    asked = [
        "--model",
        "olmoe-1b-7b",
        "--hw",
        "rtx4090",
        "--vram",
        "10GiB",
        "--context",
        "64",
        "--trace",
        "mine.parquet",
    ]
    status, shown, _ = sim("plan", *asked, "--out", "plan")
    assert status == 0
    assert "recorded routing" in shown and "split: link + CPU" in shown and "-ngl 99" in shown
    line = next(line for line in shown.splitlines() if line.startswith("moeflow "))
    assert sim(*shlex.split(line)[2:], "--out", "run")[0] == 0
    assert yaml.safe_load((tmp_path / "plan" / "policy.yaml").read_text())["miss"]["kind"]
    assert sim("plan", *asked, "--json")[1] == (tmp_path / "plan" / "plan.json").read_text()
