"""`moeflow runtime` as a user meets it: what it prints and writes, and one sentence for every mistake."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from calls import generate, model_of, offloaded
from fake_device import FakeDevice
from moeflow.policies.fewest_copies import fewest_copies_of
from moeflow.runtime import doctor, nvtx
from moeflow.runtime.backend import HostBackend
from moeflow.runtime.cli import app
from moeflow.runtime.families import known_families
from moeflow.runtime.physical_limit import limit_seconds, link_rate
from moeflow.runtime.prometheus import prometheus_text
from moeflow.runtime.random_model import FAMILIES, config_of, random_model, shrunk
from moeflow.runtime.timeline import Timeline
from moeflow.traces.bundled import BUNDLED_TRACE
from moeflow.traces.models import load_model_spec
from moeflow.traces.reader import load_trace
from moeflow.traces.recorder import spec_of
from moeflow.traces.timeline import TRACKS, chrome_trace
from typer.testing import CliRunner

import moeflow
from moeflow import InputError


def run(*arguments: Any) -> Any:
    """The command's output on stdout; raises what it raises."""
    found = CliRunner().invoke(app, [str(word) for word in arguments])
    if isinstance(found.exception, InputError):
        raise found.exception
    return found


# --- generate


def test_generate_continues_prompts_and_writes_trace_and_timeline(tmp_path: Path) -> None:
    trace, timeline = tmp_path / "t.parquet", tmp_path / "t.json"
    words = ("generate", "--prompt", "Once upon a time", "--prompt", "The", "--budget", "0.25", "--max-new-tokens", "5")
    found = json.loads(run(*words, "--record", trace, "--timeline", timeline, "--json").stdout)
    assert found["model"] == "tiny-moe" and found["stats"]["policy"] == "moeflow"
    assert [len(each["tokens"]) for each in found["prompts"]] == [5, 5]
    assert load_trace(trace).rows == found["tokens_computed"]
    tracks = {event["args"]["name"] for event in json.loads(timeline.read_text())["traceEvents"] if event["ph"] == "M"
              and event["name"] == "thread_name"}  # fmt: skip
    assert tracks == set(TRACKS)
    shown = run(*words).stdout
    assert found["prompts"][0]["prompt"] + found["prompts"][0]["text"] in shown
    assert "hit, late, miss" in shown and "256 + 2 scratch" in shown


def test_generate_leaves_experts_on_disk_with_ram() -> None:
    words = ("generate", "--prompt", "The", "--budget", "0.1", "--max-new-tokens", "2", "--ram", "6MiB", "--json")
    found = json.loads(run(*words).stdout)
    assert found["stats"]["disk"]["bytes_read"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--prompt: is missing or empty"),
        (["--prompt", " "], "--prompt: is missing or empty"),
        (["nowhere/at/all", "--prompt", "a"], "neither a folder nor a model that can be downloaded"),
        (["--prompt", "a", "--policy", "none-such"], "none-such"),
        (["--prompt", "a", "--policy", "belady"], "knows a trace's future"),
        (["--prompt", "a", "--budget", "3 apples"], "expected a size"),
        (["--prompt", "a", "--budget", "1"], "is too little"),
        (["--prompt", "a", "--budget", "0.5", "--vram", "1GiB"], "the same thing twice"),
        (["--prompt", "a", "--vram", "1MiB"], "before any expert"),
        (["--prompt", "a", "--ram", "1KiB", "--budget", "0.1"], "not even one expert"),
        (["--prompt", "a", "--record", "no/folder/t.parquet"], "its folder does not exist"),
        (["--prompt", "a", "--record", "."], "is a folder"),
        (["--prompt", "a", "--chat"], "has no chat template"),
        (["--prompt", "a", "--max-new-tokens", "5000"], "leaves the model's 2048 positions"),
        (["--prompt", "a", "--nvtx"], "NVTX ranges need torch with CUDA"),
    ],
)
def test_mistakes_of_generate(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=re.escape(says)) as raised:
        run("generate", *words)
    assert "\n" not in str(raised.value)


# --- bench


def test_bench_of_the_bundled_model(tmp_path: Path) -> None:
    timeline = tmp_path / "t.json"
    words = ("bench", "--policy", "lru, moeflow", "--rounds", "1", "--limit", "1", "--timeline", timeline)
    found = json.loads(run(*words, "--json").stdout)
    assert [one["name"] for one in found["policies"]] == ["lru", "moeflow"]
    assert found["trace"]["requests"] == 1 and found["resident"]["tokens_per_s"] > 0
    assert timeline.is_file()
    timeline.unlink()
    shown = run(*words).stdout
    assert "share of physical limit" in shown and "pace to lru" in shown


def test_bench_of_a_shrunk_random_model_with_experts_of_the_bundled_geometry() -> None:
    found = json.loads(
        run("bench", "olmoe-1b-7b", "--shrink", "32", "--rounds", "1", "--limit", "1", "--batch", "1", "--json").stdout
    )
    assert found["model"]["name"] == "olmoe-1b-7b / 32" and found["model"]["hidden"] == 64


def test_bench_reads_experts_from_a_checkpoint_on_disk(tmp_path: Path) -> None:
    from moeflow.traces.bundled import TINY_MOE

    words = ("bench", TINY_MOE, "--ram", "10MiB", "--rounds", "1", "--limit", "1", "--json")
    found = json.loads(run(*words).stdout)
    assert found["resident"] is None and found["policies"][0]["disk"]["bytes_read"] > 0
    assert any("from disk" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--policy", ","], "names no policy"),
        (["--policy", "none-such"], "none-such"),
        (["--policy", "belady"], "knows a trace's future"),
        (["--policy", "hobbit,skip"], "does not run live"),
        (["--policy", "lru,lru"], "two of the policies have the same name"),
        (["--trace", "none.parquet"], "none.parquet"),
        (["mixtral-8x7b"], "mixtral-8x7b has 32 MoE layers of 8 experts, top-2, but the trace"),
        (["no-such-model"], "neither a folder nor a model"),
        (["olmoe-1b-7b", "--ram", "1GiB"], "--ram reads experts from their checkpoint"),
        (["--shrink", "2"], "--shrink makes a random model"),
        (["olmoe-1b-7b", "--shrink", "3"], "does not divide"),
        (["olmoe-1b-7b", "--shrink", "128"], "odd width"),
        (["--budget", "0"], "is too little"),
        (["--batch", "0"], "a batch has at least 1 request"),
        (["--timeline", "no/folder/t.json"], "its folder does not exist"),
        (["--nvtx"], "NVTX ranges need torch with CUDA"),
    ],
)
def test_mistakes_of_bench(words: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=re.escape(says)) as raised:
        run("bench", "--rounds", "1", "--limit", "1", *words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_random_models_have_the_shapes_of_their_spec(name: str) -> None:
    from transformers import AutoModelForCausalLM

    spec = load_model_spec(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name, spec), dtype=torch.bfloat16)
    made = spec_of(model, name)
    shapes = ("layers", "moe_layers", "experts", "top_k", "hidden", "intermediate", "shared_intermediate", "attention")
    for shape in (*shapes, "bytes_per_expert", "vocabulary", "dense_intermediate"):
        assert getattr(made, shape) == getattr(spec, shape), shape
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size == pytest.approx(spec.routed_bytes + spec.dense_bytes, rel=0.002)


def test_a_random_model_computes_and_is_as_small_as_asked() -> None:
    model = random_model("olmoe-1b-7b", 64)
    assert spec_of(model).hidden == 32 and shrunk(load_model_spec("olmoe-1b-7b"), 64).intermediate == 16
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_random_models_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"gpt-oss-20b cannot be made with random weights yet; known: olmoe-1b-7b"):
        random_model("gpt-oss-20b")
    with pytest.raises(InputError, match=r"takes 437\.\d GiB, and .* are free: give --shrink 2"):
        random_model("qwen3-235b-a22b")


def test_the_limit_by_hand() -> None:
    trace = load_trace(BUNDLED_TRACE).of_requests([0])
    cold = sum(len(np.unique(trace.experts[:, layer])) for layer in range(16))
    assert fewest_copies_of(trace, 16 * 64) == cold  # with room for all every expert comes once
    assert limit_seconds(trace, 16 * 64, 1000, 1e6, None) == (cold / 1000, cold)
    assert limit_seconds(trace, 16 * 64, 1000, 1e6, 1e9) == (1e9, cold)
    assert fewest_copies_of(trace, 100) > fewest_copies_of(trace, 200) > cold
    assert link_rate(HostBackend(), 1 << 20) > 1e8


# --- doctor


def test_doctor_says_what_is_there() -> None:
    found = run("doctor", "--json")
    values = json.loads(found.stdout)
    assert found.exit_code == 0 and values["can_run"]
    by_name = {one["name"]: one for one in values["findings"]}
    assert by_name["torch"]["facts"]["version"] == version("torch")
    assert {"python", "transformers", "memory", "device", "pinned memory", "direct reads", "numba"} <= by_name.keys()
    assert {"mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss"} <= set(by_name["families"]["facts"]["served"])
    assert "switch_transformers" in by_name["families"]["facts"]["refused"]
    assert all(one["says"].endswith(".") for one in values["findings"])


def test_every_family_that_the_equality_tests_serve_is_served() -> None:
    from families import FAMILIES as TESTED
    from test_equality import REFUSED

    served, refused = known_families()
    assert {name.removesuffix("_text") for name in TESTED.keys() - REFUSED} <= set(served)
    assert not set(served) & refused.keys()


def test_doctor_without_torch_says_what_to_do_and_exits_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = run("doctor")
    assert found.exit_code == 3
    assert "torch is not installed. pip install 'moeflow[live]'" in found.stdout
    assert "numba is not installed" in found.stdout and "No model can run here" in found.stdout


def test_doctor_names_a_version_that_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "4.40.0" if name == "transformers" else version(name))
    found = run("doctor", "--json")
    assert found.exit_code == 3 and not json.loads(found.stdout)["can_run"]
    assert "transformers 4.40.0 is not supported: moeflow is made for" in found.stdout


def test_a_measured_profile_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("cache: {evict: lru}\n")
    monkeypatch.setattr("moeflow.hwprofiles.profile.list_profiles", lambda: {"machine": ("rtx4090",)})
    assert not doctor._profile().fine
    (tmp_path / "mybox.yaml").write_text("")
    measured = SimpleNamespace(calibrated=True)
    monkeypatch.setattr("moeflow.hwprofiles.profile.load_hardware", lambda name: measured)
    assert doctor._profile().facts == {"calibrated": ["rtx4090", "mybox.yaml", "other.yaml"]}


# --- all of them


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['moeflow', 'runtime', *sys.argv[1:]]\n"
        "from moeflow.__main__ import main\n"
        "try:\n    main()\n"
        "finally:\n    print([n for n in ('torch', 'transformers', 'numba', 'pyarrow', 'scipy') if n in sys.modules])"
    )
    for words in ([], ["generate"], ["bench"], ["doctor"]):
        found = subprocess.run([sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True)
        assert found.stdout.rstrip().endswith("[]"), found.stderr


def test_mistakes_exit_with_2_and_a_sentence() -> None:
    found = subprocess.run([sys.executable, "-m", "moeflow", "runtime", "generate"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.startswith("error: --prompt: is missing") and not found.stdout


# --- what can be observed


@pytest.mark.parametrize("device", [HostBackend, lambda: FakeDevice(5.0)])
@pytest.mark.parametrize("policy", ["lru", "next-gate", "cpu"])
def test_spans_lie_on_the_simulators_tracks_without_overlap(device: Any, policy: str) -> None:
    live = offloaded(model_of("qwen3_moe"), policy, 0.25, device())
    with Timeline(live).attached() as seen:
        generate(live.model, 2, True)
    generate(live.model, 1, False)  # unwatched again
    spans = seen.spans()
    live.detach()
    expected = {"CPU experts" if policy == "cpu" else "copy H2D"}
    if device is HostBackend:  # the fake device's computations take no time of their own
        expected |= {"dense", "experts"} | ({"predictor"} if policy == "next-gate" else set())
    assert expected <= {track for _, _, track, _ in spans} <= set(TRACKS)
    for name in ("dense", "experts", "copy H2D"):
        own = sorted(span for span in spans if span[2] == name)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(own)), name
    assert json.loads(chrome_trace(spans, "title"))["traceEvents"]
    assert "copy" not in live.backend.__dict__ and "compute" not in live.live.__dict__


def test_prometheus_text_says_what_the_statistics_say() -> None:
    with moeflow.offload(model_of("qwen3_moe"), "lru", 0.25) as model:
        generate(model, 2, True)
        said = moeflow.stats(model)
    text = prometheus_text({**said, "policy": 'a "b"\\c'})
    line = re.compile(r'moeflow_[a-z_]+\{policy="a \\"b\\"\\\\c",device="cpu"(,[a-z]+="[a-z]+")?\} [0-9.e+-]+')
    samples = [one for one in text.splitlines() if not one.startswith("#")]
    assert all(line.fullmatch(one) for one in samples), samples
    values = {re.sub(r'policy=.*device="cpu",?', "", one.split()[0]): float(one.split()[1]) for one in
              (sample.replace('a "b"', "").rsplit(" ", 1)[0].replace(" ", "") + " " + sample.rsplit(" ", 1)[1]
               for sample in samples)}  # fmt: skip
    needs = [values[f'moeflow_needs_total{{found="{where}"}}'] for where in ("hit", "late", "miss")]
    assert sum(needs) == said["needs"] and needs[0] == round(said["hit"] * said["needs"])
    assert values['moeflow_copied_bytes_total{kind="demand"}'] == said["bytes"]["demand"]
    assert values["moeflow_passes_total{}"] == said["passes"]


def test_nvtx_ranges_nest_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", said.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: said.append("end"))
    live = offloaded(model_of("qwen3_moe"), "lru", 0.25)
    with nvtx.nvtx_ranges(live):
        generate(live.model, 1, False, 2)
    layers = [word for layer in range(3) for word in (f"moe layer {layer}", "experts", "end", "end")]
    assert said == ["pass", *layers, "end"] * 2
    generate(live.model, 1, False, 2)
    live.detach()
    assert len(said) == 2 * (len(layers) + 2)
